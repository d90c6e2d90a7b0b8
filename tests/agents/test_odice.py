"""ODICE: the numbers of a linear value, the ablations, the bandit, the policy's weights, what an update touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import batch_for, differing, snapshot, tiny, transitions
from torch import Tensor, nn

from rlctl.agents.odice import ODICE
from rlctl.ops import gradients, minimize
from rlctl.types import Batch


def odice(**overrides: Any) -> ODICE:
    agent = tiny("odice", **overrides)
    assert isinstance(agent, ODICE)
    return agent


class LinearValue(nn.Module):
    """V(s) = w . s, one value."""

    def __init__(self, weight: list[float]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))

    def forward(self, obs: Tensor) -> Tensor:
        return (obs @ self.weight)[None]


def linear(**overrides: Any) -> tuple[ODICE, Batch]:
    """The fixture: two transitions, the second terminated."""
    agent = odice(**({"gamma": 0.99, "lam": 0.6, "eta": 1.0} | overrides))
    agent.v, agent.v_lagged = LinearValue([0.5, -0.2, 0.1]), LinearValue([0.4, -0.1, 0.0])  # type: ignore[assignment]
    agent.v_lagged.requires_grad_(False)
    agent.opt_v = torch.optim.SGD(agent.v.parameters(), 1.0)  # type: ignore[assignment]  # a step is the gradient
    b = transitions(torch.Generator().manual_seed(0), 2)
    return agent, b._replace(
        obs=torch.tensor([[1.0, 0.0, 0.5], [0.0, 1.0, -0.5]]),
        next_obs=torch.tensor([[0.0, 1.0, 0.0], [1.0, 1.0, 0.0]]),
        reward=torch.tensor([1.0, -0.5]),
        terminated=torch.tensor([False, True]),
    )


G_F, G_B = [-0.35265, -0.2625, -0.045075], [0.0, 0.356697, 0.0]
PLAIN = [0.2, 0.2, 0.0]


def test_linear_value_by_number(double: None) -> None:
    agent, b = linear()
    losses = agent.value_losses(b)
    assert losses.residual.tolist()[0] == pytest.approx([0.351, -0.25], abs=1e-9)
    assert losses.backward is not None
    y_b = torch.tensor([0.402, -0.4])
    assert float(losses.backward.detach()) == pytest.approx(0.6 * float((y_b + y_b.square() / 4).mean()), abs=1e-9)
    for loss, expected in ((losses.forward, G_F), (losses.backward, G_B), (losses.plain, PLAIN)):
        (g,) = gradients(loss, agent.opt_v, retain_graph=True)
        assert g.tolist() == pytest.approx(expected, abs=1e-8)


def moved(agent: ODICE, b: Batch) -> tuple[list[float], float]:
    """The gradient a value step takes, and c."""
    before = agent.v.weight.detach().clone()  # type: ignore[union-attr]
    c = agent.value_step(agent.value_losses(b))
    return (before - agent.v.weight.detach()).tolist(), float(c)  # type: ignore[operator]


def test_the_step_is_the_orthogonal_sum_and_the_plain_gradient(double: None) -> None:
    step, c = moved(*linear())
    assert c == pytest.approx(-0.4794313826, abs=1e-8)
    assert step == pytest.approx([-0.3217214771, 0.1683462621, -0.0666853696], abs=1e-8)


def test_without_the_backward_gradient_it_is_the_semi_gradient(double: None) -> None:
    expected = [f + p for f, p in zip(G_F, PLAIN, strict=True)]
    for settings in ({"eta": 0.0}, {"gradient": "semi"}):
        step, c = moved(*linear(**settings))
        assert step == pytest.approx(expected, abs=1e-9)
        assert c == 0.0


def test_eta_zero_learns_as_the_semi_gradient_bit_for_bit() -> None:
    ours, theirs = odice(eta=0.0), odice(gradient="semi")
    for seed in range(4):
        ours.update(batch_for(ours, seed)), theirs.update(batch_for(theirs, seed))
    assert differing(ours, snapshot(theirs)) == []
    full = odice()
    for seed in range(4):
        full.update(batch_for(full, seed))
    assert differing(full.v, snapshot(theirs.v))


def test_the_true_gradient(double: None) -> None:
    """One residual, y = r + gamma (1 - d) V(s') - V(s) = [.252, -.25], differentiated in both values."""
    agent, b = linear(gradient="true", eta=7.0)  # eta plays no part
    assert agent.value_losses(b).residual.tolist()[0] == pytest.approx([1 - 0.99 * 0.2 - 0.55, -0.25])
    w = agent.v.weight  # type: ignore[union-attr]
    y = b.reward + 0.99 * ~b.terminated * (b.next_obs @ w) - b.obs @ w  # type: ignore[operator]
    loss = 0.6 * (y + y.square() / 4).mean() + 0.4 * (b.obs @ w).mean()  # type: ignore[operator]
    (expected,) = torch.autograd.grad(loss, w)  # type: ignore[arg-type]
    step, c = moved(agent, b)
    assert step == pytest.approx(expected.tolist(), abs=1e-9)
    assert c == 0.0


class ConstantValue(nn.Module):
    def __init__(self, value: float) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.tensor([value]))

    def forward(self, obs: Tensor) -> Tensor:
        return self.value.expand(len(obs))[None]


@pytest.mark.parametrize(
    ("rewards", "lam", "value"),
    [
        ([0.0, 1.0], 0.5, 0.5),
        ([0.0, 1.0], 0.6, 7 / 6),
        ([0.0, 1.0], 0.8, 2.0),
        ([0.0, 10.0], 0.5, 8.0),
        ([0.0, 10.0], 0.6, 28 / 3),
        ([0.0, 10.0], 0.8, 11.0),
        ([0.0, 10.0], 0.9, 104 / 9),
    ],
)
def test_terminal_bandit_stands_still_at_its_solution(
    double: None, rewards: list[float], lam: float, value: float
) -> None:
    """All gradients cancel there, and behind a termination there is no backward one. Weights by number."""
    agent = odice(lam=lam)
    b = transitions(torch.Generator().manual_seed(0), 2)
    b = b._replace(reward=torch.tensor(rewards), terminated=torch.tensor([True, True]))
    for start, direction in ((value, 0.0), (value + 0.1, 1.0), (value - 0.1, -1.0)):
        agent.v = agent.v_lagged = ConstantValue(start)  # type: ignore[assignment]
        agent.opt_v = torch.optim.SGD(agent.v.parameters(), 1.0)  # type: ignore[assignment]
        losses = agent.value_losses(b)
        assert losses.backward is not None
        assert float(gradients(losses.backward, agent.opt_v, retain_graph=True)[0]) == 0.0
        agent.value_step(losses)
        step = start - float(agent.v.value.detach())  # type: ignore[union-attr, arg-type]
        assert step == pytest.approx(0.0, abs=1e-9) if direction == 0 else step * direction > 1e-3
        if direction == 0:
            expected = [[max(r - value, 0.0) for r in rewards]]
            assert agent.weight(losses.residual).tolist()[0] == pytest.approx(expected[0])
    if value >= max(rewards):
        assert expected == [[0.0, 0.0]]  # nothing is left to clone: why rewards must be large


def test_twins_back_up_the_smaller_and_learn_both(double: None) -> None:
    agent = odice(num_v=2, gamma=0.9, lam=0.6, eta=1.0)
    b = batch_for(agent).map(lambda x: x.double() if x.is_floating_point() else x)
    losses = agent.value_losses(b)
    low = agent.v_lagged(b.next_obs).amin(0)
    expected = b.reward + 0.9 * low * ~b.terminated - agent.v(b.obs)
    torch.testing.assert_close(losses.residual, expected.detach())
    assert losses.residual.shape == (2, 32)
    assert losses.backward is not None
    y_b = b.reward + 0.9 * agent.v(b.next_obs) * ~b.terminated - agent.v_lagged(b.obs).amin(0)
    conjugate = torch.where(y_b > -2, y_b + y_b.square() / 4, -1.0)
    assert float(losses.backward.detach()) == pytest.approx(0.6 * float(conjugate.mean().detach()))
    assert odice(num_v=1).value_losses(batch_for(agent)).residual.shape == (1, 32)


# -------------------------------------------------------------------------------------------------------------- policy
def test_weights_by_number() -> None:
    y = torch.tensor([[-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]])
    assert odice().weight(y).tolist() == [[0, 0, 0, 0, 1, 2, 4]]
    assert odice(policy_weight="dual").weight(y).tolist() == [[0, 0, 0.5, 1, 1.5, 2, 3]]
    assert odice(max_weight=1.5).weight(y).tolist() == [[0, 0, 0, 0, 1, 1.5, 1.5]]
    torch.testing.assert_close(odice(divergence="reverse-kl").weight(y), (y - 1).exp())
    assert odice().weight(torch.tensor([1e6])).tolist() == [100.0]


def test_policy_loss_by_hand(double: None) -> None:
    """Both values' weights on the same log-probabilities, and their mean over 2 B."""
    agent = odice()
    b = batch_for(agent).map(lambda x: x[:3].double() if x.is_floating_point() else x[:3])
    residual = torch.tensor([[1.0, -1.0, 0.5], [0.0, 200.0, -2.0]])
    weights = torch.tensor([[1.0, 0.0, 0.5], [0.0, 100.0, 0.0]])
    logp = agent.pi(b.obs).log_prob(b.action)
    expected = -(weights[0] * logp + weights[1] * logp).sum() / 6
    assert float(agent.policy_loss(b, residual).detach()) == pytest.approx(float(expected.detach()))
    assert float(agent.policy_loss(b, -residual.abs()).detach()) == 0.0


def test_policy_is_a_bounded_gaussian() -> None:
    agent, obs = odice(), torch.randn(4, 3)
    with torch.no_grad():
        for raw, bounded in ((-9.0, -5.0), (0.3, 0.3), (9.0, 2.0)):
            agent.pi.log_std.fill_(raw)
            assert agent.pi(obs).log_std.tolist() == pytest.approx([bounded] * 2)
        agent.pi.mean[-1].bias.fill_(7.0)
        assert float(agent.pi(obs).mode.max()) > 2.0  # unbounded mean
        limited = odice(tanh_mean=True)
        limited.pi.mean[-1].bias.fill_(7.0)
        assert float(limited.pi(obs).mode.max()) <= 1.0


def test_weight_decay_is_the_policys_alone() -> None:
    agent = odice(weight_decay=0.01)
    assert agent.opt_pi.param_groups[0]["weight_decay"] == 0.01
    assert agent.opt_v.param_groups[0]["weight_decay"] == 0.0


# -------------------------------------------------------------------------------------------------------------- update
def test_the_policy_sees_the_residuals_of_before_the_step() -> None:
    agent, by_hand = odice(tau=0.5), odice()  # a large tau tells the new values from the old in the lagged ones
    b = batch_for(agent)
    metrics = agent.update(b)
    losses = by_hand.value_losses(b)
    by_hand.value_step(losses)
    stale = minimize(by_hand.policy_loss(b, losses.residual), by_hand.opt_pi)
    assert torch.equal(metrics["losses/policy"], stale)
    assert differing(by_hand.pi, snapshot(agent.pi)) == []
    assert differing(by_hand.v, snapshot(agent.v)) == []
    assert not torch.equal(by_hand.value_losses(b).residual, losses.residual)
    slow = agent.v_lagged.state_dict()
    for k, old in by_hand.v_lagged.state_dict().items():
        torch.testing.assert_close(slow[k], old + 0.5 * (agent.v.state_dict()[k] - old))


def test_gradients_stay_with_their_networks() -> None:
    agent = odice()
    b = batch_for(agent)
    losses = agent.value_losses(b)
    assert not losses.residual.requires_grad
    pi = list(agent.pi.parameters())
    for loss in (losses.forward, losses.backward, losses.plain):
        assert loss is not None
        assert all(g is None for g in torch.autograd.grad(loss, pi, retain_graph=True, allow_unused=True))
    v = list(agent.v.parameters())
    assert all(g is None for g in torch.autograd.grad(agent.policy_loss(b, losses.residual), v, allow_unused=True))


def test_at_the_start_backward_nearly_opposes_forward() -> None:
    """With the lagged values equal and gamma near 1, g_b is close to -g_f: without projection nothing would be left."""
    agent = odice(gamma=0.999, num_v=1)
    b = batch_for(agent)
    b = b._replace(next_obs=b.obs + 1e-3, reward=0 * b.reward, terminated=torch.zeros_like(b.terminated))
    losses = agent.value_losses(b)
    assert losses.backward is not None
    f, g = (
        torch.cat([x.flatten() for x in gradients(y, agent.opt_v, retain_graph=True)])
        for y in (losses.forward, losses.backward)
    )
    assert float(torch.cosine_similarity(f, g, 0)) < -0.99
    assert float(agent.value_step(losses)) == pytest.approx(-1.0, abs=0.05)


@pytest.mark.parametrize("name", ["odice", "odice-il"])
def test_actions_are_clipped_to_the_box(name: str) -> None:
    """Exploring as well as evaluating; ODICE-IL keeps its mean within the box, not its draws."""
    agent: Any = tiny(name, tanh_mean=False)
    obs = 1e4 * torch.randn(50, agent.spec.obs_dim, generator=torch.Generator().manual_seed(0))
    assert float(agent.pi(agent.obs_norm(obs)).mode.detach().abs().max()) > 1.0
    for explore in (False, True):
        assert float(agent.act(obs, explore)[0].detach().abs().max()) == 1.0
