"""FamO2O on IQL: who moves by which loss, one beta in weight and network, IQL as what is left of a single beta."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import (
    Table,
    batch_for,
    differing,
    recorded_inputs,
    silence,
    snapshot,
    tiny,
)
from torch import Tensor, nn

from rlctl.agents.famo2o_iql import FamO2OIQL
from rlctl.agents.iql import IQL
from rlctl.nets import Normal
from rlctl.ops import minimize, polyak
from rlctl.ops.balance import encoded, uniform


def famo2o(**overrides: Any) -> FamO2OIQL:
    agent = tiny("famo2o-iql", **overrides)
    assert isinstance(agent, FamO2OIQL)
    return agent


@torch.no_grad()
def as_iql(agent: FamO2OIQL, beta: float) -> IQL:
    """IQL with the same weights; the universal policy made blind to its coefficient."""
    other = tiny("iql", beta=beta)
    assert isinstance(other, IQL)
    for name in ("q", "q_lagged", "v"):
        getattr(other, name).load_state_dict(getattr(agent, name).state_dict())
    weights = agent.pi.state_dict()
    first = next(k for k in weights if k.endswith("weight"))
    weights[first][:, agent.spec.obs_dim :] = 0.0
    other.pi.load_state_dict(weights | {first: weights[first][:, : agent.spec.obs_dim].clone()})
    return other


def test_a_single_beta_is_iql(double: None) -> None:
    """All losses and the gradients of the universal policy, its six extra inputs aside."""
    agent = famo2o(beta_min=3.0, beta_max=3.0)
    other, batch = as_iql(agent, 3.0), batch_for(agent)
    q = agent.q_data(batch)
    beta = uniform(batch.reward, 3.0, 3.0, agent.rng["sample"])
    assert torch.equal(beta, torch.full((32,), 3.0))
    assert torch.equal(agent.span(torch.randn(32, 1).tanh()), beta)
    torch.testing.assert_close(agent.value_loss(batch, q), other.value_loss(batch, other.q_data(batch)))
    torch.testing.assert_close(agent.critic_loss(batch), other.critic_loss(batch))
    ours, theirs = agent.actor_loss(batch, q, beta), other.actor_loss(batch, q)
    torch.testing.assert_close(ours, theirs)
    grads = [torch.autograd.grad(x, list(a.pi.parameters())) for x, a in ((ours, agent), (theirs, other))]
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a[:, : b.shape[1]] if a.dim() == 2 else a, b)


class Fixed(nn.Module):
    """A Gaussian that is the same everywhere; remembers what it was told."""

    def __init__(self, pi: Normal) -> None:
        super().__init__()
        self.pi = pi
        self.seen: list[Tensor] = []

    def forward(self, obs: Tensor) -> Normal:
        self.seen.append(obs)
        return self.pi


def test_beta_weighs_and_conditions_alike(double: None) -> None:
    """Advantages [-1, 0, 0.3, 2] under betas [3, 3, 10, 10]: exp(beta A) up to 100; the policy is told the same."""
    agent = famo2o()
    batch = batch_for(agent).map(lambda x: x[:4])
    mean = torch.full((4, 2), 0.1).requires_grad_()
    agent.pi = policy = Fixed(Normal(mean, torch.zeros(2)))  # type: ignore[assignment]
    agent.v = Table(torch.full((4,), 0.5))  # type: ignore[assignment]
    beta = torch.tensor([3.0, 3.0, 10.0, 10.0]).requires_grad_()
    loss = agent.actor_loss(batch, torch.tensor([-0.5, 0.5, 0.8, 2.5]), beta)
    weights = torch.tensor([0.0497870684, 1.0, 20.0855369232, 100.0])
    logp = Normal(mean.detach(), torch.zeros(2)).log_prob(batch.action)
    assert float(loss.detach()) == pytest.approx(-float((weights * logp).mean()), rel=1e-8)
    torch.testing.assert_close(policy.seen[0], torch.cat([batch.obs, encoded(beta.detach())], -1))
    assert torch.autograd.grad(loss, beta, allow_unused=True) == (None,)


OWNERS = {
    "value_loss": {"v"},
    "balance_loss": {"balance"},
    "temperature_loss": {"log_temperature"},
    "actor_loss": {"pi"},
    "critic_loss": {"q", "q_lagged"},
}


@pytest.mark.parametrize("loss", OWNERS)
def test_each_loss_moves_its_own_networks(loss: str) -> None:
    """A whole update in which the other losses are times 0: the balance policy's goes through the universal policy's
    action and the lagged critics, and moves neither."""
    agent = famo2o()
    silence(agent, [name for name in OWNERS if name != loss])
    before = snapshot(agent)
    agent.update(batch_for(agent))
    assert {k.split(".")[0] for k in differing(agent, before)} == OWNERS[loss]


def test_balance_loss_by_number(double: None) -> None:
    """temperature 2, log-densities [0.5, 1.5], smaller lagged critics [1, -2]: 2 * 1 - (-0.5)."""
    agent = famo2o(temperature=2.0)
    agent.q_lagged = Table(torch.tensor([[1.0, 4.0], [3.0, -2.0]]))  # type: ignore[assignment]
    batch = batch_for(agent).map(lambda x: x[:2])
    loss = agent.balance_loss(batch, torch.zeros(2, 1), torch.tensor([0.5, 1.5]))
    assert float(loss) == pytest.approx(2.5)


def test_temperature_loss_by_number(double: None) -> None:
    """2 E[-log pi + 0.5] with log-densities [0.5, 1.5]: -1; it falls, so the temperature rises, entropy being low."""
    agent = famo2o(temperature=2.0)
    loss = agent.temperature_loss(torch.tensor([0.5, 1.5]))
    assert float(loss.detach()) == pytest.approx(2 * (-1.0 + 0.5))
    (g,) = torch.autograd.grad(loss, agent.log_temperature)
    assert float(g) == pytest.approx(-1.0)


def test_spreads_stay_in_bounds() -> None:
    """The universal policy's log-std in [-5, 2], the balance policy's in [-10, 2]."""
    agent = famo2o()
    for raw, universal, balance in ((-30.0, -5.0, -10.0), (-4.0, -4.0, -4.0), (9.0, 2.0, 2.0)):
        agent.pi.log_std.data.fill_(raw)
        agent.balance.log_std.data.fill_(raw)
        assert agent.universal(torch.zeros(1, 3), torch.ones(1)).log_std.tolist() == [universal] * 2
        assert agent.balanced(torch.zeros(1, 3)).log_std.tolist() == [balance]


def test_every_beta_is_in_range() -> None:
    agent = famo2o(beta_min=8.0, beta_max=14.0)
    with torch.no_grad():
        agent.balance.log_std.fill_(9.0)
    x = agent.balanced(100 * torch.randn(500, 3)).sample(generator=agent.rng["sample"]).detach()
    beta = agent.span(x)
    assert beta.shape == (500,)
    assert 8.0 <= float(beta.min()) < 8.1
    assert 13.9 < float(beta.max()) <= 14.0
    assert agent.span(torch.tensor([[-0.5]])).tolist() == [9.5]
    with pytest.raises(ValueError, match="the second is smaller"):
        famo2o(beta_min=2.0, beta_max=1.0)


@pytest.mark.parametrize("online", [False, True])
def test_the_order_of_an_update(online: bool) -> None:
    """V, balance policy, temperature, universal policy, critics, lagged critics; where beta comes from."""
    agent, twin = famo2o(), famo2o()
    agent.counters["env_steps"] = twin.counters["env_steps"] = int(online)
    told = recorded_inputs(agent.pi)
    for seed in range(2):
        batch = batch_for(agent, seed)
        told.clear()
        agent.update(batch)
        rng, q = twin.rng["sample"], twin.q_data(batch)
        minimize(twin.value_loss(batch, q), twin.opt_v)
        x, logp = twin.balanced(batch.obs).sample_log_prob(generator=rng)
        minimize(twin.balance_loss(batch, x, logp), twin.opt_balance)
        minimize(twin.temperature_loss(logp), twin.opt_temperature)
        beta = twin.span(x.detach()) if online else uniform(batch.reward, 1.0, 5.0, rng)
        assert torch.equal(told[-1][0], torch.cat([batch.obs, encoded(beta)], -1))
        minimize(twin.actor_loss(batch, q, beta), twin.opt_pi)
        minimize(twin.critic_loss(batch), twin.opt_q)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_acting_takes_the_balance_policy_s_mode() -> None:
    agent = famo2o()
    obs = torch.randn(5, 3)
    told = recorded_inputs(agent.pi)
    for explore in (False, True):
        agent.act(obs, explore)
        beta = agent.span(agent.balanced(obs).mode).detach()
        assert torch.equal(told[-1][0], torch.cat([obs, encoded(beta)], -1))
