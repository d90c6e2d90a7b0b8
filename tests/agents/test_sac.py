"""SAC: backup and losses by hand, who receives gradients, the direction of the temperature, a known soft optimum."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.sac import SAC
from rlctl.nets import distributions
from rlctl.ops import adam, minimize
from rlctl.types import Batch

GAMMA = 0.9


def sac(**overrides: Any) -> SAC:
    agent = tiny("sac", **overrides)
    assert isinstance(agent, SAC)
    return agent


@dataclass
class Draw:
    """A distribution that always gives one action and one log-probability."""

    action: Tensor
    logp: Tensor

    def sample_log_prob(self, noise: Tensor | None = None, generator: Any = None) -> tuple[Tensor, Tensor]:
        return self.action, self.logp


class Fixed(nn.Module):
    """A policy that gives one `Draw` everywhere."""

    def __init__(self, draw: Draw) -> None:
        super().__init__()
        self.draw = draw

    def forward(self, obs: Tensor) -> Draw:
        return self.draw


def three(terminated: list[bool], truncated: list[bool]) -> Batch:
    b = transitions(torch.Generator().manual_seed(0), 3)
    return b._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]), terminated=torch.tensor(terminated), truncated=torch.tensor(truncated)
    )


def test_backup_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) (min_j Q_lagged_j - 0.5 log pi): [3.25, 2, 2.82]; a truncation changes nothing."""
    agent = sac(gamma=GAMMA, alpha=0.5)
    batch = three([False, True, False], [True, False, False])
    next_action = torch.full((3, 2), 0.3)
    agent.pi = Fixed(Draw(next_action, torch.tensor([-1.0, 2.0, 0.4])))  # type: ignore[assignment]
    agent.q_lagged = lagged = Table(torch.tensor([[2.0, 5.0, 1.0], [3.0, 4.0, 0.0]]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = online = Table(values)  # type: ignore[assignment]
    loss = agent.critic_loss(batch)
    y = torch.tensor([1 + GAMMA * (2 + 0.5), 2.0, 3 + GAMMA * (0 - 0.2)])
    assert y.tolist() == pytest.approx([3.25, 2.0, 2.82], abs=1e-12)
    expected = (values.detach() - y).square().mean(1).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-12)
    (g,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(g, 2 * (values.detach() - y) / 3)
    assert torch.equal(lagged.seen[0][0], batch.next_obs)
    assert torch.equal(lagged.seen[0][1], next_action)
    assert torch.equal(online.seen[0][0], batch.obs)
    assert torch.equal(online.seen[0][1], batch.action)


def test_actor_loss_by_hand(double: None) -> None:
    """E[alpha log pi - min_j Q_j]: values [2, 4], [3, 1], alpha 0.5, log pi [-1, 2]."""
    agent = sac(alpha=0.5)
    logp = torch.tensor([-1.0, 2.0]).requires_grad_()
    values = torch.tensor([[2.0, 4.0], [3.0, 1.0]]).requires_grad_()
    agent.pi = Fixed(Draw(torch.zeros(2, 2), logp))  # type: ignore[assignment]
    agent.q = Table(values)  # type: ignore[assignment]
    loss, out = agent.actor_loss(transitions(torch.Generator().manual_seed(0), 2))
    assert float(loss.detach()) == pytest.approx((-0.5 - 2 + 1.0 - 1) / 2, abs=1e-12)
    assert not out.requires_grad
    assert out.tolist() == [-1.0, 2.0]
    g_logp, g_q = torch.autograd.grad(loss, [logp, values])
    assert g_logp.tolist() == [0.25, 0.25]  # log pi is not detached
    assert g_q.tolist() == [[-0.5, 0.0], [0.0, -0.5]]  # each sample through its smaller critic


def test_alpha_gradient_by_number(double: None) -> None:
    """log pi = [-1, 2], target -3: +2.5, so descent lowers alpha; the mean entropy -0.5 is above its target."""
    agent = sac(target_entropy=-3.0, alpha=0.7)
    (g,) = torch.autograd.grad(agent.alpha_loss(torch.tensor([-1.0, 2.0])), agent.log_alpha)
    assert float(g) == pytest.approx(2.5, abs=1e-12)


@pytest.mark.parametrize(("target", "sign"), [(20.0, 1), (-50.0, -1)])
def test_alpha_rises_below_the_target_entropy_and_falls_above_it(target: float, sign: int) -> None:
    agent = sac(target_entropy=target, alpha=0.5, alpha_lr=1e-2)
    before = float(agent.log_alpha.detach())
    metrics = agent.update(batch_for(agent))
    assert sign * (float(agent.log_alpha.detach()) - before) == pytest.approx(1e-2, rel=1e-3)  # Adam's first step
    assert sign * (target - float(metrics["policy/entropy"])) > 0
    assert float(metrics["policy/alpha"]) == pytest.approx(0.5)  # the one that the losses used


def test_alpha_settings() -> None:
    assert sac().target_entropy == -2.0  # minus the number of action dimensions
    assert sac(target_entropy=0.0).target_entropy == 0.0
    assert float(sac(alpha=0.25).log_alpha.detach()) == pytest.approx(math.log(0.25))
    fixed = sac(alpha=0.25, learn_alpha=False)
    before = fixed.log_alpha.detach().clone()
    for seed in range(3):
        fixed.update(batch_for(fixed, seed))
    assert torch.equal(fixed.log_alpha.detach(), before)


def reached(loss: Tensor, module: nn.Module | list[nn.Parameter]) -> bool:
    params = [p for p in (module.parameters() if isinstance(module, nn.Module) else module) if p.requires_grad]
    if not params:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True))


def test_who_receives_a_gradient() -> None:
    agent = sac()
    batch = batch_for(agent)
    critic, (actor, logp) = agent.critic_loss(batch), agent.actor_loss(batch)
    assert reached(critic, agent.q)
    assert not reached(critic, agent.pi)
    assert not reached(critic, agent.q_lagged)
    assert not reached(critic, [agent.log_alpha])
    assert reached(actor, agent.pi)
    assert not reached(actor, agent.q_lagged)
    assert not reached(actor, [agent.log_alpha])
    assert not reached(agent.alpha_loss(logp), agent.pi)
    assert not any(p.requires_grad for p in agent.q_lagged.parameters())


def test_the_actor_step_moves_the_actor_alone() -> None:
    agent = sac()
    before = snapshot(agent)
    minimize(agent.actor_loss(batch_for(agent))[0], agent.opt_pi)
    assert differing(agent, before)
    assert all(k.startswith("pi.") for k in differing(agent, before))


def test_actor_gradient_equals_a_slow_reference(double: None) -> None:
    agent = sac(alpha=0.3)
    batch = batch_for(agent)
    noise = torch.randn(batch.action.shape, generator=agent.rng["sample"].clone_state())
    got = torch.autograd.grad(agent.actor_loss(batch)[0], list(agent.pi.parameters()))
    mean, log_std = agent.pi.net(batch.obs).chunk(2, -1)
    base = torch.distributions.Normal(mean, log_std.exp())
    u = mean + log_std.exp() * noise
    logp = (base.log_prob(u) - (1 - u.tanh().square()).log()).sum(-1)
    q1, q2 = agent.q(batch.obs, u.tanh())
    loss = sum((0.3 * logp[i] - min(q1[i], q2[i]) for i in range(len(logp))), torch.tensor(0.0)) / len(logp)
    for a, b in zip(got, torch.autograd.grad(loss, list(agent.pi.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


def test_order_of_an_update() -> None:
    """Critics first, the actor against the new critics, lagged critics last and by tau alone."""
    agent, by_hand = sac(tau=0.1, alpha=0.4), sac(tau=0.1, alpha=0.4)
    batch = batch_for(agent)
    old_lagged = snapshot(agent.q_lagged)
    agent.update(batch)
    minimize(by_hand.critic_loss(batch), by_hand.opt_q)
    loss, logp = by_hand.actor_loss(batch)
    minimize(loss, by_hand.opt_pi)
    minimize(by_hand.alpha_loss(logp), by_hand.opt_alpha)
    for part in ("q", "pi"):
        assert differing(getattr(by_hand, part), snapshot(getattr(agent, part))) == []
    assert torch.equal(agent.log_alpha, by_hand.log_alpha)
    for k, v in agent.q_lagged.state_dict().items():
        torch.testing.assert_close(v, old_lagged[k] + 0.1 * (agent.q.state_dict()[k] - old_lagged[k]))


def test_lagged_critics_start_equal() -> None:
    agent = sac()
    assert differing(agent.q_lagged, snapshot(agent.q)) == []


# ------------------------------------------------------------------------------------------------------- soft bandits
class QuadraticInU(nn.Module):
    """-k/2 (u - m)^2 of the action before squashing, less alpha times the squash's log-Jacobian."""

    def __init__(self, k: float, m: float, alpha: float) -> None:
        super().__init__()
        self.k, self.m, self.alpha = k, m, alpha

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        u = action.atanh()
        log_jacobian = (1 - action.square()).log()
        q = (-0.5 * self.k * (u - self.m).square() - self.alpha * log_jacobian).sum(-1)
        return torch.stack([q, q])


K, M, ALPHA = 4.0, 0.6, 0.36
BEST = (M, 0.5 * math.log(ALPHA / K))
"""Mean and log-std of N(m, sqrt(alpha / k))."""


@pytest.mark.parametrize(
    ("mean", "log_std", "optimal"), [(*BEST, True), (M, BEST[1] + 0.2, False), (M + 0.1, BEST[1], False)]
)
def test_soft_optimum_of_a_bandit_is_a_fixed_point(
    double: None, monkeypatch: pytest.MonkeyPatch, mean: float, log_std: float, optimal: bool
) -> None:
    """With noise of mean exactly 0 and variance exactly 1 the gradient vanishes there, and only there."""
    agent = sac(alpha=ALPHA)
    agent.q = QuadraticInU(K, M, ALPHA)  # type: ignore[assignment]
    last = agent.pi.net[-1]
    assert isinstance(last, nn.Linear)
    nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([mean, mean, log_std, log_std])
    noise = torch.tensor([[1.0, 1.0], [-1.0, 1.0], [1.0, -1.0], [-1.0, -1.0]])
    monkeypatch.setattr(distributions, "standard_normal", lambda *_: noise)
    loss, _ = agent.actor_loss(transitions(torch.Generator().manual_seed(0), 4))
    (g,) = torch.autograd.grad(loss, last.bias)
    if optimal:
        assert g.tolist() == pytest.approx([0.0] * 4, abs=1e-10)
    else:
        assert float(g.abs().max()) > 0.1


class Quadratic(nn.Module):
    """-k/2 (a - m)^2."""

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        q = -0.5 * 40.0 * (action - 0.3).square().sum(-1)
        return torch.stack([q, q])


def test_actor_finds_the_soft_optimum_of_a_bandit() -> None:
    """Q = -20 (a - 0.3)^2, alpha 0.1: a ~ N(0.3, 0.05), narrow enough that squashing hardly bends it."""
    agent = sac(alpha=0.1, hidden=(8,))
    agent.q = Quadratic()  # type: ignore[assignment]
    batch = transitions(torch.Generator().manual_seed(0), 128)
    batch = batch._replace(obs=torch.zeros_like(batch.obs))
    opt = adam(agent.pi.parameters(), 2e-2)
    for step in range(400):
        opt.param_groups[0]["lr"] = 2e-2 * (1 - step / 400)
        minimize(agent.actor_loss(batch)[0], opt)
    with torch.no_grad():
        action = agent.pi(torch.zeros(20_000, 3)).sample(generator=torch.Generator().manual_seed(0))
    assert action.mean(0).tolist() == pytest.approx([0.3, 0.3], abs=0.01)
    assert action.std(0).tolist() == pytest.approx([0.05, 0.05], rel=0.1)


def test_behaviour_is_a_draw_and_evaluation_its_centre() -> None:
    agent = sac()
    obs = torch.ones(4000, 3)
    with torch.no_grad():
        pi = agent.pi(obs[:1])
        draws, _ = agent.act(obs, explore=True)
        mode, _ = agent.act(obs, explore=False)
        assert float(draws.abs().max()) < 1
        torch.testing.assert_close(mode[0], pi.mean[0].tanh())
        u = draws.atanh()
        torch.testing.assert_close(u.mean(0), pi.mean[0], rtol=0, atol=0.1)
        torch.testing.assert_close(u.std(0), pi.log_std[0].exp(), rtol=0.1, atol=0)
