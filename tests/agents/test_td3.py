"""TD3: smoothing, backup and losses by hand; the delay of actor and lagged networks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.td3 import TD3
from rlctl.ops import minimize
from rlctl.types import Batch

GAMMA = 0.9


def td3(**overrides: Any) -> TD3:
    agent = tiny("td3", **overrides)
    assert isinstance(agent, TD3)
    return agent


def test_smoothed_action_by_hand(double: None) -> None:
    """Noise of std 0.2, clipped to +-0.5, then the action to +-1."""
    agent = td3(policy_noise=0.2, noise_clip=0.5)
    agent.pi_lagged = lagged = Table(torch.tensor([[0.9, -0.2], [0.0, 0.3], [-0.8, 0.1]]))  # type: ignore[assignment]
    noise = torch.tensor([[5.0, -0.5], [1.0, -9.0], [-2.0, 0.0]])
    next_obs = torch.ones(3, 3)
    out = agent.smoothed_action(next_obs, noise)
    torch.testing.assert_close(out, torch.tensor([[1.0, -0.3], [0.2, -0.2], [-1.0, 0.1]]))
    assert torch.equal(lagged.seen[0][0], next_obs)


def test_smoothing_noise_has_its_std_and_bound(double: None) -> None:
    agent = td3(policy_noise=0.2, noise_clip=0.3)
    agent.pi_lagged = Table(torch.zeros(20_000, 2))  # type: ignore[assignment]
    out = agent.smoothed_action(torch.zeros(20_000, 3))
    assert float(out.abs().max()) == pytest.approx(0.3)
    inside = out[out.abs() < 0.299]
    clipped_share = 1 - len(inside) / out.numel()
    assert clipped_share == pytest.approx(0.1336, abs=0.01)  # P(|N| > 1.5)
    assert float(out.mean()) == pytest.approx(0.0, abs=0.005)


def test_backup_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) min_j Q_lagged_j(s', smoothed action): [2.8, 2, 3]."""
    agent = td3(gamma=GAMMA, policy_noise=0.2, noise_clip=0.5)
    b = transitions(torch.Generator().manual_seed(0), 3)
    batch = b._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    agent.pi_lagged = Table(torch.full((3, 2), 0.5))  # type: ignore[assignment]
    agent.q_lagged = lagged = Table(torch.tensor([[2.0, 5.0, 1.0], [3.0, 4.0, 0.0]]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = online = Table(values)  # type: ignore[assignment]
    loss = agent.critic_loss(batch, noise=torch.full((3, 2), -1.0))
    y = torch.tensor([1 + GAMMA * 2, 2.0, 3.0])
    expected = (values.detach() - y).square().mean(1).sum()
    assert float(loss.detach()) == pytest.approx(float(expected), abs=1e-12)
    (g,) = torch.autograd.grad(loss, values)
    torch.testing.assert_close(g, 2 * (values.detach() - y) / 3)
    assert torch.equal(lagged.seen[0][0], batch.next_obs)
    torch.testing.assert_close(lagged.seen[0][1], torch.full((3, 2), 0.3))
    assert torch.equal(online.seen[0][0], batch.obs)
    assert torch.equal(online.seen[0][1], batch.action)


def test_actor_loss_uses_the_first_critic(double: None) -> None:
    agent = td3()
    values = torch.tensor([[2.0, 4.0], [-3.0, 1.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    loss = agent.actor_loss(transitions(torch.Generator().manual_seed(0), 2))
    assert float(loss.detach()) == -3.0
    assert torch.autograd.grad(loss, values)[0].tolist() == [[-0.5, -0.5], [0.0, 0.0]]


def test_actor_gradient_is_the_chain_rule(double: None) -> None:
    """dQ_1/da at a = pi(s), through da/dtheta."""
    agent = td3()
    batch = batch_for(agent)
    got = torch.autograd.grad(agent.actor_loss(batch), list(agent.pi.parameters()))
    action = agent.pi(batch.obs)
    leaf = action.detach().requires_grad_()
    (slope,) = torch.autograd.grad(-agent.q(batch.obs, leaf)[0].mean(), leaf)
    expected = torch.autograd.grad(action, list(agent.pi.parameters()), grad_outputs=slope)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b)


def reached(loss: Tensor, module: nn.Module) -> bool:
    params = [p for p in module.parameters() if p.requires_grad]
    if not params:
        return False
    return any(g is not None for g in torch.autograd.grad(loss, params, retain_graph=True, allow_unused=True))


def test_who_receives_a_gradient() -> None:
    agent = td3()
    batch = batch_for(agent)
    assert reached(agent.critic_loss(batch), agent.q)
    assert not reached(agent.critic_loss(batch), agent.pi)
    assert reached(agent.actor_loss(batch), agent.pi)
    for lagged in (agent.q_lagged, agent.pi_lagged):
        assert not any(p.requires_grad for p in lagged.parameters())


def test_actor_and_lagged_networks_wait_for_the_second_update() -> None:
    agent = td3(tau=0.1, policy_every=2)
    before = snapshot(agent)
    first = agent.update(batch_for(agent, 0))
    assert set(first) == {"losses/critic"}
    assert all(k.startswith("q.") for k in differing(agent, before))
    assert differing(agent, before)
    lagged_q, lagged_pi = snapshot(agent.q_lagged), snapshot(agent.pi_lagged)
    second = agent.update(batch_for(agent, 1))
    assert set(second) == {"losses/critic", "losses/actor"}
    for slow, fast, old in ((agent.q_lagged, agent.q, lagged_q), (agent.pi_lagged, agent.pi, lagged_pi)):
        for k, v in slow.state_dict().items():
            torch.testing.assert_close(v, old[k] + 0.1 * (fast.state_dict()[k] - old[k]))
        assert differing(slow, old)


@pytest.mark.parametrize("every", [1, 3])
def test_the_delay_is_a_setting(every: int) -> None:
    agent = td3(policy_every=every)
    acted = []
    for seed in range(6):
        before = snapshot(agent.pi)
        agent.update(batch_for(agent, seed))
        acted.append(bool(differing(agent.pi, before)))
    assert acted == [k % every == 0 for k in range(1, 7)]


def test_the_actor_sees_the_critics_of_this_update() -> None:
    agent, by_hand = td3(policy_every=1), td3(policy_every=1)
    batch: Batch = batch_for(agent)
    metrics = agent.update(batch)
    minimize(by_hand.critic_loss(batch), by_hand.opt_q)
    loss = minimize(by_hand.actor_loss(batch), by_hand.opt_pi)
    assert torch.equal(metrics["losses/actor"], loss)
    assert differing(by_hand.pi, snapshot(agent.pi)) == []
    assert differing(by_hand.q, snapshot(agent.q)) == []


def test_lagged_networks_start_equal() -> None:
    agent = td3()
    assert differing(agent.q_lagged, snapshot(agent.q)) == []
    assert differing(agent.pi_lagged, snapshot(agent.pi)) == []


def test_exploration_noise() -> None:
    agent = td3(exploration_noise=0.1)
    obs = torch.zeros(20_000, 3)
    with torch.no_grad():
        mode, _ = agent.act(obs, explore=False)
        noisy, _ = agent.act(obs, explore=True)
        assert torch.equal(mode, agent.pi(obs))
        assert (noisy - mode).std(0).tolist() == pytest.approx([0.1, 0.1], rel=0.03)
        assert (noisy - mode).mean(0).tolist() == pytest.approx([0.0, 0.0], abs=0.003)
        agent.pi = Table(torch.full((20_000, 2), 0.99))  # type: ignore[assignment]
        assert float(agent.act(obs, explore=True)[0].max()) == 1.0
