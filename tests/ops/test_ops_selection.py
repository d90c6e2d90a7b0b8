"""The best few of several candidates, and gradient ascent that keeps the best point it passes."""

from __future__ import annotations

import pytest
import torch

from rlctl.nets import QEnsemble
from rlctl.ops.selection import climbed, top


def test_top() -> None:
    actions = torch.arange(8.0).reshape(2, 4, 1)
    values = torch.tensor([[0.0, 3.0, 1.0, 2.0], [5.0, 4.0, 7.0, 6.0]])
    assert top(actions, values, 3).squeeze(-1).tolist() == [[1.0, 3.0, 2.0], [6.0, 7.0, 4.0]]


def test_a_linear_value_is_climbed_by_steps_times_size_times_slope(double: None) -> None:
    slope, start = torch.tensor([0.5, -2.0]), torch.tensor([[0.1, 0.2], [0.0, -0.9]])
    best, value = climbed(lambda a: a @ slope, start, steps=10, size=0.03)
    torch.testing.assert_close(best, (start + 0.3 * slope).clamp(-1, 1), rtol=0, atol=1e-14)
    torch.testing.assert_close(value, best @ slope)


@pytest.mark.parametrize("steps", [0, 1, 7])
def test_a_parabola_is_climbed_geometrically(double: None, steps: int) -> None:
    """a_T - c = (1 - eta / l)^T (a_0 - c) for Q = -(a - c)^2 / (2 l)."""
    c, width, eta = 0.3, 2.0, 0.5
    start = torch.linspace(-1, 1, 5).reshape(5, 1)
    best, _ = climbed(lambda a: -(a - c).square().sum(-1) / (2 * width), start, steps, eta, bound=10.0)
    torch.testing.assert_close(best - c, (1 - eta / width) ** steps * (start - c), rtol=0, atol=1e-14)


def test_the_best_point_of_the_way_is_kept_where_steps_are_too_long(double: None) -> None:
    """eta > 2 l goes away from the top at each step: the start is the best."""
    start = torch.tensor([[0.2], [-0.4]])
    best, value = climbed(lambda a: -a.square().sum(-1) / 2, start, 5, 2.5, bound=100.0)
    assert torch.equal(best, start)
    torch.testing.assert_close(value, -start[:, 0].square() / 2)


def test_critics_are_climbed_without_gradients_of_their_weights() -> None:
    q = QEnsemble(3, 2, (64, 64), 2)  # one autograd node each: its weights want a gradient by themselves
    obs, start = torch.randn(50, 3), torch.rand(50, 4, 2) * 2 - 1
    with torch.no_grad():
        best, value = climbed(lambda a: q(obs, a).mean(0), start, 20, 2.0)
        before, after = q(obs, start).mean(0), q(obs, best).mean(0)
    assert not best.requires_grad
    assert not value.requires_grad
    assert all(p.grad is None for p in q.parameters())
    assert float(best.abs().max()) <= 1
    torch.testing.assert_close(after, value)
    assert bool((after >= before).all())
    assert float((after - before).mean()) > 0.01
