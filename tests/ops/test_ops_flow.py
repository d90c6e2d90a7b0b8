"""Flow matching: paths, solvers, and Gaussian data in closed form."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlctl.ops.flow import Method, Velocity, advanced, interpolated
from rlctl.ops.selection import best_of, drawn


def gaussian_velocity(m: float, s: float) -> Velocity:
    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return m + (t * s**2 - (1 - t)) / ((1 - t) ** 2 + t**2 * s**2) * (x - t * m)

    return velocity


def carried(velocity: Velocity, x: Tensor, steps: int, method: Method = "euler") -> Tensor:
    """From noise to data in equal steps, the field asked at t = k / steps as `FlowPolicy` does."""
    for k in range(steps):
        x = advanced(velocity, x, torch.tensor(k / steps), 1 / steps, method)
    return x


@pytest.mark.parametrize(
    ("s", "steps", "std"),
    [(0.5, 1, 0.0), (0.5, 4, 0.34054), (0.5, 10, 0.43078), (0.5, 50, 0.48540), (0.1, 10, 0.06172)],
)
def test_euler_on_gaussian_data_by_number(double: None, s: float, steps: int, std: float) -> None:
    """The field is affine: the image of 0 is the mean, the difference of the images of 1 and 0 the spread."""
    ends = carried(gaussian_velocity(0.3, s), torch.tensor([0.0, 1.0]), steps)
    assert float(ends[0]) == pytest.approx(0.3, abs=1e-12)
    assert float(ends[1] - ends[0]) == pytest.approx(std, abs=6e-6)


def test_midpoint_is_of_second_order(double: None) -> None:
    """dx/dt = x from 1: one midpoint step of dt gives 1 + dt + dt^2 / 2."""
    one, zero = torch.ones(1), torch.zeros(())
    assert float(advanced(lambda x, t: x, one, zero, 0.4, "midpoint")) == pytest.approx(1.48, abs=1e-12)
    assert float(advanced(lambda x, t: x, one, zero, 0.4)) == pytest.approx(1.4, abs=1e-12)
    errors = [abs(float(carried(lambda x, t: x, one, n, "midpoint")) - 2.718281828459045) for n in (10, 20)]
    assert errors[0] / errors[1] == pytest.approx(4, rel=0.1)


def test_paths_run_from_noise_to_data(double: None) -> None:
    g = torch.Generator().manual_seed(0)
    noise, data = torch.randn(5, 2, generator=g), torch.randn(5, 2, generator=g)
    x = interpolated(noise, data, torch.tensor([0.0, 0.2, 0.5, 0.9, 1.0])[:, None])
    assert torch.equal(x[0], noise[0])
    assert torch.equal(x[-1], data[-1])
    torch.testing.assert_close(x[1], 0.8 * noise[1] + 0.2 * data[1])


def test_choosing_among_candidates() -> None:
    actions = torch.arange(12.0).reshape(2, 3, 2)
    assert best_of(actions, torch.tensor([[0.0, 2.0, 1.0], [5.0, 5.0, 1.0]])).tolist() == [[2, 3], [6, 7]]
    weights = torch.tensor([1.0, 0.0, 3.0]).expand(2, 3)
    assert drawn(actions, weights, torch.tensor([0.24, 0.26])).tolist() == [[0, 1], [10, 11]]
    assert drawn(actions, weights, torch.tensor([0.0, 0.9999999])).tolist() == [[0, 1], [10, 11]]
    many = drawn(
        actions[:1].expand(4000, 3, 2), weights[:1].expand(4000, 3), generator=torch.Generator().manual_seed(0)
    )
    assert float((many[:, 0] == 0).float().mean()) == pytest.approx(0.25, abs=0.03)
    assert not bool((many[:, 0] == 2).any())
