"""FQL: its losses by number, fixed points in closed form, what each of them trains."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions, xavier_uniform
from torch import Tensor, nn

from rlctl import agents
from rlctl.agents.fql import FQL, FQLConfig
from rlctl.ops import minimize
from rlctl.types import Batch, Spec


def fql(**overrides: Any) -> FQL:
    agent = tiny("fql", **overrides)
    assert isinstance(agent, FQL)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)


class Parabola(nn.Module):
    """Q_j(s, a) = -|a - c|^2 / (2 l), the same for both critics; whatever the weights."""

    def __init__(self, c: float, l: float) -> None:  # noqa: E741
        super().__init__()
        self.c, self.l = c, l

    def forward(self, obs: Tensor, action: Tensor) -> Tensor:
        return -(action - self.c).square().sum(-1).expand(2, *action.shape[:-1]) / (2 * self.l)


@pytest.mark.parametrize(("agg", "v"), [("mean", [2.5, 3.25, -1.5]), ("min", [1.0, 1.5, -2.0])])
def test_critic_loss_by_hand(double: None, agg: str, v: list[float]) -> None:
    agent = fql(gamma=0.9, q_agg=agg)
    agent.q_lagged = Table(torch.tensor([[1.0, 5.0, -1.0], [4.0, 1.5, -2.0]]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]]).requires_grad_()
    agent.q = Table(values)  # type: ignore[assignment]
    b = rows(3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    noise = torch.randn(3, 2)
    loss = agent.critic_loss(b, noise)
    backup = b.reward + 0.9 * torch.tensor(v) * torch.tensor([1.0, 0.0, 1.0])
    assert float(loss.detach()) == pytest.approx(float((values.detach() - backup).square().mean()), abs=1e-12)
    obs, action = agent.q_lagged.seen[0]
    assert torch.equal(obs, b.next_obs)
    assert torch.equal(action, agent.pi.decode(b.next_obs, noise))  # the one-step policy's, not the flow's


def test_how_the_networks_begin() -> None:
    """All Xavier-uniform; the critics' layer norms follow their activations, no other network has any."""
    agent = agents.make("fql", Spec(3, 2), FQLConfig(hidden=(64, 64)))
    assert isinstance(agent, FQL)
    for net in (agent.flow, agent.pi, agent.q):
        assert xavier_uniform(net)
    hidden = [nn.Linear, nn.GELU, nn.LayerNorm]
    for member in agent.q.members:
        assert [isinstance(m, k) for m, k in zip(member, [*hidden, *hidden, nn.Linear], strict=True)] == [True] * 7
    assert not any(isinstance(m, nn.LayerNorm) for net in (agent.flow, agent.pi) for m in net.modules())


def with_map(agent: FQL, mu: Tensor, g: Tensor) -> None:
    """Make the policy's map `mu` and the flow's `g`, whatever goes in."""
    agent.pi.unclipped = lambda obs, noise: mu  # type: ignore[method-assign]
    agent.flow.decode = lambda obs, noise: g  # type: ignore[method-assign]


@pytest.mark.parametrize("alpha", [0.1, 1.0, 50.0])
def test_fixed_point_in_closed_form(double: None, alpha: float) -> None:
    """alpha (mu - g)^2 + (mu - c)^2 / (2 l) is least at mu = (2 alpha g + c / l) / (2 alpha + 1 / l); one dimension."""
    c, l, g = 0.5, 0.3, torch.tensor([[-0.6], [0.1], [0.4]])  # noqa: E741
    agent = fql(alpha=alpha)
    agent.q = Parabola(c, l)  # type: ignore[assignment]
    mu = ((2 * alpha * g + c / l) / (2 * alpha + 1 / l)).requires_grad_()
    with_map(agent, mu, g)
    b = rows(3)._replace(action=torch.zeros(3, 1))
    loss, distance = agent.actor_loss(b, torch.zeros(3, 1))
    (grad,) = torch.autograd.grad(loss, mu)
    assert float(grad.abs().max()) < 1e-12
    assert float(distance) == pytest.approx(float((mu - g).detach().square().mean()))


def test_the_distance_sees_the_unclipped_map_and_the_value_the_clipped_one(double: None) -> None:
    agent = fql(alpha=2.0)
    agent.q = Parabola(0.5, 0.3)  # type: ignore[assignment]
    mu = torch.tensor([[1.5, 0.2]], requires_grad=True)
    with_map(agent, mu, torch.tensor([[1.0, 0.2]]))
    b = rows(1)
    loss, distance = agent.actor_loss(b, torch.zeros(1, 2))
    assert float(distance) == pytest.approx(0.25 / 2)
    assert float(loss.detach()) == pytest.approx(2 * 0.125 + (0.25 + 0.09) / 0.6)
    (grad,) = torch.autograd.grad(loss, mu)
    assert grad[0].tolist() == pytest.approx([2 * 2 * 0.5 / 2, (0.2 - 0.5) / 0.3])  # no pull of Q beyond the box


def test_normalised_values_do_not_depend_on_the_scale_of_rewards(double: None) -> None:
    grads = []
    for scale in (1.0, 70.0):
        agent = fql(normalize_q=True, alpha=0.0)
        agent.q = Parabola(0.5, 0.3 / scale)  # type: ignore[assignment]
        mu = torch.tensor([[0.1, 0.2]], requires_grad=True)
        with_map(agent, mu, torch.zeros(1, 2))
        grads.append(torch.autograd.grad(agent.actor_loss(rows(1), torch.zeros(1, 2))[0], mu)[0])
    torch.testing.assert_close(grads[0], grads[1])
    # |Q| = |mu - c|^2 / (2 l) is a constant of the step: the gradient is 2 (mu - c) / |mu - c|^2
    assert grads[0][0].tolist() == pytest.approx([-0.8 / 0.25, -0.6 / 0.25])


def test_flow_loss_by_number(double: None) -> None:
    agent, b = fql(), rows(2)
    b = b._replace(action=torch.tensor([[0.5, 0.0], [-0.5, 1.0]]))
    agent.flow.net = Table(torch.zeros(2, 2))  # type: ignore[assignment]
    loss = agent.flow_loss(b, torch.tensor([[1.0, 0.0], [0.5, 1.0]]), torch.tensor([0.2, 0.9]))
    assert float(loss) == pytest.approx((0.25 + 0 + 1 + 0) / 4)
    _, x, _ = agent.flow.net.seen[0]
    torch.testing.assert_close(x, torch.tensor([[0.9, 0.0], [-0.4, 1.0]]))


def test_no_loss_trains_another_s_network() -> None:
    """The policy's loss moves neither flow nor critics: their steps are those of their own losses alone."""
    agent, twin = fql(), fql()
    b = batch_for(agent)
    agent.update(b)
    b = twin.seen(b)
    losses = twin.critic_loss(b), twin.flow_loss(b)
    for loss, opt in zip(losses, (twin.opt_q, twin.opt_flow), strict=True):
        minimize(loss, opt)
    assert differing(agent.q, snapshot(twin.q)) == []
    assert differing(agent.flow, snapshot(twin.flow)) == []
    assert differing(agent.pi, snapshot(twin.pi))


def test_all_losses_are_taken_before_any_step() -> None:
    agent, twin = fql(), fql()
    for seed in range(2):
        b = batch_for(agent, seed)
        agent.update(b)
        b = twin.seen(b)
        losses = twin.critic_loss(b), twin.flow_loss(b), twin.actor_loss(b)[0]
        grads = [
            torch.autograd.grad(loss, list(m.parameters()))
            for loss, m in zip(losses, (twin.q, twin.flow, twin.pi), strict=True)
        ]
        for g, opt in zip(grads, (twin.opt_q, twin.opt_flow, twin.opt_pi), strict=True):
            opt.step_with(g)
        for slow, fast in zip(twin.q_lagged.parameters(), twin.q.parameters(), strict=True):
            slow.data.lerp_(fast.data, twin.cfg.tau)
    for x, y in zip(agent.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(x, y)


def test_a_large_alpha_reproduces_the_flow_s_map() -> None:
    """Four modes in the data: the one-step policy takes each noise where the flow takes it, Q or no Q."""
    agent = fql(alpha=1e4, lr=3e-3, hidden=(64, 64), normalize_obs=False)
    g = torch.Generator().manual_seed(0)
    for k in range(700):
        b = transitions(g, 128)
        modes = torch.randint(0, 2, (128, 2), generator=g) * 1.6 - 0.8
        for opt in (agent.opt_flow, agent.opt_pi, agent.opt_q):
            opt.param_groups[0]["lr"] = 3e-3 * (1 - k / 700)
        agent.update(b._replace(action=modes, obs=torch.zeros(128, 3), next_obs=torch.zeros(128, 3)))
    obs, noise = torch.zeros(2000, 3), torch.randn(2000, 2, generator=g)
    with torch.no_grad():
        target, ours = agent.flow.decode(obs, noise), agent.pi.decode(obs, noise)
    assert float(target.std()) > 0.6  # the flow has learned modes
    assert float((ours - target).square().mean()) < 0.02


def test_without_distillation_the_policy_finds_the_best_action() -> None:
    agent = fql(alpha=0.0, lr=3e-3)
    agent.q = Parabola(0.4, 1.0)  # type: ignore[assignment]
    b = batch_for(agent)
    for _ in range(200):
        minimize(agent.actor_loss(b)[0], agent.opt_pi)
    action, _ = agent.act(b.obs, explore=True)
    assert float((action - 0.4).abs().mean().detach()) < 0.05


def test_data_actions_stay_off_the_edge() -> None:
    agent, b = fql(), rows(2)
    seen = agent.seen(b._replace(action=torch.tensor([[1.0, -1.0], [0.3, 2.0]])))
    near = 1 - 1e-5
    torch.testing.assert_close(seen.action, torch.tensor([[near, -near], [0.3, near]]))
