"""Noise schedules and reverse steps: published tables by number, Gaussian data in closed form."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlctl.ops.diffusion import (
    Prediction,
    alpha_bars,
    noised,
    predicted_data,
    predicted_noise,
    regression_target,
    reverse_steps,
)

VP = [(5, 0.195875, 0.835031), (10, 0.057764, 0.613452), (20, 0.017225, 0.385917)]


@pytest.mark.parametrize(("steps", "first", "last"), VP)
def test_vp_by_number(steps: int, first: float, last: float) -> None:
    """ab_T = exp(-0.1 - 0.5 * 9.9) whatever T is."""
    ab = alpha_bars("vp", steps)
    assert len(ab) == steps + 1
    assert float(ab[0]) == 1
    assert float(ab[-1]) == pytest.approx(math.exp(-5.05), rel=1e-12)
    assert float(ab[-1]) == pytest.approx(0.0064093, abs=1e-7)
    beta = 1 - ab[1:] / ab[:-1]
    assert float(beta[0]) == pytest.approx(first, abs=1e-6)
    assert float(beta[-1]) == pytest.approx(last, abs=1e-6)


def test_cosine_and_linear_by_number() -> None:
    cosine = alpha_bars("cosine", 10)
    beta = 1 - cosine[1:] / cosine[:-1]
    assert float(beta[0]) == pytest.approx(0.027907, abs=1e-6)
    assert float(beta[-1]) == pytest.approx(0.999, abs=1e-12)  # clipped, and the table made from what was clipped
    assert float(alpha_bars("linear", 10)[-1]) == pytest.approx(0.9037, abs=1e-4)
    assert float(alpha_bars("linear", 1000)[-1]) < 1e-4
    for name in ("vp", "cosine", "linear"):
        assert bool((alpha_bars(name, 7).diff() < 0).all())  # type: ignore[arg-type]


def test_what_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown noise schedule 'sine': vp, cosine or linear"):
        alpha_bars("sine", 5)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="at least one step"):
        alpha_bars("vp", 0)
    with pytest.raises(ValueError, match="5 levels is sampled in 1 to 5 steps, not 6"):
        reverse_steps(alpha_bars("vp", 5), 6)
    with pytest.raises(ValueError, match=r"of eta=1, not eta=0.5"):
        reverse_steps(alpha_bars("vp", 5), eta=0.5, variance="beta")


@pytest.mark.parametrize("steps", [5, 10, 20])
def test_posterior_coefficients(steps: int) -> None:
    """c1 = beta sqrt(ab_p) / (1 - ab), c2 = (1 - ab_p) sqrt(alpha) / (1 - ab), and c1 + c2 sqrt(ab) = sqrt(ab_p)."""
    ab = alpha_bars("vp", steps)
    r = reverse_steps(ab)
    assert r.level.tolist() == list(range(steps, 0, -1))
    for k in range(steps):
        a, p = ab[steps - k], ab[steps - k - 1]
        beta = 1 - a / p
        assert float(r.of_data[k]) == pytest.approx(float(beta * p.sqrt() / (1 - a)), abs=1e-14)
        assert float(r.of_x[k]) == pytest.approx(float((1 - p) * (1 - beta).sqrt() / (1 - a)), abs=1e-14)
        assert float(r.std[k]) == pytest.approx(float((beta * (1 - p) / (1 - a)).sqrt()), abs=1e-14)
        assert float(r.of_data[k] + r.of_x[k] * a.sqrt()) == pytest.approx(float(p.sqrt()), abs=1e-14)
    assert (float(r.of_data[-1]), float(r.of_x[-1]), float(r.std[-1])) == (1, 0, 0)  # the last step adds no noise


def test_ddim_steps_over_a_subsequence() -> None:
    """Leading spacing; e' recomputed from the denoised estimate; the last step goes to the data itself."""
    ab = alpha_bars("cosine", 100)
    r = reverse_steps(ab, 5, eta=0.0)
    assert r.level.tolist() == [81, 61, 41, 21, 1]
    x, x0 = torch.tensor(0.7, dtype=torch.float64), torch.tensor(-0.2, dtype=torch.float64)
    for k, after in enumerate([61, 41, 21, 1, 0]):
        e = (x - r.alpha_bar[k].sqrt() * x0) / (1 - r.alpha_bar[k]).sqrt()
        expected = ab[after].sqrt() * x0 + (1 - ab[after]).sqrt() * e
        assert float(r.of_data[k] * x0 + r.of_x[k] * x) == pytest.approx(float(expected), abs=1e-14)
    assert r.std.tolist() == [0.0] * 5
    half = reverse_steps(ab, 5, eta=0.5).std
    torch.testing.assert_close(half, 0.5 * reverse_steps(ab, 5, eta=1.0).std)


MOMENTS = [
    ("vp", 5, {"eta": 0.0}, 0.2923, 0.3222),
    ("vp", 5, {}, 0.2995, 0.2954),
    ("vp", 5, {"variance": "beta"}, 0.2995, 0.4435),
    ("vp", 10, {"eta": 0.0}, 0.2903, 0.4051),
    ("vp", 10, {}, 0.2995, 0.3643),
    ("vp", 10, {"variance": "beta"}, 0.2995, 0.5089),
    ("vp", 20, {"eta": 0.0}, 0.2892, 0.4509),
    ("vp", 20, {}, 0.2995, 0.4143),
    ("vp", 20, {"variance": "beta"}, 0.2995, 0.5144),
    ("cosine", 10, {"eta": 0.0}, 0.2994, 0.4269),
    ("cosine", 10, {}, 0.3000, 0.3887),
    ("cosine", 10, {"variance": "beta"}, 0.3000, 0.5217),
]


@pytest.mark.parametrize(("schedule", "steps", "how", "mean", "std"), MOMENTS)
def test_gaussian_data_by_number(schedule: Any, steps: int, how: dict[str, Any], mean: float, std: float) -> None:
    """Data N(0.3, 0.5^2), the exact field, a standard-normal start: every step is affine, so moments are exact."""
    m, s = 0.3, 0.5
    r = reverse_steps(alpha_bars(schedule, steps), **how)
    mu, var = 0.0, 1.0
    for k in range(steps):
        ab = r.alpha_bar[k]

        def data(x: float, ab: torch.Tensor = ab) -> float:
            x_i = torch.tensor(x, dtype=torch.float64)
            noise = (1 - ab).sqrt() * (x_i - ab.sqrt() * m) / (ab * s**2 + 1 - ab)
            return float(predicted_data(noise, x_i, ab))

        slope = float(r.of_data[k]) * (data(1.0) - data(0.0)) + float(r.of_x[k])
        mu, var = slope * mu + float(r.of_data[k]) * data(0.0), slope**2 * var + float(r.std[k]) ** 2
    assert mu == pytest.approx(mean, abs=6e-5)
    assert var**0.5 == pytest.approx(std, abs=6e-5)


@pytest.mark.parametrize("kind", ["eps", "x0", "v"])
def test_what_a_network_predicts_is_turned_into_noise_and_data(double: None, kind: Prediction) -> None:
    g = torch.Generator().manual_seed(0)
    data, noise = torch.randn(6, 2, generator=g), torch.randn(6, 2, generator=g)
    ab = torch.tensor([0.99, 0.7, 0.5, 0.3, 0.1, 0.0064])[:, None]
    x = noised(data, noise, ab)
    out = regression_target(kind, data, noise, ab)
    eps = predicted_noise(kind, out, x, ab)
    torch.testing.assert_close(eps, noise)
    torch.testing.assert_close(predicted_data(eps, x, ab), data)
    if kind == "v":  # at ab = 1/2: (eps - x_0) / sqrt 2
        torch.testing.assert_close(out[2], (noise - data)[2] / 2**0.5)
