"""AWAC: backup, advantage and weighted likelihood by number, the limit of pure cloning, the order of an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import nn

from rlctl.agents.awac import AWAC
from rlctl.ops import minimize, polyak


def awac(**overrides: Any) -> AWAC:
    agent = tiny("awac", **overrides)
    assert isinstance(agent, AWAC)
    return agent


def test_backup_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) min_j Q_lagged_j(s', a'): [2.8, 2, 3]; the drawn action is clipped to the box."""
    agent = awac(gamma=0.9)
    agent.q_lagged = lagged = Table(torch.tensor([[2.0, 5.0, 1.0], [3.0, 4.0, 0.0]]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    batch = transitions(torch.Generator().manual_seed(0), 3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    noise = torch.tensor([[0.1, -0.2], [50.0, -50.0], [0.0, 0.0]])
    loss = agent.critic_loss(batch, noise)
    error = values.detach() - torch.tensor([2.8, 2.0, 3.0])
    assert float(loss.detach()) == pytest.approx(float(error.square().mean(1).sum()), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], 2 * error / 3)
    assert torch.equal(lagged.seen[0][0], batch.next_obs)
    torch.testing.assert_close(lagged.seen[0][1], agent.pi(batch.next_obs).sample(noise).clamp(-1, 1))
    assert lagged.seen[0][1][1].tolist() == [1.0, -1.0]


class ByFirstAction(nn.Module):
    """Q_1 = 2 a_0, Q_2 = 2 a_0 + 1."""

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
        return torch.stack([2 * action[:, 0], 2 * action[:, 0] + 1])


def test_actor_loss_by_number(double: None) -> None:
    """A = 2 (a_0 - a_pi_0), weights min(exp(A / lam), 100), times the log-density of the data's action."""
    agent = awac(lam=0.5)
    agent.q = ByFirstAction()  # type: ignore[assignment]
    batch = transitions(torch.Generator().manual_seed(0), 3)
    noise = torch.zeros(3, 2)
    drawn = agent.pi(batch.obs).mean.detach()
    first = drawn[:, 0] + torch.tensor([-0.25, 0.1, 3.0])
    batch = batch._replace(action=torch.stack([first, drawn[:, 1]], -1))
    torch.testing.assert_close(agent.adv(batch, noise), torch.tensor([-0.5, 0.2, 6.0]))
    weight = torch.tensor([0.36787944, 1.49182470, 100.0])  # e^-1, e^0.4, the bound
    expected = -(weight * agent.pi(batch.obs).log_prob(batch.action)).mean()
    loss = agent.actor_loss(batch, noise)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-7)
    params = list(agent.pi.parameters())
    for a, b in zip(torch.autograd.grad(loss, params), torch.autograd.grad(expected, params), strict=True):
        torch.testing.assert_close(a, b)


def test_the_policy_s_own_action_has_no_advantage(double: None) -> None:
    agent = awac()
    batch, noise = batch_for(agent), torch.randn(32, 2)
    batch = batch._replace(action=agent.sampled_action(batch.obs, noise))
    assert agent.adv(batch, noise).tolist() == [0.0] * 32
    assert float(agent.adv(batch, -noise).abs().max()) > 0


def test_a_large_temperature_is_behaviour_cloning(double: None) -> None:
    agent = awac(lam=1e12)
    batch = batch_for(agent)
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch), params)
    expected = torch.autograd.grad(-agent.pi(batch.obs).log_prob(batch.action).mean(), params)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_who_receives_a_gradient() -> None:
    agent = awac()
    batch = batch_for(agent)
    for loss, own, other in (
        (agent.critic_loss(batch), agent.q, agent.pi),
        (agent.actor_loss(batch), agent.pi, agent.q),
    ):
        assert all(g is not None for g in torch.autograd.grad(loss, list(own.parameters()), retain_graph=True))
        assert not any(torch.autograd.grad(loss, list(other.parameters()), allow_unused=True))


def test_the_order_of_an_update() -> None:
    agent, twin = awac(), awac()
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        seen = twin.seen(batch)
        minimize(twin.critic_loss(seen), twin.opt_q)
        minimize(twin.actor_loss(seen), twin.opt_pi)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_actions_are_clipped_to_the_box() -> None:
    agent = awac()
    obs = 1e4 * torch.randn(50, 3)
    assert float(agent.pi(obs).mean.detach().abs().max()) > 1  # the mean is free
    for explore in (False, True):
        assert float(agent.act(obs, explore)[0].detach().abs().max()) == 1.0


def test_the_spread_stays_in_bounds() -> None:
    agent = awac()
    for raw, bounded in ((-30.0, -20.0), (-19.0, -19.0), (9.0, 2.0)):
        agent.pi.log_std.data.fill_(raw)
        assert agent.pi(torch.zeros(1, 3)).log_std.tolist() == [bounded] * 2


def test_observations_are_z_scored() -> None:
    agent, plain = awac(), awac(normalize_obs=False)
    obs = torch.randn(4, 3)
    assert float(agent.obs_norm.mean.abs().max()) > 0.1
    torch.testing.assert_close(agent.act(obs, False)[0], agent.pi(agent.obs_norm(obs)).mean.clamp(-1, 1))
    torch.testing.assert_close(plain.obs_norm(obs), obs)
