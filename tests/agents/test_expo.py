"""EXPO: the on-the-fly policy, its backup by a slow reference, beta = 0, who learns from what, the edit's optimum."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from agent_helpers import (
    ACT_DIM,
    OBS_DIM,
    batch_for,
    differing,
    recorded_inputs,
    snapshot,
    tiny,
    transitions,
    xavier_uniform,
)
from torch import Tensor, nn

from rlctl import agents, experiment
from rlctl.agents.expo import EXPO, EXPOConfig
from rlctl.nets import BestOfN, Edited, GaussianPolicy, Policy
from rlctl.ops import adam, minimize
from rlctl.types import Batch, Spec

both_bases = pytest.mark.parametrize("base", ["diffusion", "flow"])


def expo(**overrides: Any) -> EXPO:
    agent = tiny("expo", **overrides)
    assert isinstance(agent, EXPO)
    return agent


class Near(nn.Module):
    """Three critics -|a - c_j|^2, c_j = c - 0.1, c - 0.1, c + 0.2, whatever the observation; without parameters.

    Their mean is largest at c, the smallest of them at c + 0.05.
    """

    def __init__(self, *c: float) -> None:
        super().__init__()
        self.c = torch.tensor(c)

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([-(action - self.c - off).square().sum(-1) for off in (-0.1, -0.1, 0.2)])


# --------------------------------------------------------------------------------------------------- on-the-fly policy
@both_bases
def test_the_action_is_the_best_of_the_slow_bases_draws_and_their_edits(base: str) -> None:
    agent, obs = expo(base=base, num_actions=5, num_edits=2), torch.randn(6, OBS_DIM)
    for seed in range(2):
        agent.update(batch_for(agent, seed))  # base and slow base part
    g = agent.rng["action"].clone_state()
    with torch.no_grad():
        action, _ = agent.act(obs, explore=True)
        draws = agent.base_slow.sample(obs, 5, generator=g)
        edits, _ = Edited(agent.base_slow, agent.edit, 0.3).edited(obs, draws[:, :2], generator=g)
        candidates = torch.cat([draws, edits], -2)
        value = agent.q_lagged(obs, candidates)[torch.randperm(3, generator=g)[:2]].amin(0)
        assert torch.equal(action, candidates[torch.arange(6), value.argmax(-1)])
        assert float((edits - draws[:, :2]).abs().max()) <= 0.3 + 1e-6
        assert not torch.equal(draws, agent.base.sample(obs, 5, generator=agent.rng["action"].clone_state()))


@both_bases
def test_the_backup_against_a_slow_reference(double: None, base: str) -> None:
    """Sample by sample: choose by one pair of critics, value by another; nothing beyond a termination."""
    agent = expo(base=base, gamma=0.9)
    for p in agent.q_lagged.parameters():
        p.data.mul_(2.0)  # lagged critics that differ from the critics
    for _ in range(4):  # other draws of the pairs, too
        batch = batch_for(agent)
        g = agent.rng["sample"].clone_state()
        backup = agent.backup_of(batch)
        with torch.no_grad():
            draws = agent.base.sample(batch.next_obs, 3, generator=g)
            edits, _ = Edited(agent.base, agent.edit, 0.3).edited(batch.next_obs, draws[:, :2], generator=g)
            candidates = torch.cat([draws, edits], -2)
            choose, value = (torch.randperm(3, generator=g)[:2].tolist() for _ in range(2))
            for i in range(len(backup)):
                q = [[float(m) for m in agent.q_lagged(batch.next_obs[i], a)] for a in candidates[i]]
                best = max(range(5), key=lambda n: min(q[n][j] for j in choose))
                v = min(q[best][j] for j in value) * (not bool(batch.terminated[i]))
                assert float(backup[i]) == pytest.approx(float(batch.reward[i]) + 0.9 * v, abs=1e-10)
    first, second = (expo(base=base, gamma=0.9) for _ in range(2))
    assert torch.equal(first.backup_of(batch), second.backup_of(batch._replace(truncated=~batch.truncated)))


@both_bases
@pytest.mark.parametrize("off", [{"beta": 0.0}, {"num_edits": 0}])
def test_without_edits_it_is_the_best_of_n(base: str, off: dict[str, Any]) -> None:
    """Exactly, for acting and in the backup, and edit policy and temperature stand still."""
    agent = expo(base=base, num_actions=5, backup_critics=3, **off)
    edit = snapshot(agent.edit)
    for seed in range(4):
        agent.update(batch_for(agent, seed))
    assert differing(agent.edit, edit) == []
    assert float(agent.log_alpha.detach()) == 0.0
    assert "opt_edit" not in agent.optimizers()
    batch = batch_for(agent)
    for policy, obs, stream in ((agent.base_slow, batch.obs, "action"), (agent.base, batch.next_obs, "sample")):
        best = BestOfN(policy, lambda s, a: agent.q_lagged(s, a).amin(0), 5)
        chosen = best.sample(obs, generator=agent.rng[stream].clone_state())
        if stream == "action":
            assert torch.equal(agent.act(obs, explore=True)[0], chosen)
        else:
            value = agent.q_lagged(obs, chosen).amin(0)
            expected = batch.reward + agent.cfg.gamma * value * ~batch.terminated
            torch.testing.assert_close(agent.backup_of(batch), expected, rtol=1e-6, atol=1e-6)
    best.bank, best.policy = agent.bank, agent.base_slow
    assert torch.equal(agent.act(batch.obs, explore=False)[0], best.mode(batch.obs))


def test_a_tiny_beta_chooses_as_the_best_of_n_does() -> None:
    """Continuity: edits of 1e-6 move the action by no more than that."""
    obs = torch.randn(6, OBS_DIM)
    small, none = expo(beta=1e-6, num_actions=4, num_edits=4), expo(beta=0.0, num_actions=4)
    small.bank[:, :-1].copy_(none.bank)
    a, b = (agent.act(obs, explore=False)[0] for agent in (small, none))
    torch.testing.assert_close(a, b, rtol=0, atol=2e-6)


# ---------------------------------------------------------------------------------------------------- who learns what
def reached(loss: Tensor, module: nn.Module | list[Tensor]) -> bool:
    params = [p for p in (module.parameters() if isinstance(module, nn.Module) else module) if p.requires_grad]
    if not params:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True))


@pytest.mark.parametrize("edit_of", ["data", "base"])
def test_who_receives_a_gradient(edit_of: str) -> None:
    agent = expo(edit_of=edit_of)
    batch = batch_for(agent)
    edit_loss, logp = agent.edit_loss(batch)
    nets = {"base": agent.base, "edit": agent.edit, "q": agent.q, "alpha": [agent.log_alpha]}
    for loss, wanted in (
        (agent.critic_loss(batch), {"q"}),
        (agent.base_loss(batch), {"base"}),  # imitation alone: no value reaches it
        (edit_loss, {"edit", "q"}),  # through the critics, which `minimize` leaves alone
        (agent.alpha_loss(logp), {"alpha"}),
    ):
        assert {name for name, net in nets.items() if reached(loss, net)} == wanted  # type: ignore[arg-type]
    before = snapshot(agent)
    minimize(edit_loss, agent.opt_edit)
    assert {k.split(".")[0] for k in differing(agent, before)} == {"edit"}
    assert not any(p.requires_grad for net in (agent.q_lagged, agent.base_slow) for p in net.parameters())


def test_the_base_does_not_know_of_rewards() -> None:
    """Whatever is rewarded, the same base is learned."""
    results = []
    for scale in (1.0, -7.0):
        agent = expo(num_edits=0)
        for seed in range(4):
            batch = batch_for(agent, seed)
            agent.update(batch._replace(reward=scale * batch.reward))
        results.append(snapshot(agent.base))
    assert all(torch.equal(v, results[1][k]) for k, v in results[0].items())


def test_critics_at_every_update_the_rest_at_every_third() -> None:
    agent = expo(policy_every=3, tau=0.1, base_tau=0.2)
    for k in range(1, 7):
        before = snapshot(agent)
        metrics = agent.update(batch_for(agent, k))
        moved = {name.split(".")[0] for name in differing(agent, before)}
        rest = {"base", "base_slow", "edit", "log_alpha"}
        assert moved == {"q", "q_lagged"} | (rest if k % 3 == 0 else set())
        assert ("losses/base" in metrics) == (k % 3 == 0)
        now = agent.state_dict()
        for name, v in now.items():
            for slow, fast, tau in (("q_lagged", "q", 0.1), ("base_slow", "base", 0.2 if k % 3 == 0 else 0.0)):
                if name.startswith(slow + "."):
                    source = now[name.replace(slow, fast, 1)]
                    torch.testing.assert_close(v, before[name] + tau * (source - before[name]))


def test_pretraining_moves_the_base_alone() -> None:
    agent = expo()
    before = snapshot(agent)
    metrics = agent.pretrain(batch_for(agent))
    assert {k.split(".")[0] for k in differing(agent, before)} == {"base", "base_slow"}
    assert metrics.keys() == {"losses/base"}


# ------------------------------------------------------------------------------------------------- edits, temperature
def test_the_edit_policy_starts_xavier_uniform() -> None:
    assert xavier_uniform(expo(hidden=(64, 64)).edit)


@pytest.mark.parametrize("edit_of", ["data", "base"])
def test_the_edit_s_loss_by_its_parts(double: None, edit_of: str) -> None:
    """alpha log pi minus the mean over critics; edited are the data's actions, or the draws of the base that learns."""
    agent = expo(edit_of=edit_of, policy_every=1, alpha=0.3, base_lr=1e-2)
    for seed in range(2):
        agent.update(batch_for(agent, seed))  # base and slow base, and the critics, part
    b, g = batch_for(agent, 2), agent.rng["sample"].clone_state()
    slow = agent.base_slow.sample(b.obs, generator=g.clone_state())
    start = b.action if edit_of == "data" else agent.base.sample(b.obs, generator=g)
    assert not torch.allclose(start, slow)
    action, logp = Edited(agent.base, agent.edit, agent.cfg.beta).edited(b.obs, start, generator=g)
    loss, ours = agent.edit_loss(b)
    torch.testing.assert_close(ours, logp)
    torch.testing.assert_close(loss, (agent.log_alpha.exp() * logp - agent.q(b.obs, action).mean(0)).mean())


@pytest.mark.parametrize("edits", [0, 2])
def test_an_unbounded_base_acts_in_the_box(edits: int) -> None:
    """Candidates are valued, and stored, as what the environment would make of them."""

    class Wide(EXPO):
        def make_base(self) -> Policy:  # type: ignore[override]
            return GaussianPolicy(OBS_DIM, ACT_DIM, (8,), log_std=1.0)

    agent = agents.make(Wide, Spec(OBS_DIM, ACT_DIM), expo(num_edits=edits).cfg)
    assert isinstance(agent, EXPO)
    b = batch_for(agent)
    agent.update(b)
    assert float(agent.base.sample(b.obs, generator=torch.Generator().manual_seed(0)).detach().abs().max()) > 2
    valued = recorded_inputs(agent.q_lagged)
    agent.backup_of(b)
    for explore in (True, False):
        agent.act(b.obs, explore)
    actions = [args[1] for args in valued]
    assert {len(a.shape) for a in actions} == {2, 3}
    assert max(float(a.abs().max()) for a in actions) == 1


def at_zero(n: int = 64, **changes: Any) -> Batch:
    b = transitions(torch.Generator().manual_seed(0), n)
    return b._replace(obs=torch.zeros_like(b.obs), **changes)


@pytest.mark.parametrize(("start", "expected"), [(0.0, 0.2), (0.35, 0.5), (0.9, 0.7)])
def test_the_edit_goes_to_the_best_action_as_far_as_it_reaches(start: float, expected: float) -> None:
    """Q = -(a - 0.5)^2, hardly any entropy: clip(a_b + 0.2 sign(c - a_b)), or c itself within 0.2."""
    agent = expo(beta=0.2, alpha=1e-6, hidden=(16,))
    agent.q = Near(0.5, 0.5)  # type: ignore[assignment]
    batch = at_zero(action=torch.full((64, ACT_DIM), start))
    opt = adam(agent.edit.parameters(), 2e-2)
    for _ in range(300):
        minimize(agent.edit_loss(batch)[0], opt)
    edited, _ = Edited(agent.base, agent.edit, 0.2).edited(batch.obs, batch.action, noise=torch.zeros(64, ACT_DIM))
    assert edited.mean(0).tolist() == pytest.approx([expected] * ACT_DIM, abs=0.015)


def test_the_temperature_holds_the_entropy_at_its_target() -> None:
    """Against a Q that would have one action alone."""
    agent = expo(beta=0.2, hidden=(16,), alpha_lr=3e-2)
    assert agent.target_entropy == pytest.approx(ACT_DIM * (math.log(0.2) - 0.5))
    agent.q = Near(0.05, -0.05)  # type: ignore[assignment]
    opt, entropy = adam(agent.edit.parameters(), 1e-2), []
    batch = at_zero(256, action=torch.full((256, ACT_DIM), 0.02))
    batch.obs.fill_(1.0)  # of an input of zeros, under biases of zero, a ReLU network learns the last biases alone
    for _ in range(800):
        loss, logp = agent.edit_loss(batch)
        minimize(loss, opt)
        minimize(agent.alpha_loss(logp), agent.opt_alpha)
        entropy.append(-float(logp.mean()))
    assert sum(entropy[-100:]) / 100 == pytest.approx(agent.target_entropy, abs=0.1)
    assert 1e-4 < float(agent.log_alpha.detach().exp()) < 0.1


@pytest.mark.parametrize(("offset", "sign"), [(20.0, 1), (-20.0, -1)])
def test_alpha_rises_below_the_target_entropy_and_falls_above_it(offset: float, sign: int) -> None:
    agent = expo(alpha=0.5, alpha_lr=1e-2, policy_every=1)
    agent.target_entropy += offset
    before = float(agent.log_alpha.detach())
    metrics = agent.update(batch_for(agent))
    assert sign * (float(agent.log_alpha.detach()) - before) == pytest.approx(1e-2, rel=1e-3)  # Adam's first step
    assert sign * (agent.target_entropy - float(metrics["policy/edit_entropy"])) > 0


MODES = torch.tensor([[0.7, 0.7], [0.7, -0.7], [-0.7, 0.7], [-0.7, -0.7]])


@pytest.mark.slow
@both_bases
def test_four_modes(base: str) -> None:
    """All by `update`: the base covers all four modes of its data, the critics learn which is rewarded, and the
    on-the-fly policy is there more than 9 times in 10."""
    cfg = EXPOConfig(
        base=base,  # type: ignore[arg-type]
        base_net="mlp",
        base_hidden=(64, 64),
        base_steps=10,
        base_lr=3e-3,
        base_tau=0.05,
        hidden=(32, 32),
        num_critics=3,
        critic_lr=2e-3,
        tau=0.05,
        policy_every=1,
        num_actions=16,
        num_edits=8,
        beta=0.05,
    )
    agent = agents.make("expo", Spec(1, 2, seed=0), cfg)
    assert isinstance(agent, EXPO)
    g = torch.Generator().manual_seed(0)
    obs, end = torch.zeros(128, 1), torch.ones(128, dtype=torch.bool)
    for _ in range(700):
        mode = torch.randint(4, (128,), generator=g)
        action = (MODES[mode] + 0.05 * torch.randn(128, 2, generator=g)).clamp(-1, 1)
        agent.update(Batch(obs, action, (mode == 1).float(), obs, end, ~end))
    obs = torch.zeros(1000, 1)

    def shares(a: Tensor) -> Tensor:
        return (a[:, None] - MODES).norm(dim=-1).argmin(-1).bincount(minlength=4) / len(a)

    with torch.no_grad():
        draws = agent.base_slow.sample(obs, generator=g)
        plain = shares(draws)
        assert 0.15 < float(plain.min()) <= float(plain.max()) < 0.35
        if base == "flow":  # the noise of a diffusion's few steps leaves some between the modes
            assert float((draws.abs() > 0.35).all(-1).float().mean()) > 0.8
        assert float(shares(agent.act(obs, explore=True)[0])[1]) > 0.9
        assert float(shares(agent.act(obs, explore=False)[0])[1]) > 0.9


def test_settings_that_cannot_be() -> None:
    with pytest.raises(ValueError, match="residual blocks are of one width"):
        expo(base_net="resnet", base_hidden=(16, 32))
    with pytest.raises(ValueError, match="1 to 2 critics"):
        expo(num_critics=2, backup_critics=3)
    assert expo(base_net="resnet", base_hidden=(16, 16)).act(torch.zeros(2, OBS_DIM), True)[0].shape == (2, ACT_DIM)


@pytest.mark.slow
def test_pendulum_as_well_as_sac(tmp_path: Path) -> None:
    """4,000 steps with small networks: random actions get -1200 or so, a policy that swings up and stays there -150."""
    small: dict[str, Any] = {"steps": 4000, "learning_starts": 500, "hidden": [64, 64]}
    small |= dict.fromkeys(("actor_lr", "critic_lr", "alpha_lr"), 1e-3)
    ours = small | {"base": "flow", "base_net": "mlp", "base_hidden": [64, 64], "base_steps": 4, "base_lr": 1e-3}
    ours |= {"base_tau": 0.01, "num_actions": 4, "num_edits": 4, "beta": 0.3, "num_critics": 2, "batch_size": 128}
    ours |= {"updates_per_step": 2.0, "policy_every": 2}
    returns = {}
    for name, agent in (("sac", small), ("expo", ours)):
        run = {"evaluations": 1, "eval_episodes": 1, "final_episodes": 20, "tensorboard": False, "threads": 1}
        settings = experiment.resolve(name, [{"env": "Pendulum-v1", "seed": 0, "agent": agent, "run": run}])
        _, result = experiment.train(settings, tmp_path / name, quiet=True)
        assert result is not None
        returns[name] = result.mean
    assert returns["expo"] > max(-400.0, returns["sac"] - 150.0), returns
