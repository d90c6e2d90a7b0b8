"""A2PR: the targets of value and VAE, which action is cloned and where, what the official code leaves undetached."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, as_dataset, batch_for, differing, recorded_inputs, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.a2pr import A2PR
from rlctl.agents.td3bc import TD3BC
from rlctl.nets.distributions import Normal
from rlctl.ops import minimize
from rlctl.ops.td3 import scaled_value_loss
from rlctl.types import Batch

GAMMA = 0.9


def a2pr(**overrides: Any) -> A2PR:
    agent = tiny("a2pr", **overrides)
    assert isinstance(agent, A2PR)
    return agent


def three_rows() -> Batch:
    b = transitions(torch.Generator().manual_seed(0), 3)
    return b._replace(
        action=torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]]),
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
    )


class QByAction(nn.Module):
    """Q_j(s, a) = slope_j * sum(a): tells actions apart."""

    def __init__(self, *slopes: float) -> None:
        super().__init__()
        self.slopes = slopes

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return torch.stack([s * action.sum(-1) for s in self.slopes])


class FixedVAE(nn.Module):
    """Returns a given reconstruction."""

    def __init__(self, out: Tensor) -> None:
        super().__init__()
        self.out = out

    def forward(self, obs: Tensor, action: Tensor, noise: Any = None, generator: Any = None) -> tuple[Tensor, Normal]:
        zero = torch.zeros(len(action), 4)
        return self.out, Normal(zero, zero)


class Echo(nn.Module):
    """Reconstructs every action exactly."""

    def forward(self, obs: Tensor, action: Tensor, noise: Any = None, generator: Any = None) -> tuple[Tensor, Normal]:
        zero = torch.zeros(len(action), 4)
        return action, Normal(zero, zero)


# ------------------------------------------------------------------------------------------------------ critic, value
def test_backup_by_hand(double: None) -> None:
    agent, b = a2pr(gamma=GAMMA), three_rows()
    agent.pi_lagged = Table(torch.full((3, 2), 0.5))  # type: ignore[assignment]
    agent.q_lagged = lagged = Table(torch.tensor([[2.0, 5.0, 1.0], [3.0, 4.0, 0.0]]))  # type: ignore[assignment]
    action, y = agent.backup(b, noise=torch.full((3, 2), -1.0))
    torch.testing.assert_close(action, torch.full((3, 2), 0.3))
    torch.testing.assert_close(y, torch.tensor([1 + GAMMA * 2, 2.0, 3.0]))
    assert torch.equal(lagged.seen[0][0], b.next_obs)
    assert torch.equal(lagged.seen[0][1], action)
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    loss = agent.critic_loss(b, y)
    assert float(loss.detach()) == pytest.approx(float((values.detach() - y).square().mean(1).sum()))


def test_value_target_is_the_smaller_of_two(double: None) -> None:
    """Online critics give [1 + .9 * 4, 2, 3 - .9 * 1] = [4.6, 2, 2.1], y is [2.8, 2, 3]: t = [2.8, 2, 2.1]."""
    agent, b = a2pr(gamma=GAMMA), three_rows()
    y, action = torch.tensor([2.8, 2.0, 3.0]), torch.zeros(3, 2)
    agent.q = online = Table(torch.tensor([[4.0, 7.0, 5.0], [6.0, 8.0, -1.0]]))  # type: ignore[assignment]
    v = torch.tensor([1.0, 1.0, 1.0]).requires_grad_()
    agent.v_data = Table(v)  # type: ignore[assignment]
    loss, value = agent.value_loss(b, action, y)
    expected = torch.tensor([2.8, 2.0, 2.1])
    assert float(loss.detach()) == pytest.approx(float((1 - expected).square().mean()), abs=1e-12)
    torch.testing.assert_close(torch.autograd.grad(loss, v)[0], 2 * (1 - expected) / 3)
    assert not value.requires_grad
    assert torch.equal(value, v.detach())
    assert torch.equal(online.seen[0][0], b.next_obs)
    assert online.seen[0][1] is action  # the same smoothed action as in the backup


def test_value_target_never_exceeds_the_backup() -> None:
    agent = a2pr()
    for seed in range(5):
        b = batch_for(agent, seed)
        action, y = agent.backup(b)
        agent.v_data = Table((y + 0.5).requires_grad_())  # type: ignore[assignment]
        loss, value = agent.value_loss(b, action, y)
        (g,) = torch.autograd.grad(loss, agent.v_data.out)
        assert bool((g >= 2 * 0.5 / len(y) - 1e-6).all())  # V - t >= V - y = 0.5
        assert torch.equal(value, y + 0.5)


# ---------------------------------------------------------------------------------------------------------------- VAE
def test_vae_loss_by_hand(double: None) -> None:
    """Rows whose data action beats the value strictly: Q_1 = [0, 1, 1] against [-1, 1, 0.5] -> rows 0 and 2."""
    agent, b = a2pr(vae_weight=1.5), three_rows()
    agent.q = QByAction(1.0, -9.0)  # type: ignore[assignment]  # the second critic does not matter
    value = torch.tensor([-1.0, 1.0, 0.5])
    rec = torch.tensor([[0.1, 0.2], [0.9, 0.9], [0.5, 0.5]]).requires_grad_()
    mean, log_std = torch.tensor([[0.5, -1.0]] * 3), torch.tensor([[0.7, 1.2]] * 3).log()

    class Given(nn.Module):
        def forward(self, *args: Any) -> tuple[Tensor, Normal]:
            return rec, Normal(mean, log_std)

    agent.vae = Given()  # type: ignore[assignment]
    loss = agent.vae_loss(b, value)
    reconstruction = (0.01 + 0.04 + 0.25 + 0.25) / 6
    assert float(loss.detach()) == pytest.approx(1.5 * reconstruction + 0.5 * 0.3821766936, abs=1e-9)
    (g,) = torch.autograd.grad(loss, rec)
    assert g[1].tolist() == [0.0, 0.0]
    torch.testing.assert_close(g[0], 1.5 * 2 * torch.tensor([0.1, 0.2]) / 6)


def test_the_threshold_of_the_paper(double: None) -> None:
    b, value = three_rows(), torch.tensor([-1.0, 0.0, 0.9])  # advantages 1, 1, 0.1
    for threshold, rows in ((0.0, 3), (0.5, 2), (1.5, 0)):
        agent = a2pr(threshold=threshold)
        agent.q = QByAction(1.0, 1.0)  # type: ignore[assignment]
        rec = (b.action + 1.0).requires_grad_()
        agent.vae = FixedVAE(rec)  # type: ignore[assignment]
        (g,) = torch.autograd.grad(agent.vae_loss(b, value), rec)
        assert int((g != 0).any(-1).sum()) == rows
        _, on = agent.target(b, b.action - 9.0, value)
        assert int(on.sum()) == rows


# ------------------------------------------------------------------------------------------------------- what is cloned
def test_the_better_action_is_the_target(double: None) -> None:
    """Q_1 is the sum of the action; ties take the suggestion, though it is another action."""
    agent, b = a2pr(), three_rows()  # sums of the data: 0, 1, 1
    agent.q = QByAction(1.0, -9.0)  # type: ignore[assignment]
    suggestion = torch.tensor([[0.2, 0.1], [0.1, 0.1], [0.4, 0.6]])  # 0.3, 0.2, 1.0
    target, _ = agent.target(b, suggestion, torch.zeros(3))
    torch.testing.assert_close(target, torch.stack([suggestion[0], b.action[1], suggestion[2]]))
    best = torch.maximum(suggestion.sum(-1), b.action.sum(-1))
    torch.testing.assert_close(target.sum(-1), best)


@pytest.mark.parametrize(
    ("data", "suggestion", "on"),
    [
        (-0.1, -0.2, False),
        (-0.1, 0.1, True),
        (0.1, -0.1, True),
        (0.1, 0.1, True),
        (-0.1, 0.0, True),  # the suggestion need only reach the value
        (0.0, -0.1, False),  # the data action must exceed it
    ],
)
def test_where_to_clone(data: float, suggestion: float, on: bool) -> None:
    agent, b = a2pr(), three_rows()
    agent.q = QByAction(1.0, 0.0)  # type: ignore[assignment]
    b = b._replace(action=torch.tensor([[data, 0.0]] * 3))
    _, got = agent.target(b, torch.tensor([[suggestion, 0.0]] * 3), torch.zeros(3))
    assert got.tolist() == [on] * 3


def actor_gradient(agent: A2PR, b: Batch, value: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(agent.actor_loss(b, value), list(agent.pi.parameters()))


def test_nothing_worth_cloning_leaves_the_value_term_alone(double: None) -> None:
    agent = a2pr(mask=3.0)
    b = batch_for(agent)
    got = actor_gradient(agent, b, torch.full((32,), 1e6))  # every advantage is negative
    action = agent.pi(b.obs)
    plain = scaled_value_loss(agent.q(b.obs, action)[0], agent.cfg.alpha)
    for a, e in zip(got, torch.autograd.grad(plain, list(agent.pi.parameters())), strict=True):
        torch.testing.assert_close(a, e, rtol=0, atol=0)
    cloning = actor_gradient(agent, b, torch.full((32,), -1e6))
    assert any(not torch.allclose(a, e) for a, e in zip(got, cloning, strict=True))


@pytest.mark.parametrize("mask", [0.4, 1.0])
def test_a_suggestion_equal_to_the_data_is_td3bc_times_mask(double: None, mask: float) -> None:
    agent, peer = a2pr(mask=mask, alpha=2.5), tiny("td3bc", alpha=2.5)
    assert isinstance(peer, TD3BC)
    b = batch_for(agent)
    agent.vae = FixedVAE(b.action)  # type: ignore[assignment]
    low = torch.full((32,), -1e6)
    peer.q, peer.pi = agent.q, agent.pi
    params = list(agent.pi.parameters())
    value_part = torch.autograd.grad(scaled_value_loss(agent.q(b.obs, agent.pi(b.obs))[0], 2.5), params)
    theirs = torch.autograd.grad(peer.actor_loss(b), params)
    for ours, v, t in zip(actor_gradient(agent, b, low), value_part, theirs, strict=True):
        torch.testing.assert_close(ours - v, mask * (t - v))


def test_mask_zero_is_td3_with_a_normalised_value(double: None) -> None:
    agent = a2pr(mask=0.0)
    b = batch_for(agent)
    loss = agent.actor_loss(b, torch.full((32,), -1e6))
    expected = scaled_value_loss(agent.q(b.obs, agent.pi(b.obs))[0], agent.cfg.alpha)
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-12)


def test_the_actor_climbs_the_first_critic(double: None) -> None:
    """Q_1 = [0.4, -0.4, 0.8] of mean 0.8 / 3 and mean magnitude 1.6 / 3, though the second is mostly the smaller."""
    agent, b = a2pr(alpha=2.0, mask=0.0), three_rows()
    action = torch.tensor([[0.8, -0.4], [0.2, -0.6], [0.4, 0.4]]).requires_grad_()
    agent.pi, agent.q = Table(action), QByAction(1.0, -9.0)  # type: ignore[assignment]
    loss = agent.actor_loss(b, torch.zeros(3))
    assert float(loss.detach()) == pytest.approx(-2 * 0.8 / 1.6)
    torch.testing.assert_close(torch.autograd.grad(loss, action)[0], torch.full((3, 2), -2 / 1.6))


@pytest.mark.parametrize("detach", [False, True])
def test_gradient_through_the_suggestion(double: None, detach: bool) -> None:
    """A VAE that reconstructs exactly: undetached, the two gradients cancel; detached, the error itself is 0 as well.

    One that halves its input tells the two apart: d(pi - pi / 2)^2 = pi / 2 against pi.
    """

    class Half(nn.Module):
        def forward(self, obs: Tensor, action: Tensor, *args: Any) -> tuple[Tensor, Normal]:
            zero = torch.zeros(len(action), 4)
            return 0.5 * action, Normal(zero, zero)

    agent, b = a2pr(detach_target=detach, mask=1.0, alpha=0.0), three_rows()
    action = torch.tensor([[0.8, -0.4], [0.2, 0.6], [0.4, 0.4]]).requires_grad_()
    agent.pi = Table(action)  # type: ignore[assignment]
    agent.q = Table(torch.zeros(2, 3))  # type: ignore[assignment]  # ties: the suggestion is the target
    agent.vae = Half()  # type: ignore[assignment]
    (g,) = torch.autograd.grad(agent.actor_loss(b, torch.zeros(3)), action)
    torch.testing.assert_close(g, action.detach() * (1.0 if detach else 0.5) / 6)
    agent.vae = Echo()  # type: ignore[assignment]
    (g,) = torch.autograd.grad(agent.actor_loss(b, torch.zeros(3)), action)
    assert torch.equal(g, torch.zeros_like(g))


def test_the_suggestion_reconstructs_the_policys_own_action() -> None:
    agent = a2pr()
    b, noise = batch_for(agent), torch.randn(32, 4, generator=torch.Generator().manual_seed(0))
    seen = recorded_inputs(agent.vae.encoder)
    agent.actor_loss(b, torch.zeros(32), noise)
    torch.testing.assert_close(seen[0][0], torch.cat([b.obs, agent.pi(b.obs).detach()], -1))
    a = agent.actor_loss(b, torch.full((32,), -1e6), noise)
    again = agent.actor_loss(b, torch.full((32,), -1e6), noise)
    other = agent.actor_loss(b, torch.full((32,), -1e6), -noise)
    assert torch.equal(a, again)
    assert not torch.equal(a, other)


# ------------------------------------------------------------------------------------------------------------- update
def test_an_update_by_hand() -> None:
    """Critics; value, on the new critics; VAE, against the OLD value; actor, against the OLD value."""
    for fresh in (False, True):
        agent, by_hand = a2pr(policy_every=1, fresh_value=fresh), a2pr(policy_every=1)
        b = batch_for(agent)
        z = b._replace(obs=by_hand.obs_norm(b.obs), next_obs=by_hand.obs_norm(b.next_obs))
        metrics = agent.update(b)
        action, y = by_hand.backup(z)
        losses = {"losses/critic": minimize(by_hand.critic_loss(z, y), by_hand.opt_q)}
        loss, value = by_hand.value_loss(z, action, y)
        losses["losses/value"] = minimize(loss, by_hand.opt_v)
        if fresh:
            value = by_hand.v_data(z.obs).detach()
        losses["losses/vae"] = minimize(by_hand.vae_loss(z, value), by_hand.opt_vae)
        losses["losses/actor"] = minimize(by_hand.actor_loss(z, value), by_hand.opt_pi)
        assert losses.keys() == {k for k in metrics if k.startswith("losses/")} - {"losses/regulariser"}
        assert all(torch.equal(metrics[k], losses[k]) for k in losses)
        for part in ("pi", "q", "v_data", "vae"):
            assert differing(getattr(by_hand, part), snapshot(getattr(agent, part))) == []


def test_the_actor_and_the_lagged_networks_wait() -> None:
    agent = a2pr()
    before = snapshot(agent)
    first = agent.update(batch_for(agent, 0))
    assert set(first) == {"losses/critic", "losses/value", "losses/vae", "value/q", "value/v"}
    assert {k.split(".")[0] for k in differing(agent, before)} == {"q", "v_data", "vae"}
    assert "losses/actor" in agent.update(batch_for(agent, 1))
    assert {k.split(".")[0] for k in differing(agent, before)} == {"q", "v_data", "vae", "pi", "q_lagged", "pi_lagged"}


def test_every_network_sees_z_scored_observations() -> None:
    agent = a2pr(policy_every=1)
    data = transitions(torch.Generator().manual_seed(5), 500)
    data = data._replace(obs=data.obs * 20 + 7, next_obs=data.next_obs * 20 + 7)
    agent.prepare(as_dataset(data))
    now, then = ("pi", "v_data"), ("pi_lagged", "q_lagged")
    seen = {name: recorded_inputs(getattr(agent, name)) for name in (*now, *then)}
    seen_by_vae = recorded_inputs(agent.vae.encoder)
    b = data.map(lambda x: x[:32])
    agent.update(b)
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    for names, x in ((now, b.obs), (then, b.next_obs)):
        for name in names:
            assert seen[name], name
            for inputs in seen[name]:
                torch.testing.assert_close(inputs[0], (x - mean) / std, rtol=1e-3, atol=1e-3)
    assert len(seen_by_vae) == 2  # for its own loss and for the actor's
    for inputs in seen_by_vae:
        torch.testing.assert_close(inputs[0][:, :3], (b.obs - mean) / std, rtol=1e-3, atol=1e-3)
