"""Mirror-descent weights and Tsallis logarithms against closed-form steps, discrete and Gaussian."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import Tensor

from rlctl.ops.mirror import MirrorForm, mirror_weights, tsallis_log

pytestmark = pytest.mark.usefixtures("double")

OLD, Q = [0.2, 0.3, 0.5], [1.0, 0.0, -1.0]


def step(old: Tensor, q: Tensor, weights: tuple[float, float]) -> Tensor:
    """The distribution that minimises E_pi[x log pi + y log pi_old - Q]: pi ~ pi_old^(-y / x) exp(Q / x)."""
    x, y = weights
    return ((-y * old.log() + q) / x).softmax(-1)


def gaussian_step(mean: float, std: float, weights: tuple[float, float]) -> tuple[float, float]:
    """The same for pi_old = N(mean, std) and Q(a) = -0.75 (a - 2)^2: (mean, precision)."""
    x, y = weights
    precision = (-y / std**2 + 1.5) / x
    return (-y * mean / std**2 + 3.0) / x / precision, precision


@pytest.mark.parametrize(
    ("kl_coef", "alpha", "form", "expected"),
    [
        (2.0, 0.0, "exact", [0.35342001, 0.32154011, 0.32503989]),
        (2.0, 0.0, "linearised", [0.35342001, 0.32154011, 0.32503989]),
        (1.0, 0.2, "linearised", [0.55849654, 0.2841836, 0.15731985]),
        (1.0, 0.2, "exact", [0.49637297, 0.30243968, 0.20118735]),
        (0.0, 0.2, "exact", [0.99326, 0.00669, 0.0000451]),
        (0.2, 0.2, "linearised", [0.99326, 0.00669, 0.0000451]),
    ],
)
def test_three_arms(kl_coef: float, alpha: float, form: MirrorForm, expected: list[float]) -> None:
    new = step(torch.tensor(OLD), torch.tensor(Q), mirror_weights(kl_coef, alpha, form))
    assert new.tolist() == pytest.approx(expected, abs=1e-8 if expected[2] > 0.001 else 5e-6)


def test_three_arms_kl_of_the_hard_step() -> None:
    old = torch.tensor(OLD)
    new = step(old, torch.tensor(Q), mirror_weights(2.0, 0.0, "exact"))
    assert float((new * (new / old).log()).sum()) == pytest.approx(0.0835298661, abs=1e-10)


@pytest.mark.parametrize(
    ("kl_coef", "alpha", "form", "mean", "std"),
    [
        (2.0, 0.0, "exact", 0.8571428571, 0.7559289460),
        (1.0, 0.2, "linearised", 1.3043478261, 0.6593804734),
        (0.2, 0.2, "linearised", 2.0, 0.3651483717),
        (0.0, 0.2, "exact", 2.0, 0.3651483717),
        (1.0, 0.2, "exact", 1.2, 0.6928203230),
    ],
)
def test_gaussian_steps(kl_coef: float, alpha: float, form: MirrorForm, mean: float, std: float) -> None:
    m, precision = gaussian_step(0.0, 1.0, mirror_weights(kl_coef, alpha, form))
    assert (m, precision**-0.5) == pytest.approx((mean, std), abs=1e-10)


def test_repeated_linearised_steps() -> None:
    weights, mean, std, seen = mirror_weights(1.0, 0.2, "linearised"), 0.0, 1.0, []
    for _ in range(4):
        mean, precision = gaussian_step(mean, std, weights)
        std = precision**-0.5
        seen += [mean, std]
    assert seen == pytest.approx([1.3043, 0.6594, 1.6168, 0.5472, 1.7546, 0.4896, 1.8307, 0.4547], abs=5e-5)


def test_a_small_weight_leaves_the_linearised_form_without_a_second_step() -> None:
    """c = 0.09 < alpha / 2: after one step no Gaussian maximises the objective any more; the exact form goes on."""
    for form, valid in (("linearised", False), ("exact", True)):
        weights = mirror_weights(0.09, 0.2, form)  # type: ignore[arg-type]
        mean, precision = gaussian_step(0.0, 1.0, weights)
        assert precision > 0
        assert (gaussian_step(mean, precision**-0.5, weights)[1] > 0) == valid


@pytest.mark.parametrize(("kl_coef", "alpha"), [(1.0, 0.2), (0.5, 0.2), (3.0, 1.0), (0.15, 0.2)])
def test_contraction_towards_the_soft_optimum(kl_coef: float, alpha: float) -> None:
    """The precision's distance to that of exp(Q / alpha) shrinks by c / (alpha + c), or by 1 - alpha / c."""
    for form, factor in (("exact", kl_coef / (alpha + kl_coef)), ("linearised", 1 - alpha / kl_coef)):
        weights = mirror_weights(kl_coef, alpha, form)  # type: ignore[arg-type]
        _, precision = gaussian_step(0.3, 0.9, weights)
        assert precision - 1.5 / alpha == pytest.approx(factor * (0.9**-2 - 1.5 / alpha), rel=1e-10)


# ------------------------------------------------------------------------------------------------------------- Tsallis
@pytest.mark.parametrize(("q", "expected"), [(1.0, -1.2039728), (1.5, -0.9045549), (2.0, -0.7)])
def test_tsallis_log_by_number(q: float, expected: float) -> None:
    assert float(tsallis_log(torch.tensor(0.3).log(), q)) == pytest.approx(expected, abs=5e-8)


def test_tsallis_log_is_log_at_one_and_near_it() -> None:
    logp = torch.tensor([-30.0, -2.0, 0.0, 3.0])
    assert tsallis_log(logp, 1.0) is logp
    torch.testing.assert_close(tsallis_log(logp, 1 + 1e-9), logp, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("q", [1.0, 1.3, 2.0])
def test_the_divergence_is_stationary_at_the_old_policy(q: float) -> None:
    """alpha = 0, Q = 0: the Bregman divergence alone, whose minimum is the old policy. The factor q makes it so."""
    old = torch.tensor(OLD)
    for shift, at_old in ((0.0, True), (0.3, False)):
        logits = (old.log() + torch.tensor([shift, 0.0, 0.0])).requires_grad_()
        pi = logits.softmax(-1)
        x, y = mirror_weights(0.7, 0.0, "exact", q)
        loss = (pi * (x * tsallis_log(pi.log(), q) + y * tsallis_log(old.log(), q))).sum()
        (g,) = torch.autograd.grad(loss, logits)
        assert (float(g.abs().max()) < 1e-12) == at_old


@pytest.mark.parametrize("q", [1.0, 1.6, 2.0])
def test_both_forms_have_the_same_first_gradient(q: float) -> None:
    """At pi = pi_old the tangent of the entropy is the entropy's own slope, for every weight of the divergence."""
    old, reward, slopes = torch.tensor(OLD), torch.tensor(Q), []
    for form, c in itertools.product(("exact", "linearised"), (0.5, 2.0)):
        logits = old.log().requires_grad_()
        pi = logits.softmax(-1)
        x, y = mirror_weights(c, 0.3, form, q)  # type: ignore[arg-type]
        loss = (pi * (x * tsallis_log(pi.log(), q) + y * tsallis_log(old.log(), q) - reward)).sum()
        slopes.append(torch.autograd.grad(loss, logits)[0])
    for slope in slopes[1:]:
        torch.testing.assert_close(slope, slopes[0])
    assert float(slopes[0].abs().max()) > 0.1
