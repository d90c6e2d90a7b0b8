"""DPPO: denoising steps as decisions, the clip along the chain, cloned policies fine-tuned with a frozen beginning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import ACT_DIM, OBS_DIM, as_dataset, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor

from rlctl import agents
from rlctl.agents.actor_critic import Rows
from rlctl.agents.diffusion_bc import DiffusionBC, DiffusionBCConfig
from rlctl.agents.dppo import DPPO, DPPOConfig, all_pairs, clip_schedule, links
from rlctl.errors import UsageError
from rlctl.nets import FlowPolicy, GenerativePolicy
from rlctl.types import Batch, Spec

SMALL: dict[str, Any] = {"num_envs": 4, "horizon": 16, "critic_hidden": (16,), "epochs": 1}


def cloned(**overrides: Any) -> DiffusionBC:
    """A diffusion-bc agent of 5 levels that has learned a little of some data."""
    settings: dict[str, Any] = {"hidden": (16,), "diffusion_steps": 5}
    cfg = DiffusionBCConfig(**(settings | overrides))
    agent = agents.make(DiffusionBC, Spec(OBS_DIM, ACT_DIM), cfg)
    assert isinstance(agent, DiffusionBC)
    rows = transitions(torch.Generator().manual_seed(5), 300)
    agent.prepare(as_dataset(rows))
    for _ in range(20):
        agent.update(rows)
    return agent


class FineTuned(DPPO):
    """Fine-tunes an agent that is at hand instead of one from a run directory."""

    given: DiffusionBC

    def pretrained_agent(self) -> DiffusionBC:
        return self.given


class Flowing(DPPO):
    """The same with a flow whose steps add noise."""

    def make_policy(self, s: DiffusionBCConfig) -> GenerativePolicy:
        return FlowPolicy(self.spec.obs_dim, self.spec.act_dim, (16,), steps=4, noise_std=0.2)


def dppo(**overrides: Any) -> DPPO:
    agent = tiny("dppo", **overrides)
    assert isinstance(agent, DPPO)
    return agent


def fine_tuned(source: DiffusionBC, cls: type[DPPO] = FineTuned, **overrides: Any) -> DPPO:
    FineTuned.given = source
    cfg = DPPOConfig(**SMALL | {"minibatch_size": 64} | overrides)
    agent = agents.make(cls, Spec(OBS_DIM, ACT_DIM, 4), cfg)
    assert isinstance(agent, DPPO)
    return agent


def flowing() -> DPPO:
    agent = agents.make(Flowing, Spec(OBS_DIM, ACT_DIM, 4), DPPOConfig(**SMALL, minibatch_size=64))
    assert isinstance(agent, DPPO)
    return agent


# ------------------------------------------------------------------------------------------------------------- numbers
def test_clip_schedule_by_number() -> None:
    assert clip_schedule(0.001, 0.01, 3) == pytest.approx([0.001, 0.002642, 0.01], abs=5e-7)
    assert clip_schedule(0.001, 0.01, 1) == pytest.approx([0.01])
    assert clip_schedule(0.1, 0.1, 4) == pytest.approx([0.1] * 4)


def test_policy_loss_by_hand(double: None) -> None:
    """Of three steps: discounts 1/4, 1/2, 1; each clipped by its own epsilon 0.001, 0.002642, 0.01."""
    agent = dppo(gamma_denoising=0.5, clip_base=0.001, clip=0.01, normalize_advantage=False)
    rows = agent.prepare_rollout(batch_for(agent))
    m = links(rows, all_pairs(rows))
    assert m.step[:4].tolist() == [0, 1, 2, 0]
    ratio = 1.005
    m = m._replace(logp_old=m.logp_old - torch.tensor(ratio).log(), adv=torch.ones_like(m.adv))
    known = -(0.25 * 1.001 + 0.5 * 1.0026418 + ratio) / 3
    assert float(agent.policy_loss(m).detach()) == pytest.approx(known, abs=1e-6)
    m = m._replace(adv=-m.adv)  # the other bound is not met
    assert float(agent.policy_loss(m).detach()) == pytest.approx(ratio * 1.75 / 3, abs=1e-12)


def test_advantages_are_standardised_before_the_denoising_discount(double: None) -> None:
    """At ratio 1: adv 1..6 has mean 3.5 and std sqrt(3.5); of two rows the steps count 1/4, 1/2, 1."""
    agent = dppo(gamma_denoising=0.5, normalize_advantage=True)
    b = batch_for(agent).map(lambda x: x.double() if x.is_floating_point() else x)
    rows = agent.prepare_rollout(b)
    m = links(rows, all_pairs(rows))
    m = type(m)._make(x[:6] for x in m)._replace(adv=torch.arange(1.0, 7.0))
    assert m.step.tolist() == [0, 1, 2, 0, 1, 2]
    discounted = [-2.5 / 4, -1.5 / 2, -0.5, 0.5 / 4, 1.5 / 2, 2.5]
    assert float(agent.policy_loss(m).detach()) == pytest.approx(-sum(discounted) / 6 / 3.5**0.5, abs=1e-7)


def test_log_densities_are_bounded_means_over_dimensions(double: None) -> None:
    agent = dppo(min_std=0.1)
    obs = torch.randn(5, OBS_DIM)
    before = torch.randn(5, ACT_DIM)
    step = agent.pi.transition(obs, before, 2)
    # 0 std from the mean in one dimension, 1 std in the other: log N = -log 0.1 - log(2 pi) / 2 [- 1/2]
    after = step.mean + torch.tensor([0.0, 0.1])
    peak = 2.302585093 - 0.918938533
    logp = agent.steps_at(obs).step_log_prob(before, after, torch.full((5,), 2))
    assert logp.tolist() == pytest.approx([peak - 0.25] * 5, abs=1e-8)
    far = agent.steps_at(obs).step_log_prob(before, step.mean + torch.tensor([0.0, 9.0]), 2)
    assert far.tolist() == pytest.approx([(peak - 5) / 2] * 5, abs=1e-8)


def test_one_step_is_ppo_with_a_fixed_spread(double: None) -> None:
    """K = K' = 1: the loss is PPO's for N(mean(s, x_1), min_std), with mean log-densities."""
    agent = dppo(diffusion_steps=1, min_std=0.3, clip=0.2)
    b = batch_for(agent)
    rows = agent.prepare_rollout(b)
    with torch.no_grad():
        for p in agent.pi.parameters():
            p += 0.05 * torch.randn(p.shape)
    m = links(rows, all_pairs(rows))
    assert torch.equal(m.after, b.action.flatten(0, 1))
    mean = agent.pi.transition(m.obs, m.before, 0).mean
    logp = -((m.after - mean) / 0.3).square() / 2 - torch.tensor(0.3).log() - 0.918938533204673
    ratio = (logp.clamp(-5, 2).mean(-1) - m.logp_old).exp()
    adv = (m.adv - m.adv.mean()) / (m.adv.std() + 1e-8)
    ppo = -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv).mean()
    assert float((ratio - 1).detach().abs().max()) > 0.2
    torch.testing.assert_close(agent.policy_loss(m), ppo)


# -------------------------------------------------------------------------------------------------------------- chains
@pytest.mark.parametrize("kind", ["scratch", "skipping levels", "fine-tuned", "flow"])
def test_the_first_ratio_is_one_for_every_step(double: None, kind: str) -> None:
    made = {
        "scratch": lambda: dppo(),
        "skipping levels": lambda: dppo(diffusion_steps=8, sampling_steps=4),
        "fine-tuned": lambda: fine_tuned(cloned(), finetune_steps=2),
        "flow": flowing,
    }
    agent = made[kind]()
    b = batch_for(agent)
    b = b.map(lambda x: x.double() if x.is_floating_point() else x)
    rows = agent.prepare_rollout(b)
    steps = agent.pi.num_steps - agent.first
    assert b.extra["chain"].shape == (16, 4, steps + 1, ACT_DIM)
    assert torch.equal(b.extra["chain"][..., -1, :], b.action)
    m = links(rows, all_pairs(rows))
    assert len(m.adv) == 64 * steps
    logp = agent.steps_at(m.obs).step_log_prob(m.before, m.after, agent.first + m.step)
    torch.testing.assert_close((logp - m.logp_old).exp(), torch.ones_like(logp), rtol=0, atol=1e-10)
    vanilla = -(agent.discount[m.step] * (m.adv - m.adv.mean()) / (m.adv.std() + 1e-8) * logp).mean()
    params = list(agent.pi.parameters())
    for a, e in zip(
        torch.autograd.grad(agent.policy_loss(m), params), torch.autograd.grad(vanilla, params), strict=True
    ):
        torch.testing.assert_close(a, e, rtol=1e-8, atol=1e-12)


def test_the_first_minibatch_of_an_update_sees_what_acting_saw() -> None:
    """Statistics of observations move after the update, so that its first ratio is that of the acting policy, 1."""
    agent = dppo(minibatch_size=64 * 3, epochs=1)
    agent.update(batch_for(agent, 1))
    b = batch_for(agent)
    with torch.no_grad():
        chain = b.extra["chain"].flatten(0, 1)
        acting = agent.steps_at(agent.obs_norm(b.obs.flatten(0, 1))[:, None]).log_prob(chain)
    statistics, seen = snapshot(agent.obs_norm), []
    loss = agent.policy_loss
    agent.policy_loss = lambda m: seen.append((m, loss(m))) or seen[-1][1]  # type: ignore[method-assign, func-returns-value]
    agent.update(b)
    m = seen[0][0]
    torch.testing.assert_close(m.logp_old.sort().values, acting.flatten().sort().values, rtol=1e-4, atol=1e-5)
    assert differing(agent.obs_norm, statistics)


def test_only_the_last_step_counts_at_denoising_discount_0() -> None:
    agent = dppo(gamma_denoising=0.0, normalize_advantage=False)
    rows = agent.prepare_rollout(batch_for(agent))
    m = links(rows, all_pairs(rows))
    for step, counts in ((0, False), (1, False), (2, True)):
        part = type(m)._make(x[m.step == step] for x in m)
        grads = torch.autograd.grad(agent.policy_loss(part), list(agent.pi.parameters()))
        assert any(bool(g.any()) for g in grads) == counts


def test_noise_is_cut_and_has_a_floor() -> None:
    agent = dppo(min_std=0.25, noise_clip=1.5)
    obs = torch.randn(500, OBS_DIM)
    chain = agent.act(obs, explore=True)[1]["chain"]
    assert float(agent.pi.std.min()) == 0.25
    k = torch.arange(3)
    z = (chain[:, 1:] - agent.pi.transition(obs, chain[:, :-1], k).mean) / agent.pi.std[:, None]
    assert float(z.detach().abs().max()) == pytest.approx(1.5, abs=1e-4)
    assert float(chain[:, 0].detach().abs().max()) > 1.5  # x_K is drawn whole


@pytest.mark.parametrize("num", [1, 2, 5])
def test_the_deterministic_action_is_the_mean_of_fixed_draws(num: int) -> None:
    agent = dppo(mode_draws=num, diffusion_steps=4)
    obs = torch.randn(6, OBS_DIM)
    assert agent.bank.shape == (num, 5, ACT_DIM)
    torch.testing.assert_close(agent.bank.sum(0), torch.zeros(5, ACT_DIM), rtol=0, atol=1e-6)
    assert not agent.bank[:, -1].any()
    assert bool(agent.bank.any()) == (num > 1)
    ends = [agent.denoised(agent.obs_norm(obs), z.expand(6, *z.shape))[:, -1].clamp(-1, 1) for z in agent.bank]
    action, _ = agent.act(obs, explore=False)
    torch.testing.assert_close(action, torch.stack(ends).mean(0))
    assert torch.equal(action, agent.act(obs, explore=False)[0])


def test_every_pair_is_one_denoising_step_of_one_transition() -> None:
    rows = Rows(*[torch.zeros(0)] * 2, torch.zeros(3, 2), *[torch.zeros(3)] * 3)
    pairs = all_pairs(rows)
    assert list(zip(pairs.row.tolist(), pairs.step.tolist(), strict=True)) == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1)]  # fmt: skip


# --------------------------------------------------------------------------------------------------------- fine-tuning
def test_a_cloned_policy_is_the_start_and_its_beginning_stays() -> None:
    source = cloned()
    agent = fine_tuned(source, finetune_steps=2, actor_lr=1e-2)
    assert agent.first == 3
    assert agent.base is not None
    assert differing(agent.pi, snapshot(source.pi.slow)) == []
    assert torch.equal(agent.obs_norm.mean, source.obs_norm.mean)
    obs = torch.randn(6, OBS_DIM)
    with agent.borrowed_rng(0):
        before = agent.act(obs, explore=True)[1]["chain"]
    frozen, statistics = snapshot(agent.base), snapshot(agent.obs_norm)
    for seed in range(3):
        agent.update(batch_for(agent, seed))
    assert differing(agent.base, frozen) == []
    assert differing(agent.obs_norm, statistics) == []
    assert differing(agent.pi, frozen)
    with agent.borrowed_rng(0):
        after = agent.act(obs, explore=True)[1]["chain"]
    assert torch.equal(before[:, 0], after[:, 0])  # what the first three steps make of the noise
    moved = (before[:, 1:] != after[:, 1:]).any(-1).any(0)  # a clipped action may stay where it was
    assert moved.all()


def test_an_exported_draw_begins_with_the_frozen_steps() -> None:
    agent = fine_tuned(cloned(), finetune_steps=2, actor_lr=1e-2, noise_clip=1.0)
    agent.update(batch_for(agent))
    obs = torch.randn(6, OBS_DIM)
    with agent.borrowed_rng(0), torch.no_grad():
        noise = agent.pi.draw_noise(obs, generator=agent.rng["action"])
    with agent.borrowed_rng(0), torch.no_grad():
        action = agent.act(obs, explore=True)[0]
        assert torch.equal(agent.exportable(sampled=True).module(obs, noise), action)


def test_untrained_it_acts_like_the_cloned_policy_but_for_the_floor() -> None:
    """Whatever the number of steps that may move; the floor alone is small enough here to be none."""
    source, obs = cloned(), torch.randn(6, OBS_DIM)
    seen = source.obs_norm(obs)
    for steps in (1, 3, 5):
        agent = fine_tuned(source, finetune_steps=steps, min_std=1e-6, noise_clip=100.0)
        g = torch.Generator().manual_seed(0)
        noise = source.pi.slow.draw_noise(seen, generator=g)  # type: ignore[operator]
        chain = agent.denoised(seen, noise)
        torch.testing.assert_close(chain[:, -1].clamp(-1, 1), source.pi.sample(seen, noise=noise), rtol=0, atol=1e-4)


def test_fine_tuning_turns_a_clone_of_four_modes_to_the_rewarded_one() -> None:
    modes = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]]) * 0.8
    source = agents.make(DiffusionBC, Spec(OBS_DIM, 2), DiffusionBCConfig(hidden=(64, 64), actor_lr=3e-3))
    assert isinstance(source, DiffusionBC)
    source.obs_norm.fit(torch.randn(100, OBS_DIM))
    g = torch.Generator().manual_seed(0)
    rows = transitions(g, 256, act_dim=2)
    for _ in range(1200):
        action = modes[torch.randint(4, (256,), generator=g)] + 0.05 * torch.randn(256, 2, generator=g)
        source.update(rows._replace(obs=torch.zeros(256, OBS_DIM), action=action))
    size = {"num_envs": 64, "horizon": 8, "minibatch_size": 512, "epochs": 4, "normalize_reward": False}
    FineTuned.given = source
    agent = FineTuned(Spec(OBS_DIM, 2, num_envs=64), DPPOConfig(**SMALL | size | {"actor_lr": 1e-3}))

    def act(obs: Tensor) -> tuple[Tensor, dict[str, Tensor], Tensor]:
        with torch.no_grad():
            action, extra = agent.act(obs, explore=True)
        return action, extra, (action.unsqueeze(-2) - modes).norm(dim=-1).argmin(-1)

    obs, no = torch.zeros(8, 64, OBS_DIM), torch.zeros(8, 64, dtype=torch.bool)
    share = act(torch.zeros(2000, OBS_DIM))[2].bincount(minlength=4) / 2000
    assert 0.1 < float(share.min()) <= float(share.max()) < 0.45
    for _ in range(40):
        action, extra, mode = act(obs)
        agent.update(Batch(obs, action, (mode == 1).float(), obs, ~no, no, extra))
    assert float((act(torch.zeros(2000, OBS_DIM))[2] == 1).float().mean()) > 0.9
    deterministic, _ = agent.act(torch.zeros(1, OBS_DIM), explore=False)
    assert int((deterministic - modes).norm(dim=-1).argmin()) == 1


def test_the_value_network_can_learn_alone_first() -> None:
    agent = dppo(critic_warmup=2)
    before = snapshot(agent)
    for seed in range(2):
        assert "losses/policy" not in agent.update(batch_for(agent, seed))
    changed = differing(agent, before)
    assert any(k.startswith("v.") for k in changed)
    assert not any(k.startswith("pi.") for k in changed)
    assert "losses/policy" in agent.update(batch_for(agent, 2))
    assert any(k.startswith("pi.") for k in differing(agent, before))


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"untrained network: name .*pretrained=RUN_DIR"):
        dppo(finetune_steps=2)
    with pytest.raises(ValueError, match="finetune_steps=4, but the policy has 3"):
        dppo(finetune_steps=4)
    with pytest.raises(ValueError, match="does not divide a rollout of 192 denoising steps"):
        dppo(minibatch_size=100)
    with pytest.raises(UsageError, match=r"diffusion_steps=7, but the policy of .* has 5: leave it out"):
        fine_tuned(cloned(), diffusion_steps=7)
    with pytest.raises(UsageError, match=r"no run in .*none, of the policy"):
        dppo(pretrained=str(tmp_path / "none"))

    class Silent(DPPO):
        def make_policy(self, s: DiffusionBCConfig) -> GenerativePolicy:
            return FlowPolicy(OBS_DIM, ACT_DIM, (16,))

    with pytest.raises(TypeError, match="DPPO needs a policy with chain_log_prob"):
        agents.make(Silent, Spec(OBS_DIM, ACT_DIM, 4), DPPOConfig(**SMALL, minibatch_size=64))
