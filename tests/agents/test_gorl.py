"""GoRL: stage 0 is PPO bit for bit; ratios of codes; the penalty; who moves in which phase; the refit; resuming."""

from __future__ import annotations

import math
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import (
    NUM_ENVS,
    OBS_DIM,
    batch_for,
    differing,
    recorded_inputs,
    snapshot,
    tiny,
    transitions,
)
from interrupted_runs import StopAt, assert_resumes_anywhere
from torch import Tensor

import rlctl_envs
from rlctl import agents
from rlctl.agents.decoder_stages import Recent
from rlctl.agents.decoder_stages import refit as refit_step
from rlctl.agents.gorl import STAGE, GoRL, GoRLConfig, train_gorl
from rlctl.agents.ppo import PPOConfig
from rlctl.data.ring import Ring
from rlctl.errors import Interrupted, UsageError
from rlctl.nets import Normal
from rlctl.run import Run, RunConfig
from rlctl.train import Job, on_policy
from rlctl.types import Batch, Metrics, Spec
from rlctl_envs.probes import make_probe

both_decoders = pytest.mark.parametrize("decoder", ["flow", "diffusion"])
SMALL: dict[str, Any] = {
    "num_envs": 2,
    "horizon": 8,
    "minibatch_size": 8,
    "epochs": 2,
    "hidden": (8,),
    "decoder_hidden": (8, 8),
    "decoder_steps": 3,
}


def gorl(**overrides: Any) -> GoRL:
    agent = tiny("gorl", **overrides)
    assert isinstance(agent, GoRL)
    return agent


# -------------------------------------------------------------------------------------------------- stage 0 is PPO
class Recorded(Run):
    """Remembers every reward it is shown."""

    def __init__(self) -> None:
        super().__init__()
        self.rewards: list[Tensor] = []

    def begin(self, *args: Any, **kwargs: Any) -> Any:
        obs = super().begin(*args, **kwargs)
        add = self.episodes.add

        def keep(reward: Tensor, done: Tensor) -> None:
            self.rewards.append(reward.clone())
            add(reward, done)

        self.episodes.add = keep  # type: ignore[method-assign]
        return obs


@both_decoders
@pytest.mark.parametrize("squash", [False, True])
@pytest.mark.parametrize("task", ["both", "Hopper"])
def test_stage_0_is_ppo_bit_for_bit(decoder: str, squash: bool, task: str) -> None:
    """PPO in the same environment, or, where the decoder's actions are squashed, in one that takes tanh of them."""
    if task == "Hopper" and decoder == "diffusion":
        pytest.skip("the identity is the same")
    shared = {k: v for k, v in SMALL.items() if k in {f.name for f in fields(PPOConfig)}}
    shared |= {"steps": 16 * 4, "clip": 0.2, "anneal_lr": True}
    results = []
    for name in ("ppo", "gorl"):
        env = make_probe("both", 2, act_dim=2) if task == "both" else rlctl_envs.make("Hopper-v5", 2, threads=1)
        spec = Spec(env.obs_dim, env.act_dim, 2, episode_len=env.episode_len, seed=3)
        run = Recorded()
        if name == "ppo":
            agent = agents.make("ppo", spec, PPOConfig(**shared))
            if squash:
                step = env.step
                env.step = lambda a, step=step: step(torch.as_tensor(a).tanh())  # type: ignore[method-assign, misc]
            on_policy(agent, env, run, stage=STAGE)
        else:
            own = {"stage_weights": (1.0,), "kl_coef": 0.0, "squash": squash, "decoder": decoder}
            cfg = GoRLConfig(**(SMALL | shared | own))
            agent = agents.make("gorl", spec, cfg)
            train_gorl(Job(agent, env, None, run, cfg, 3))
        results.append((agent, torch.stack(run.rewards)))
        env.close()
    (ppo, rewards), (ours, our_rewards) = results
    assert torch.equal(rewards, our_rewards)
    state = ours.state_dict()
    assert [k for k, v in ppo.state_dict().items() if not torch.equal(v, state[k])] == []
    assert len(rewards) == 32


# --------------------------------------------------------------------------------------------------------- phase 1
def gathered(agent: GoRL, n: int, action: Tensor | None = None) -> Recent:
    """Rollouts of the agent in made-up states; or with given raw actions."""
    ring = Ring(n, seed=1)
    b = transitions(torch.Generator().manual_seed(5), n)
    with agent.borrowed_rng(0), torch.no_grad():
        acted, extra = agent.act(b.obs, explore=True)
    extra = extra if action is None else {"code": torch.zeros_like(action), "raw_action": action}
    ring.add(b._replace(action=acted, extra=extra))
    return Recent(ring, n)


def refit(agent: GoRL, rows: Recent, steps: int, batch_size: int = 64) -> list[Metrics]:
    return [refit_step(agent, rows, rows.sample(batch_size)) for _ in range(steps)]


def trained(decoder: str = "flow", **overrides: Any) -> GoRL:
    """A GoRL agent in stage 1, under a decoder that is not the identity."""
    agent = gorl(decoder=decoder, stage_weights=(1.0, 1.0), decoder_updates=60, decoder_lr=1e-2, **overrides)
    for _ in range(2):
        agent.update(batch_for(agent))
    refit(agent, gathered(agent, 400), 60)
    agent.begin(1)
    return agent


@both_decoders
def test_the_first_ratio_is_one(decoder: str) -> None:
    """Of codes, under a decoder that is not the identity; a ratio of actions would be something else."""
    agent = trained(decoder)
    batch = batch_for(agent)
    codes = batch.extra["code"]
    assert not torch.allclose(codes, batch.extra["raw_action"], atol=0.05)
    torch.testing.assert_close(batch.action, batch.extra["raw_action"].tanh())
    rows = agent.prepare_rollout(batch)
    assert torch.equal(rows.action, codes.flatten(0, 1))
    with torch.no_grad():
        acting = torch.stack([agent.policy.latent_log_prob(o, e) for o, e in zip(batch.obs, codes, strict=True)])
        ratio = (agent.pi(rows.obs).log_prob(rows.action) - rows.logp_old).exp()
    torch.testing.assert_close(rows.logp_old, acting.flatten(), rtol=1e-5, atol=1e-6)
    assert torch.equal(ratio, torch.ones_like(ratio))
    torch.testing.assert_close(agent.policy_loss(ratio, rows.adv), -rows.adv.mean())


@both_decoders
def test_an_exported_draw_is_decoded(decoder: str) -> None:
    agent, obs = trained(decoder), torch.randn(6, OBS_DIM)
    with agent.borrowed_rng(0):
        noise = torch.randn(6, agent.spec.act_dim, generator=agent.rng["action"])
    with agent.borrowed_rng(0), torch.no_grad():
        action, extra = agent.act(obs, explore=True)
        got = agent.exportable(sampled=True).module(obs, noise)
    torch.testing.assert_close(got, action)
    assert not torch.allclose(got, extra["code"].tanh(), atol=0.05)


@both_decoders
def test_phase_1_moves_encoder_and_critic_alone(decoder: str) -> None:
    agent = trained(decoder)
    before = snapshot(agent)
    agent.update(batch_for(agent))
    assert {k.split(".")[0] for k in differing(agent, before)} == {"pi", "v", "obs_norm", "reward_scale"}
    assert not any(p.requires_grad for p in agent.decoders.acting.parameters())


def test_the_penalty_by_number(double: None) -> None:
    """lam KL(N(mu, sigma^2) || N(0, 1)) = lam/2 sum(mu^2 + sigma^2 - 1 - log sigma^2), or means of the moments."""
    mean, log_std = torch.tensor([[0.5, -1.0], [0.0, 2.0]]), torch.tensor([math.log(2.0), math.log(0.5)])
    kl = [0.5 * (0.25 + 1 + 4 + 0.25 - 2), 0.5 * (0 + 4 + 4 + 0.25 - 2)]  # the logarithms cancel
    assert float(gorl(kl_coef=0.1).penalty(Normal(mean, log_std))) == pytest.approx(0.1 * sum(kl) / 2)  # type: ignore[arg-type]
    moments = gorl(kl_coef=0.1, prior_penalty="moments").penalty(Normal(mean, log_std))
    assert float(moments) == pytest.approx(0.1 * (5.25 / 4 + 4.25 / 2))  # type: ignore[arg-type]
    later = gorl(kl_coef=0.1, later_kl_coef=0.3, ent_coef=0.01, stage_weights=(1.0, 1.0))
    later.counters["stage"] = 1
    entropy = math.log(2 * math.pi * math.e)  # of log-stds that cancel
    expected = 0.3 * sum(kl) / 2 - 0.01 * entropy
    assert float(later.penalty(Normal(mean, log_std))) == pytest.approx(expected)  # type: ignore[arg-type]
    assert gorl(kl_coef=0.0).penalty(Normal(mean, log_std)) is None


def test_the_penalty_is_zero_at_the_prior_alone(double: None) -> None:
    agent = gorl(kl_coef=1.0)
    at_prior = Normal(torch.zeros(3, 2), torch.zeros(2))
    assert float(agent.penalty(at_prior)) == 0.0  # type: ignore[arg-type]
    for mean, log_std in ((0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        other = Normal(torch.full((3, 2), mean), torch.full((2,), log_std))
        assert float(agent.penalty(other)) > 1e-3  # type: ignore[arg-type]


def test_the_optimum_of_a_bandit_under_the_penalty(double: None) -> None:
    """Return -(e - c)^2 / (2 l) and the identity decoder: e* = c / (1 + lam l), sigma^2 = lam l / (1 + lam l)."""
    lam, c, length = 0.4, 0.7, 0.5
    agent = gorl(kl_coef=lam)
    mean = torch.full((1, 2), c / (1 + lam * length), requires_grad=True)
    log_std = torch.full((2,), 0.5 * math.log(lam * length / (1 + lam * length)), requires_grad=True)
    expected_return = -((mean - c).square() + (2 * log_std).exp()) / (2 * length)
    loss = agent.penalty(Normal(mean, log_std)) - expected_return.sum()  # type: ignore[operator]
    for g in torch.autograd.grad(loss, [mean, log_std]):
        assert float(g.abs().max()) < 1e-12


def test_the_clip_of_later_stages() -> None:
    agent = gorl(clip=0.1, later_clip=0.4, stage_weights=(1.0, 1.0))
    ratio, adv = torch.tensor([2.0]), torch.tensor([1.0])
    assert float(agent.policy_loss(ratio, adv)) == pytest.approx(-1.1)
    agent.counters["stage"] = 1
    assert float(agent.policy_loss(ratio, adv)) == pytest.approx(-1.4)


def test_the_gradient_bound_of_later_stages(monkeypatch: pytest.MonkeyPatch) -> None:
    bounds: list[float] = []
    monkeypatch.setattr("rlctl.agents.ppo.minimize", lambda loss, opt, bound: bounds.append(bound))
    agent = gorl(max_grad_norm=0.2, later_max_grad_norm=0.7, stage_weights=(1.0, 1.0))
    for stage in (0, 1):
        agent.counters["stage"] = stage
        agent.update(batch_for(agent))
    assert (bounds[0], bounds[-1], set(bounds)) == (0.2, 0.7, {0.2, 0.7})


def test_the_learning_rate_falls_over_each_stage() -> None:
    agent = gorl(steps=6 * 64, stage_weights=(2.0, 1.0), anneal_lr=True, lr=1e-3)
    rates = []
    for j, updates in enumerate((4, 2)):
        agent.begin(j)
        for _ in range(updates):
            agent.update(batch_for(agent))
            rates.append(agent.opt.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-3, 7.5e-4, 5e-4, 2.5e-4, 1e-3, 5e-4])


# --------------------------------------------------------------------------------------------------------- phase 2
@pytest.mark.parametrize("added", [25, 40])
def test_held_out_rows_are_never_sampled(added: int) -> None:
    """Also where the ring has begun anew, and of its 30 rows the newest 25 are asked for."""
    ring = Ring(30, seed=0)
    b = transitions(torch.Generator().manual_seed(0), added)
    for lo in range(0, added, 5):
        part = b._replace(reward=torch.arange(float(added))).map(lambda x, lo=lo: x[lo : lo + 5])  # type: ignore[misc]
        ring.add(part)
    rows, first = Recent(ring, 25), added - 25
    assert len(rows) == 25
    assert rows.whole().reward.tolist() == list(range(first, added))
    assert rows.held_out().reward.tolist() == [first + 9, first + 19]
    assert sorted({int(r) - first for r in rows.sample(5000).reward}) == [i for i in range(25) if i not in (9, 19)]


@both_decoders
def test_phase_2_moves_the_next_decoder_alone(decoder: str) -> None:
    agent = gorl(decoder=decoder, decoder_updates=4)
    rows, before = gathered(agent, 200), snapshot(agent)
    metrics = refit(agent, rows, 4)
    moved = {k.removeprefix("decoders.").split(".")[0] for k in differing(agent, before)}
    assert moved == {"next", "next_norm", "best", "best_loss"}
    assert metrics[-1].keys() == {"losses/decoder", "losses/decoder_held_out"}
    obs = rows.whole().obs
    torch.testing.assert_close(agent.decoders.next_norm(obs).mean(0), torch.zeros(OBS_DIM), rtol=0, atol=1e-4)


def test_phase_2_does_not_see_the_codes(double: None) -> None:
    """Noise comes from the prior: whatever codes made the actions, the loss is the same."""
    losses = []
    for change in (0, 1, 2):
        agent = gorl()
        b = gathered(agent, 200).whole()
        extra = dict(b.extra)
        if change == 1:
            extra["code"], b = 3 * extra["code"].flip(0), b._replace(action=b.action.flip(0))
        elif change == 2:
            extra["raw_action"] = extra["raw_action"].tanh()
        losses.append(agent.decoders.loss(b._replace(extra=extra), agent.rng["sample"]))
    assert torch.equal(losses[0], losses[1])
    assert not torch.equal(losses[0], losses[2])  # it is the raw actions that count


@both_decoders
def test_the_refitted_decoder_makes_actions_of_noise(decoder: str) -> None:
    """Actions N(m, s^2), whatever the state: decoded noise has their mean and spread."""
    agent = gorl(decoder=decoder, decoder_hidden=(32, 32), decoder_steps=10, decoder_lr=5e-3, stage_weights=(1.0, 1.0))
    g = torch.Generator().manual_seed(0)
    mean, std = torch.tensor([0.8, -0.5]), torch.tensor([0.3, 0.6])
    rows = gathered(agent, 2000, mean + std * torch.randn(2000, 2, generator=g))
    agent.counters["decoder_updates"] = 0
    refit(agent, rows, 500, 256)
    assert not bool(agent.decoders.acting.fitted)
    agent.decoders.best.load_state_dict(agent.decoders.next.state_dict())
    agent.begin(1)
    with torch.no_grad():
        raw = agent.policy.raw_action(rows.whole().obs, torch.randn(2000, 2, generator=g))
    assert raw.mean(0).tolist() == pytest.approx(mean.tolist(), abs=0.08)
    assert raw.std(0).tolist() == pytest.approx(std.tolist(), rel=0.25)  # a few steps lose some of it


def test_the_best_weights_on_held_out_rows_are_kept() -> None:
    agent = gorl(decoder_updates=100, decoder_lr=3e-3)
    rows = gathered(agent, 400)
    log = refit(agent, rows, 100)
    held_out = [float(m["losses/decoder_held_out"]) for m in log if "losses/decoder_held_out" in m]
    assert len(held_out) == 50
    kept = float(agent.decoders.best_loss)
    assert kept == min(held_out) < held_out[0]
    for p in agent.decoders.next.parameters():
        p.data.add_(1.0)  # worse
    best = snapshot(agent.decoders.best)
    assert float(agent.decoders.compare(rows.held_out())) > kept
    assert float(agent.decoders.best_loss) == kept
    assert differing(agent.decoders.best, best) == []
    agent.decoders.next.load_state_dict(best)
    assert float(agent.decoders.compare(rows.held_out())) == kept  # the same noise every time


# --------------------------------------------------------------------------------------------------------- a stage
def test_a_stage_begins_with_a_fresh_encoder_under_the_new_decoder() -> None:
    agent = gorl(stage_weights=(1.0, 1.0, 1.0), decoder_updates=20)
    first = snapshot(agent)
    agent.update(batch_for(agent))
    refit(agent, gathered(agent, 200), 20)
    best = snapshot(agent.decoders.best)
    assert float(agent.reward_scale.moments.count) > 0
    assert not torch.equal(agent.pi.log_std, first["pi.log_std"])
    agent.begin(1)
    assert differing(agent.decoders.acting.net, best) == []
    assert differing(agent.decoders.norm, snapshot(agent.decoders.next_norm)) == []
    assert bool(agent.decoders.acting.fitted)
    assert float(agent.obs_norm.count) == 0.0
    assert float(agent.reward_scale.moments.count) == 0.0
    assert not bool(agent.reward_scale.carry.any())
    assert torch.equal(agent.pi.log_std, first["pi.log_std"])
    assert not agent.opt.state
    held = {id(p) for g in agent.opt.param_groups for p in g["params"]}
    assert held == {id(p) for net in (agent.pi, agent.v) for p in net.parameters()}
    now = agent.state_dict()
    weights = [k for k in first if k.startswith(("pi.mean", "v.")) and k.endswith("weight")]
    assert weights
    assert not any(torch.equal(first[k], now[k]) for k in weights)
    again = snapshot(agent)
    agent.begin(1)  # as a resumed run does
    assert differing(agent, again) == []


def test_stages_share_the_steps() -> None:
    cfg = GoRLConfig(steps=1000, num_envs=2, horizon=25, minibatch_size=50, stage_weights=(2.0, 2.0, 1.0))
    assert cfg.stage_steps() == [400, 400, 200]
    assert GoRLConfig(steps=10, num_envs=2, horizon=25, minibatch_size=50).stage_steps() == [50] * 4


def test_encoder_and_decoder_see_normalised_observations() -> None:
    agent = trained()
    obs = torch.randn(NUM_ENVS, OBS_DIM) * 3 + 1
    seen, decoded = recorded_inputs(agent.pi), recorded_inputs(agent.decoders.acting.net.net)  # type: ignore[arg-type]
    agent.act(obs, explore=True)
    torch.testing.assert_close(seen[0][0], agent.obs_norm(obs))
    torch.testing.assert_close(decoded[0][0], agent.decoders.norm(obs))
    assert not torch.allclose(agent.decoders.norm(obs), obs)


def test_what_stood_still_in_the_rollouts_does_not_blow_up_in_a_decoder() -> None:
    agent = gorl(stage_weights=(1.0, 1.0), decoder_updates=20)
    rows = gathered(agent, 200)
    rows.ring.rows.obs[:, 0] = 0.0
    refit(agent, rows, 20)
    agent.begin(1)
    obs = torch.tensor([[5.0] + [0.0] * (OBS_DIM - 1)])
    decoded = recorded_inputs(agent.decoders.acting.net.net)  # type: ignore[arg-type]
    agent.act(obs, explore=True)
    assert float(decoded[0][0][0, 0]) == 10.0  # 5000 without the bound


@both_decoders
def test_four_modes(decoder: str) -> None:
    """A decoder of actions with four modes covers them from the prior; PPO on its codes picks the rewarded one."""
    size = {"num_envs": 32, "horizon": 16, "minibatch_size": 128, "epochs": 8, "hidden": (16,), "lr": 1e-2}
    net = {"decoder_hidden": (64, 64), "decoder_steps": 10, "decoder_lr": 3e-3, "decoder_updates": 700}
    agent = gorl(decoder=decoder, stage_weights=(1.0, 1.0), kl_coef=1e-3, normalize_reward=False, **size, **net)
    modes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    g = torch.Generator().manual_seed(0)
    raw = modes[torch.randint(4, (4000,), generator=g)] + 0.1 * torch.randn(4000, 2, generator=g)
    rows = gathered(agent, 4000, raw)
    rows.ring.rows.obs.zero_()
    refit(agent, rows, 700, 256)
    agent.begin(1)

    def act(obs: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with torch.no_grad():
            action, extra = agent.act(obs, explore=True)
        return action, extra, (extra["raw_action"].unsqueeze(-2) - modes).norm(dim=-1).argmin(-1)

    obs, no = torch.zeros(16, 32, OBS_DIM), torch.zeros(16, 32, dtype=torch.bool)
    covered = act(torch.zeros(2000, OBS_DIM))[2].bincount(minlength=4) / 2000
    assert 0.1 < float(covered.min()) <= float(covered.max()) < 0.45
    for _ in range(25):
        action, extra, mode = act(obs)
        agent.update(Batch(obs, action, (mode == 1).float(), obs, ~no, no, extra))
    assert float((act(torch.zeros(2000, OBS_DIM))[2] == 1).float().mean()) > 0.9


# -------------------------------------------------------------------------------------------------------- whole runs
def small_run(run: Run, **changes: Any) -> GoRL:
    """Three stages of three rollouts each, in the probe `time-limit`, whose state takes long to forget."""
    options = SMALL | {"steps": 16 * 9, "stage_weights": (1.0, 1.0, 1.0), "rollout_steps": 100, "decoder_updates": 12}
    cfg = GoRLConfig(**(options | {"decoder_batch_size": 16} | changes))
    env = make_probe("time-limit", 2, seed=1)
    agent = agents.make("gorl", Spec(env.obs_dim, env.act_dim, 2, seed=4), cfg)
    assert isinstance(agent, GoRL)
    train_gorl(Job(agent, env, None, run, cfg, 4))
    run.finish(agent)
    return agent


@both_decoders
def test_a_run_takes_the_steps_it_planned(decoder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    planned: list[int] = []
    monkeypatch.setattr(Run, "plan", lambda self, total: planned.append(total))
    run = Run()
    agent = small_run(run, decoder=decoder)
    assert (run.env_steps, run.updates) == (16 * 9 + 2 * 100, 9 + 2 * 12)
    assert planned == [run.progress] == [16 * 9 + 2 * (100 + 12)]
    assert agent.counters["env_steps"] == run.env_steps
    assert (agent.counters["stage"], agent.counters["updates"]) == (2, 9)
    assert float(agent.obs_norm.count) == 16 * 3  # of the last encoder alone


def test_resumed_anywhere_equals_never_stopped(tmp_path: Path) -> None:
    """Within each kind of phase, and at every boundary between two."""
    ends = [48, 148, 160, 308]  # of encoder, rollouts, refit; of the second rollouts
    assert_resumes_anywhere(small_run, tmp_path, (16, 90, *ends, 154, 176, 352))


def test_a_run_cannot_be_made_longer(tmp_path: Path) -> None:
    run = StopAt(tmp_path / "run", RunConfig(tensorboard=False))
    run.stop_at = 160
    with pytest.raises(Interrupted):
        small_run(run)
    run.close()
    again = Run(tmp_path / "run", RunConfig(tensorboard=False), resume=True)
    with pytest.raises(UsageError, match="begun with 144 steps"):
        small_run(again, steps=16 * 12)
    again.close()


def test_a_batch_without_codes_is_refused() -> None:
    agent = gorl()
    with pytest.raises(KeyError, match="code"):
        agent.update(batch_for(agent)._replace(extra={}))
