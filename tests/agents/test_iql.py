"""IQL: its three losses by number, their order, the cosine, the limits of the expectile on a tabular problem."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.iql import IQL
from rlctl.nets import Normal
from rlctl.ops import frozen_copy, minimize, polyak
from rlctl.types import Batch


def iql(**overrides: Any) -> IQL:
    agent = tiny("iql", **overrides)
    assert isinstance(agent, IQL)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)


class Fixed(nn.Module):
    """A policy that is one distribution everywhere."""

    def __init__(self, pi: Normal) -> None:
        super().__init__()
        self.pi = pi

    def forward(self, obs: Tensor, drop: torch.Generator | None = None) -> Normal:
        return self.pi


@pytest.mark.parametrize(("expectile", "known"), [(0.7, 1.0916666667), (0.9, 1.3083333333)])
def test_value_loss_by_number(double: None, expectile: float, known: float) -> None:
    """Errors [-1, 0.5, 2] of V below the smaller lagged critic."""
    agent = iql(expectile=expectile)
    agent.q_lagged = Table(torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.5, 5.0]]))  # type: ignore[assignment]
    v = torch.tensor([2.0, 1.0, 1.0]).requires_grad_()
    agent.v = Table(v)  # type: ignore[assignment]
    q = agent.q_data(rows(3))
    assert q.tolist() == [1.0, 1.5, 3.0]
    loss = agent.value_loss(rows(3), q)
    assert float(loss.detach()) == pytest.approx(known, abs=1e-9)
    (g,) = torch.autograd.grad(loss, v)
    assert bool((g * torch.tensor([1.0, -1.0, -1.0]) > 0).all())


@pytest.mark.parametrize(
    ("beta", "weights"), [(3.0, [0.049787, 1, 2.459603, 100]), (10.0, [0.000045, 1, 20.085537, 100])]
)
def test_actor_loss_by_number(double: None, beta: float, weights: list[float]) -> None:
    """Advantages [-1, 0, 0.3, 2]; mean tanh(0.4), std 1, action 0.9: log-density -1.0541650741."""
    agent = iql(beta=beta)
    mean = torch.full((4, 1), math.tanh(0.4)).requires_grad_()
    agent.pi = Fixed(Normal(mean, torch.zeros(1)))  # type: ignore[assignment]
    v = torch.full((4,), 0.5).requires_grad_()
    agent.v = Table(v)  # type: ignore[assignment]
    batch = rows(4)._replace(action=torch.full((4, 1), 0.9))
    loss = agent.actor_loss(batch, torch.tensor([-0.5, 0.5, 0.8, 2.5]))
    assert float(loss.detach()) == pytest.approx(1.0541650741 * sum(weights) / 4, rel=1e-6)
    (g,) = torch.autograd.grad(loss, mean, retain_graph=True)  # each row by its weight
    torch.testing.assert_close(g / g[1], torch.tensor(weights)[:, None], rtol=1e-2, atol=1e-6)
    assert torch.autograd.grad(loss, v, allow_unused=True) == (None,)  # the weight has no gradient


def test_beta_zero_is_behaviour_cloning(double: None) -> None:
    agent = iql(beta=0.0)
    batch = batch_for(agent)
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch, agent.q_data(batch)), params)
    expected = torch.autograd.grad(-agent.pi(batch.obs).log_prob(batch.action).mean(), params)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_deterministic_head_by_number(double: None) -> None:
    """Advantages 0 and 2 at beta 1: squared distances, summed over dimensions, weighted by 1 and e^2."""
    agent = iql(head="deterministic", beta=1.0)
    agent.v = Table(torch.zeros(2))  # type: ignore[assignment]
    batch = rows(2)
    distance = (agent.pi(batch.obs) - batch.action).square().sum(-1)
    loss = agent.actor_loss(batch, torch.tensor([0.0, 2.0]))
    assert float(loss.detach()) == pytest.approx(float((distance[0] + math.e**2 * distance[1]).detach()) / 2, rel=1e-12)
    calm, noisy = (agent.act(batch.obs, explore)[0] for explore in (False, True))
    assert torch.equal(calm, agent.pi(batch.obs))
    assert not torch.equal(calm, noisy)
    whole = iql(head="deterministic")
    before = snapshot(whole.pi)
    whole.update(batch)
    assert differing(whole.pi, before)


def test_critic_loss_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) V(s') = [1.9, 2, 0.3]; a truncation changes nothing."""
    agent = iql(gamma=0.9)
    agent.v = v = Table(torch.tensor([1.0, 5.0, -3.0]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    batch = rows(3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    loss = agent.critic_loss(batch)
    error = values.detach() - torch.tensor([1.9, 2.0, 0.3])
    assert float(loss.detach()) == pytest.approx(float(error.square().mean(1).sum()), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], 2 * error / 3)
    assert torch.equal(v.seen[0][0], batch.next_obs)


def test_the_order_of_an_update() -> None:
    """V; the policy and the critics by the new V; then the lagged critics, which V and policy saw as they were."""
    agent, twin = iql(), iql()
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        q = twin.q_data(batch)
        twin.opt_pi.param_groups[0]["lr"] = agent.opt_pi.param_groups[0]["lr"]
        for loss, opt in (
            (lambda b, q=q: twin.value_loss(b, q), twin.opt_v),
            (lambda b, q=q: twin.actor_loss(b, q), twin.opt_pi),
            (twin.critic_loss, twin.opt_q),
        ):
            minimize(loss(twin.seen(batch)), opt)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_the_actor_s_learning_rate_follows_a_cosine_offline_and_stays_online() -> None:
    agent = iql(steps=4, actor_lr=1e-2)
    rates = []
    for seed in range(6):
        agent.update(batch_for(agent, seed))
        rates.append(agent.opt_pi.param_groups[0]["lr"])
    assert rates == pytest.approx([1e-2, 1e-2 * (2 + 2**0.5) / 4, 5e-3, 1e-2 * (2 - 2**0.5) / 4, 0, 0], abs=1e-12)
    before = snapshot(agent.pi)
    agent.update(batch_for(agent))
    assert differing(agent.pi, before) == []
    agent.counters["env_steps"] = 1  # fine-tuning online: the policy must go on learning
    agent.update(batch_for(agent))
    assert agent.opt_pi.param_groups[0]["lr"] == 1e-2
    assert differing(agent.pi, before)
    assert [opt.param_groups[0]["lr"] for opt in (agent.opt_q, agent.opt_v)] == [3e-4, 3e-4]
    constant = iql(steps=4, actor_lr=1e-2, anneal_actor_lr=False)
    constant.counters["updates"] = 3
    assert constant.actor_lr() == 1e-2


def test_dropout_is_of_updates_alone() -> None:
    agent, plain = iql(dropout=0.5), iql()
    batch = batch_for(agent)
    assert torch.equal(agent.act(batch.obs, explore=False)[0], plain.act(batch.obs, explore=False)[0])
    q = agent.q_data(batch)
    first, second, calm = agent.actor_loss(batch, q), agent.actor_loss(batch, q), plain.actor_loss(batch, q)
    assert len({float(x.detach()) for x in (first, second, calm)}) == 3


def test_the_policy_stays_in_the_box_and_its_spread_in_bounds() -> None:
    agent = iql()
    agent.pi.log_std.data.fill_(9.0)  # type: ignore[union-attr]
    obs = 100 * torch.randn(200, 3)
    assert float(agent.act(obs, explore=True)[0].detach().abs().max()) == 1.0
    assert float(agent.act(obs, explore=False)[0].detach().abs().max()) <= 1.0
    assert float(agent.pi(obs).log_std.detach().max()) == 2.0
    agent.pi.log_std.data.fill_(-9.0)  # type: ignore[union-attr]
    assert float(agent.pi(obs).log_std.detach().min()) == -5.0


def test_last_layers_are_orthogonal_with_gain_sqrt_2() -> None:
    agent = iql()
    for net in (agent.v.net, agent.q.members[1], agent.pi.mean):  # type: ignore[union-attr]
        w = net[-1].weight.detach()  # type: ignore[index]
        torch.testing.assert_close(w @ w.T, 2 * torch.eye(len(w)), rtol=1e-5, atol=1e-5)


# ------------------------------------------------------------------------------------------------------------- tabular
class TabularQ(nn.Module):
    """Two critics: a number per state (a one-hot observation) and action (-1, 0 or 1)."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([0.0, 0.0, 99.0]).expand(2, 2, 3).clone())  # 99: the action nobody took

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return self.table[:, obs.argmax(-1), action[:, 0].long() + 1]


class TabularV(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(2))

    def forward(self, obs: Tensor) -> Tensor:
        return self.table[obs.argmax(-1)]


@pytest.mark.parametrize(("expectile", "known"), [(0.5, [0.27, 0.6]), (0.9999, [0.9, 1.0])])
def test_from_the_mean_to_the_best_action_of_the_data(double: None, expectile: float, known: list[float]) -> None:
    """In state 0 the data ends with nothing or goes on to state 1, which pays 1 or 0.2 and ends; gamma 0.9.

    At 1/2 V is the value of the data's own policy, V = (0 + 0.9 * 0.6) / 2; towards 1 that of its best actions.
    The third action was never taken, and is thought to be worth 99: nobody must ask.
    """
    agent = iql(expectile=expectile, gamma=0.9)
    agent.q, agent.v = TabularQ(), TabularV()  # type: ignore[assignment]
    agent.q_lagged = frozen_copy(agent.q)
    opt_q, opt_v = (torch.optim.SGD(m.parameters(), 1.0) for m in (agent.q, agent.v))
    state = torch.tensor([0, 0, 1, 1])
    batch = Batch(
        obs=nn.functional.one_hot(state, 2).double(),
        action=torch.tensor([[-1.0], [0.0], [-1.0], [0.0]]),
        reward=torch.tensor([0.0, 0.0, 1.0, 0.2]),
        next_obs=nn.functional.one_hot(torch.tensor([0, 1, 1, 1]), 2).double(),
        terminated=torch.tensor([True, False, True, True]),
        truncated=torch.zeros(4, dtype=torch.bool),
    )
    for _ in range(150):
        minimize(agent.value_loss(batch, agent.q_data(batch)), opt_v)
        minimize(agent.critic_loss(batch), opt_q)
        polyak(agent.q, agent.q_lagged, 0.5)
    assert agent.v.table.tolist() == pytest.approx(known, abs=2e-3)  # type: ignore[union-attr]
