"""ReBRAC: both losses by number, TD3 as what is left without its penalties, the order of an update."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, as_dataset, batch_for, differing, snapshot, tiny, transitions
from torch import nn

from rlctl.agents.rebrac import ReBRAC
from rlctl.agents.td3bc import TD3BC
from rlctl.data.dataset import Dataset
from rlctl.ops import minimize
from rlctl.types import Batch

Q = [1.0, -2.0, 3.0]
PI = [[0.2, -0.4], [0.0, 0.5], [1.0, -1.0]]
ACTION = [[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]]


def rebrac(**overrides: Any) -> ReBRAC:
    agent = tiny("rebrac", **overrides)
    assert isinstance(agent, ReBRAC)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)


def test_actor_loss_by_number(double: None) -> None:
    """Mean squared distance, summed over dimensions, 0.4833333333; lambda = 1 / E|min Q| = 1/2; the smaller critic."""
    agent = rebrac(actor_bc=0.01)
    q, action = torch.tensor([Q, [9.0, 9.0, 9.0]]).requires_grad_(), torch.tensor(PI).requires_grad_()
    agent.q, agent.pi = Table(q), Table(action)  # type: ignore[assignment]
    batch = rows(3)._replace(action=torch.tensor(ACTION))
    loss = agent.actor_loss(batch)
    assert float(loss.detach()) == pytest.approx(-0.3285, abs=1e-10)
    g_q, g_action = torch.autograd.grad(loss, [q, action])
    torch.testing.assert_close(g_q, torch.tensor([[-0.5 / 3] * 3, [0.0] * 3]))
    torch.testing.assert_close(g_action, 0.01 * 2 * (action.detach() - batch.action) / 3)  # B = 3, no mean over A


def test_backup_by_hand(double: None) -> None:
    """gamma 0.9, beta_2 0.5, min Q' = 2, squared distance of a~ = (0.1, 0.2) from a' = (0.4, -0.2): 0.25."""
    agent = rebrac(gamma=0.9, critic_bc=0.5, policy_noise=0.0)
    agent.q_lagged = lagged = Table(torch.tensor([[2.0] * 4, [3.0] * 4]))  # type: ignore[assignment]
    agent.pi_lagged = Table(torch.tensor([[0.1, 0.2]] * 4))  # type: ignore[assignment]
    batch = rows(4)._replace(
        reward=torch.ones(4),
        terminated=torch.tensor([False, True, False, True]),
        extra={
            "next_action": torch.tensor([[0.4, -0.2]] * 4),
            "has_next_action": torch.tensor([True, True, False, False]),
        },
    )
    # the penalty lowers the target; neither it nor a value stands behind a termination; a cut row keeps its bootstrap
    known = [1 + 0.9 * (2 - 0.5 * 0.25), 1.0, 1 + 0.9 * 2, 1.0]
    assert agent.backup(batch, torch.zeros(4, 2)).tolist() == pytest.approx(known)
    assert torch.equal(lagged.seen[0][0], batch.next_obs)
    values = torch.tensor([[1.0, 0.0, 2.0, -1.0]] * 2).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    loss = agent.critic_loss(batch, torch.zeros(4, 2))
    error = values.detach() - torch.tensor(known)
    assert float(loss.detach()) == pytest.approx(float(error.square().mean(1).sum()))
    torch.testing.assert_close(torch.autograd.grad(loss, values)[0], 2 * error / 4)


def test_the_penalty_is_on_the_smoothed_action(double: None) -> None:
    """Noise 0.2 * 1 and 0.2 * (-5), the latter bounded by 0.5: a~ = (0.3, -0.3), 0.02 from a' = (0.4, -0.2)."""
    agent = rebrac(gamma=0.9, critic_bc=0.5, policy_noise=0.2, noise_clip=0.5)
    agent.q_lagged = Table(torch.tensor([[2.0], [3.0]]))  # type: ignore[assignment]
    agent.pi_lagged = Table(torch.tensor([[0.1, 0.2]]))  # type: ignore[assignment]
    extra = {"next_action": torch.tensor([[0.4, -0.2]]), "has_next_action": torch.tensor([True])}
    batch = rows(1)._replace(reward=torch.ones(1), terminated=torch.tensor([False]), extra=extra)
    assert agent.backup(batch, torch.tensor([[1.0, -5.0]])).tolist() == pytest.approx([1 + 0.9 * (2 - 0.5 * 0.02)])


def test_without_penalties_it_is_td3_with_layer_norm(double: None) -> None:
    """The critics' loss is TD3's on these very networks; the actor's is that of lambda min_j Q_j."""
    agent, batch = rebrac(actor_bc=0.0, critic_bc=0.0), batch_for(rebrac())
    noise = torch.randn(32, 2)
    assert torch.equal(agent.critic_loss(batch, noise), TD3BC.critic_loss(agent, batch, noise))  # type: ignore[arg-type]
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch), params)
    q = agent.q(batch.obs, agent.pi(batch.obs)).amin(0)
    for a, b in zip(got, torch.autograd.grad(-q.mean() / q.detach().abs().mean(), params), strict=True):
        torch.testing.assert_close(a, b)


def test_a_large_weight_is_behaviour_cloning(double: None) -> None:
    agent, batch = rebrac(actor_bc=1e9), batch_for(rebrac())
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch), params)
    expected = torch.autograd.grad((agent.pi(batch.obs) - batch.action).square().sum(-1).mean(), params)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a / 1e9, b, rtol=1e-6, atol=1e-9)


def test_networks_are_those_of_the_official_code() -> None:
    """LayerNorm behind each activation of the critics, none in the actor; biases 0.1; small last layers."""
    agent = rebrac()
    kinds = [type(m).__name__ for m in agent.q.members[0].children()]
    assert kinds == ["Linear", "ReLU", "LayerNorm"] * 2 + ["Linear"]
    assert [type(m).__name__ for m in agent.pi.net.children()] == ["Linear", "ReLU", "Linear", "ReLU", "Linear"]
    for net, bound in ((agent.pi.net, 1e-3), (agent.q.members[1], 3e-3)):
        layers = [m for m in net.children() if isinstance(m, nn.Linear)]  # type: ignore[union-attr]
        assert all(torch.equal(m.bias, torch.full_like(m.bias, 0.1)) for m in layers[:-1])
        last = torch.cat([layers[-1].weight.flatten(), layers[-1].bias]).detach().abs()
        assert 0.7 * bound < float(last.max()) <= bound
    assert not any(isinstance(m, nn.LayerNorm) for m in rebrac(layer_norm=False).modules())


def test_it_asks_for_next_actions_within_episodes() -> None:
    agent, data = rebrac(), as_dataset(rows(20))
    data = Dataset(data.rows, torch.tensor([5, 20]), id="two")
    agent.prepare(data)
    extra = data.sample(8).extra
    assert set(extra) == {"next_action", "has_next_action"}
    assert (~data.rows.extra["has_next_action"]).nonzero().flatten().tolist() == [4, 19]
    with pytest.raises(ValueError, match="no column 'next_action'"):
        agent.update(rows(8))


def test_the_order_of_an_update() -> None:
    """Critics at each; every second time the lagged networks, the actor's by the actor of before its step."""
    agent, twin = rebrac(), rebrac()
    before = snapshot(agent)
    agent.update(batch_for(agent, 0))
    assert all(k.startswith("q.") for k in differing(agent, before))
    minimize(twin.critic_loss(batch_for(twin, 0)), twin.opt_q)
    agent.update(batch_for(agent, 1))
    batch = batch_for(twin, 1)
    minimize(twin.critic_loss(batch), twin.opt_q)
    old = snapshot(twin.pi)
    minimize(twin.actor_loss(batch), twin.opt_pi)
    tau = twin.cfg.tau
    with torch.no_grad():
        for name, p in twin.pi_lagged.named_parameters():
            p.lerp_(old[name], tau)
        for p, online in zip(twin.q_lagged.parameters(), twin.q.parameters(), strict=True):
            p.lerp_(online, tau)
    assert differing(agent, snapshot(twin)) == []
