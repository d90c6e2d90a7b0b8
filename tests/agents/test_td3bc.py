"""TD3+BC: the cloning term, the normalised value term, z-scored observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from agent_helpers import OBS_DIM, Table, as_dataset, batch_for, differing, recorded_inputs, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl import agents
from rlctl.agents.td3 import TD3
from rlctl.agents.td3bc import TD3BC, TD3BCConfig
from rlctl.nets import QEnsemble
from rlctl.ops import adam, minimize
from rlctl.types import Batch, Spec

Q = [1.0, -2.0, 3.0]
PI = [[0.2, -0.4], [0.0, 0.5], [1.0, -1.0]]
ACTION = [[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]]


def td3bc(**overrides: Any) -> TD3BC:
    agent = tiny("td3bc", **overrides)
    assert isinstance(agent, TD3BC)
    return agent


def by_table(alpha: float = 2.5) -> tuple[TD3BC, Batch, Tensor, Tensor]:
    agent = td3bc(alpha=alpha)
    q, action = torch.tensor([Q, [9.0, 9.0, 9.0]]).requires_grad_(), torch.tensor(PI).requires_grad_()
    agent.q, agent.pi = Table(q), Table(action)  # type: ignore[assignment]
    batch = transitions(torch.Generator().manual_seed(0), 3)._replace(action=torch.tensor(ACTION))
    return agent, batch, q, action


def test_actor_loss_by_number(double: None) -> None:
    agent, batch, q, action = by_table()
    loss = agent.actor_loss(batch)
    assert float(loss.detach()) == pytest.approx(-0.5916666667, abs=1e-10)
    g_q, g_action = torch.autograd.grad(loss, [q, action])
    lam = 1.25
    # the gradient through Q is -lambda / B: lambda is a constant, and the second critic plays no part
    torch.testing.assert_close(g_q, torch.tensor([[-lam / 3] * 3, [0.0] * 3]))
    # the cloning term is a mean over batch and action dimensions
    torch.testing.assert_close(g_action, 2 * (action.detach() - batch.action) / 6)


@pytest.mark.parametrize("alpha", [0.5, 2.5, 40.0])
def test_lambda_makes_the_value_term_weigh_alpha(double: None, alpha: float) -> None:
    """lambda E|Q_1| = alpha, whatever the scale of Q."""
    for scale in (1e-3, 1.0, 1e4):
        agent, batch, q, _ = by_table(alpha)
        agent.q.out = scaled = (scale * q.detach()).requires_grad_()  # type: ignore[assignment]
        (g,) = torch.autograd.grad(agent.actor_loss(batch), scaled)
        lam = -3 * float(g[0, 0])
        assert lam * float(scaled.detach()[0].abs().mean()) == pytest.approx(alpha, rel=1e-12)


def test_alpha_zero_is_behaviour_cloning(double: None) -> None:
    agent = td3bc(alpha=0.0)
    batch = batch_for(agent)
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch), params)
    expected = torch.autograd.grad((agent.pi(batch.obs) - batch.action).square().mean(), params)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


def test_without_cloning_it_is_td3_times_lambda(double: None) -> None:
    """Data actions equal to the policy's own silence the cloning term."""
    agent = td3bc(alpha=2.5)
    batch = batch_for(agent)
    batch = batch._replace(action=agent.pi(batch.obs).detach())
    params = list(agent.pi.parameters())
    got = torch.autograd.grad(agent.actor_loss(batch), params)
    lam = 2.5 / agent.q(batch.obs, batch.action)[0].detach().abs().mean()
    plain = torch.autograd.grad(TD3.actor_loss(agent, batch), params)
    for a, b in zip(got, plain, strict=True):
        torch.testing.assert_close(a, lam * b)


def scale_output(critics: QEnsemble, k: float) -> None:
    """Q -> k Q."""
    for member in critics.members:
        for p in list(member.parameters())[-2:]:
            p.data *= k


@pytest.mark.parametrize("k", [0.01, 100.0])
def test_scaling_rewards_and_values_leaves_the_actor_alone(double: None, k: float) -> None:
    plain, scaled = td3bc(), td3bc()
    batch, noise = batch_for(plain), torch.zeros(32, 2)
    for critics in (scaled.q, scaled.q_lagged):
        scale_output(critics, k)
    times_k = batch._replace(reward=k * batch.reward)
    critic, critic_k = plain.critic_loss(batch, noise), scaled.critic_loss(times_k, noise)
    assert float(critic_k.detach()) == pytest.approx(k * k * float(critic.detach()), rel=1e-6)
    losses = plain.actor_loss(batch), scaled.actor_loss(times_k)
    assert float(losses[0].detach()) == pytest.approx(float(losses[1].detach()), rel=1e-12)
    for a, b in zip(
        *[torch.autograd.grad(x, list(m.pi.parameters())) for x, m in zip(losses, (plain, scaled), strict=True)],
        strict=True,
    ):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("slope", [-50.0, 50.0])
def test_small_alpha_stays_inside_the_hull_of_the_data(slope: float) -> None:
    """Two data actions, +-0.5, of equal worth; critics that long for the outside do not matter."""
    agent = td3bc(alpha=1e-3, hidden=(8,))
    batch = transitions(torch.Generator().manual_seed(0), 64)
    signs = torch.tensor([0.5, -0.5]).repeat(32)[:, None].expand(64, 2)
    batch = batch._replace(obs=torch.zeros(64, OBS_DIM), action=signs)

    class Outward(nn.Module):
        def forward(self, obs: Tensor, action: Tensor) -> Tensor:
            return (slope * action.sum(-1)).expand(2, -1) + 1.0

    agent.q = Outward()  # type: ignore[assignment]
    opt = adam(agent.pi.parameters(), 1e-2)
    for _ in range(200):
        minimize(agent.actor_loss(batch), opt)
    action = agent.pi(torch.zeros(1, OBS_DIM)).detach()
    assert float(action.abs().max()) < 0.1


# ------------------------------------------------------------------------------------------------------- observations
def fitted(normalize_obs: bool = True) -> tuple[TD3BC, Batch]:
    cfg = TD3BCConfig(hidden=(16,), normalize_obs=normalize_obs)
    agent = agents.make(TD3BC, Spec(OBS_DIM, 2), cfg)
    assert isinstance(agent, TD3BC)
    data = transitions(torch.Generator().manual_seed(5), 500)
    data = data._replace(obs=data.obs * torch.tensor([3.0, 0.1, 1.0]) + torch.tensor([10.0, 0.0, -4.0]))
    agent.prepare(as_dataset(data))
    return agent, data


def z_score(x: Tensor, data: Batch) -> Tensor:
    wide = data.obs.double().numpy()
    return torch.from_numpy((x.double().numpy() - wide.mean(0)) / (wide.std(0) + 1e-3)).float()


def test_acting_sees_z_scored_observations() -> None:
    agent, data = fitted()
    seen = recorded_inputs(agent.pi)
    obs = data.obs[:5]
    action, _ = agent.act(obs, explore=False)
    torch.testing.assert_close(seen[0][0], z_score(obs, data), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(action, agent.pi(z_score(obs, data)), rtol=1e-4, atol=1e-4)
    predicted, _ = agent.predict(obs.numpy())
    np.testing.assert_allclose(predicted, action.detach().numpy(), rtol=1e-6)


def test_learning_sees_z_scored_observations_and_successors() -> None:
    """Statistics of `obs` serve both, and are never moved by an update."""
    agent, data = fitted()
    before = snapshot(agent.obs_norm)
    seen = {name: recorded_inputs(getattr(agent, name)) for name in ("pi", "q", "pi_lagged", "q_lagged")}
    batch = data.map(lambda x: x[:32])
    for _ in range(2):
        agent.update(batch)
    obs, next_obs = z_score(batch.obs, data), z_score(batch.next_obs, data)
    for name, expected in (("pi", obs), ("q", obs), ("pi_lagged", next_obs), ("q_lagged", next_obs)):
        assert seen[name], name
        for inputs in seen[name]:
            torch.testing.assert_close(inputs[0], expected, rtol=1e-3, atol=1e-3)
    assert differing(agent.obs_norm, before) == []


def test_normalisation_can_be_off() -> None:
    agent, data = fitted(normalize_obs=False)
    torch.testing.assert_close(agent.obs_norm(data.obs), data.obs)


def test_statistics_travel_with_the_weights() -> None:
    agent, data = fitted()
    other = agents.make(TD3BC, Spec(OBS_DIM, 2, seed=1), agent.cfg)
    other.load_state_dict(agent.state_dict())
    assert torch.equal(agent.act(data.obs, explore=False)[0], other.act(data.obs, explore=False)[0])


def test_delayed_updates_are_those_of_td3() -> None:
    agent = td3bc()
    before = snapshot(agent)
    agent.update(batch_for(agent, 0))
    assert all(k.startswith("q.") for k in differing(agent, before))
    agent.update(batch_for(agent, 1))
    assert {k.split(".")[0] for k in differing(agent, before)} == {"q", "pi", "q_lagged", "pi_lagged"}
