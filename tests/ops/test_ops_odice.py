"""The dual of ODICE: conjugates by number, by maximisation and by finite differences; the orthogonal sum."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar

from rlctl.ops.odice import Divergence, conjugate, dual_weight, orthogonal_sum

Y = [-3.0, -2.0, -1.0, 0.0, 1.0, 2.0, 4.0]
every_divergence = pytest.mark.parametrize("divergence", get_args(Divergence))


def test_chi2_by_number(double: None) -> None:
    y = torch.tensor(Y)
    assert conjugate(y, "chi2").tolist() == pytest.approx([-1, -1, -0.75, 0, 1.25, 3, 8], abs=1e-12)
    assert dual_weight(y, "chi2").tolist() == pytest.approx([0, 0, 0.5, 1, 1.5, 2, 3], abs=1e-12)


def test_chi2_is_the_maximum_over_nonnegative_weights(double: None) -> None:
    """f*(y) = max_{w >= 0} w y - (w - 1)^2, and the weight is where."""
    w = torch.linspace(0, 6, 60_001)
    for y in torch.linspace(-5, 8, 27):
        best = (w * y - (w - 1).square()).max(0)
        assert float(conjugate(y, "chi2")) == pytest.approx(float(best.values), abs=1e-7)
        assert float(dual_weight(y, "chi2")) == pytest.approx(float(w[best.indices]), abs=1e-4)


def test_reverse_kl_is_the_maximum_over_positive_weights(double: None) -> None:
    """f(w) = w log w: f*(y) = exp(y - 1)."""
    w = torch.linspace(1e-6, 12, 120_001)
    for y in torch.linspace(-3, 3, 13):
        best = (w * y - w * w.log()).max(0)
        assert float(conjugate(y, "reverse-kl")) == pytest.approx(float(best.values), abs=1e-6)
        assert float(dual_weight(y, "reverse-kl")) == pytest.approx(float(w[best.indices]), abs=2e-3)


@every_divergence
def test_the_weight_is_the_slope(double: None, divergence: Divergence) -> None:
    """By central differences away from the kink, and by autograd everywhere."""
    y = torch.tensor([-4.0, -2.5, -1.5, -0.3, 0.0, 0.7, 3.0, 4.0]).requires_grad_()
    eps = 1e-5
    slope = (conjugate(y + eps, divergence) - conjugate(y - eps, divergence)) / (2 * eps)
    torch.testing.assert_close(dual_weight(y, divergence), slope, rtol=1e-7, atol=1e-7)
    (g,) = torch.autograd.grad(conjugate(y, divergence).sum(), y)
    torch.testing.assert_close(g, dual_weight(y, divergence).detach())


def test_chi2_is_smooth_at_the_kink(double: None) -> None:
    around = torch.tensor([-2 - 1e-7, -2.0, -2 + 1e-7])
    torch.testing.assert_close(conjugate(around, "chi2"), torch.full((3,), -1.0), rtol=0, atol=1e-13)
    torch.testing.assert_close(dual_weight(around, "chi2"), torch.zeros(3), rtol=0, atol=1e-7)


@every_divergence
def test_convex(double: None, divergence: Divergence) -> None:
    a, b = torch.randn(2, 500, generator=torch.Generator().manual_seed(0)) * 4
    middle = conjugate((a + b) / 2, divergence)
    assert bool((middle <= (conjugate(a, divergence) + conjugate(b, divergence)) / 2 + 1e-12).all())


BANDITS = [
    ([0.0, 1.0], 0.5, 0.5),
    ([0.0, 1.0], 0.6, 1.166667),
    ([0.0, 1.0], 0.8, 2.0),
    ([0.0, 10.0], 0.5, 8.0),
    ([0.0, 10.0], 0.6, 9.333333),
    ([0.0, 10.0], 0.8, 11.0),
    ([0.0, 10.0], 0.9, 11.555556),
]


@pytest.mark.parametrize(("rewards", "lam", "value"), BANDITS)
def test_terminal_bandit(double: None, rewards: list[float], lam: float, value: float) -> None:
    """argmin_V (1 - lam) V + lam E[f*(r - V)], where E[max((r - V) / 2 + 1, 0)] = (1 - lam) / lam."""
    r = torch.tensor(rewards)

    def objective(v: float) -> float:
        return (1 - lam) * v + lam * float(conjugate(r - v, "chi2").mean())

    found = minimize_scalar(objective, bounds=(-5, 20), method="bounded", options={"xatol": 1e-9}).x
    assert found == pytest.approx(value, abs=1e-5)
    assert float(dual_weight(r - value, "chi2").mean()) == pytest.approx((1 - lam) / lam, abs=1e-6)


# ------------------------------------------------------------------------------------------------------- orthogonal sum
def flat(parts: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([p.flatten() for p in parts])


def test_orthogonal_sum_by_number(double: None) -> None:
    g_f = torch.tensor([-0.35265, -0.2625, -0.045075])
    g_b = torch.tensor([0.0, 0.356697, 0.0])
    total, c = orthogonal_sum([g_f], [g_b])
    assert float(c) == pytest.approx(-0.4794313826, abs=1e-8)
    assert total[0].tolist() == pytest.approx([-0.5217214771, -0.0316537379, -0.0666853696], abs=1e-8)


@given(st.integers(0, 10_000), st.floats(-3, 3), st.floats(0.01, 100.0))
def test_what_is_added_is_orthogonal(seed: int, lean: float, scale: float) -> None:
    g = torch.Generator().manual_seed(seed)
    shapes = [(3, 4), (4,), (1, 4), ()]
    g_f = [scale * torch.randn(s, generator=g, dtype=torch.float64) for s in shapes]
    g_b = [lean * f + torch.randn(f.shape, generator=g, dtype=torch.float64) for f in g_f]
    total, _ = orthogonal_sum(g_f, g_b)
    assert [t.shape for t in total] == [f.shape for f in g_f]
    f, added = flat(g_f), flat(total) - flat(g_f)
    assert abs(float(added @ f)) <= 1e-9 * float(f @ f + flat(g_b) @ flat(g_b))
    assert float(flat(total) @ f) == pytest.approx(float(f @ f), rel=1e-6)
    # one product over all parameters: cutting them into other pieces changes nothing
    again, _ = orthogonal_sum([flat(g_f)], [flat(g_b)])
    torch.testing.assert_close(again[0], flat(total))


def test_one_product_for_all_parameters_not_one_per_layer(double: None) -> None:
    g_f, g_b = [torch.tensor([1.0]), torch.tensor([1.0])], [torch.tensor([1.0]), torch.tensor([-1.0])]
    total, c = orthogonal_sum(g_f, g_b)
    assert float(c) == 0.0  # per layer it would be 1 and -1
    assert flat(total).tolist() == [2.0, 0.0]


def test_limits(double: None) -> None:
    g_f = [torch.tensor([3.0, -4.0])]
    assert torch.equal(orthogonal_sum(g_f, [torch.zeros(2)])[0][0], g_f[0])  # nothing to add
    torch.testing.assert_close(orthogonal_sum(g_f, [-0.998 * g_f[0]])[0][0], g_f[0])  # opposed: nothing cancels
    g_b = [torch.tensor([1.0, 2.0])]
    assert torch.equal(orthogonal_sum([torch.zeros(2)], g_b)[0][0], g_b[0])  # no direction to be orthogonal to
    assert np.isfinite(float(orthogonal_sum([torch.zeros(2)], g_b)[1]))
