"""Gaussian and squashed Gaussian: hand numbers, quadrature, Monte Carlo, and torch.distributions as a check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlctl.nets import Normal, TanhNormal
from rlctl.nets import distributions as module

pytestmark = pytest.mark.usefixtures("double")


def t(*values: float) -> Tensor:
    return torch.tensor(values)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


NEW = ([0.3, -0.5], [0.8, 1.2])


def new_and_old() -> tuple[Normal, Normal]:
    return Normal(t(*NEW[0]), t(*NEW[1]).log()), Normal(torch.zeros(2), torch.zeros(2))


# ---------------------------------------------------------------------------------------------------------- Gaussian
def test_gaussian_hand_numbers() -> None:
    new, old = new_and_old()
    a = t(0.25, -1.0)
    logp_new, logp_old = new.log_prob(a), old.log_prob(a)
    log_ratio = logp_new - logp_old
    assert float(new.kl(old)) == pytest.approx(0.2508219945, abs=1e-10)
    assert float(old.kl(new)) == pytest.approx(0.2447682833, abs=1e-10)
    assert float(new.entropy()) == pytest.approx(2.7970550719, abs=1e-10)
    assert float(logp_new) == pytest.approx(-1.8858137524, abs=1e-10)
    assert float(logp_old) == pytest.approx(-2.3691270664, abs=1e-10)
    assert float(log_ratio.exp() - 1 - log_ratio) == pytest.approx(0.1381245306, abs=1e-10)


def test_gaussian_with_a_squashed_mean_has_no_jacobian() -> None:
    assert float(Normal(t(0.4).tanh(), t(0.0)).log_prob(t(0.9))) == pytest.approx(-1.0541650741, abs=1e-10)


def test_gaussian_equals_torch_and_sums_over_the_last_dimension() -> None:
    mean, log_std, action = (torch.randn(4, 5, 3, generator=generator(i)) for i in range(3))
    other = Normal(torch.randn(4, 5, 3, generator=generator(3)), torch.randn(3, generator=generator(4)))
    ours, theirs = Normal(mean, log_std), torch.distributions.Normal(mean, log_std.exp())
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action).sum(-1))
    torch.testing.assert_close(ours.entropy(), theirs.entropy().sum(-1))
    kl = torch.distributions.kl_divergence(theirs, torch.distributions.Normal(other.mean, other.log_std.exp()))
    torch.testing.assert_close(ours.kl(other), kl.sum(-1))
    assert ours.log_prob(action).shape == (4, 5)


def test_gaussian_with_one_log_std_for_all_states() -> None:
    pi = Normal(torch.randn(6, 2, generator=generator()), t(0.1, -0.3))
    assert pi.entropy().shape == (6,)
    assert pi.log_prob(torch.zeros(6, 2)).shape == (6,)
    assert float(pi.entropy()[0]) == pytest.approx(-0.2 + math.log(2 * math.pi * math.e), abs=1e-12)


def test_one_log_std_for_all_dimensions_must_be_spread_out_first() -> None:
    with pytest.raises(ValueError, match=r"\(4, 3\) and log_std \(4, 1\) differ in the last dimension"):
        Normal(torch.zeros(4, 3), torch.zeros(4, 1))


@pytest.mark.parametrize("direction", ["new||old", "old||new"])
def test_fisher_information(direction: str) -> None:
    """Both KL directions have the Hessian diag(1 / s^2, 2) in (mean, log s) at new = old."""
    s = math.log(0.7)

    def kl(theta: Tensor) -> Tensor:
        new, old = Normal(theta[:1], theta[1:]), Normal(t(0.2), t(s))
        return new.kl(old) if direction == "new||old" else old.kl(new)

    hessian = torch.autograd.functional.hessian(kl, t(0.2, s))
    torch.testing.assert_close(hessian, torch.diag(t(2.0408163265, 2.0)), rtol=0, atol=1e-9)


def test_gaussian_sample_is_reparameterised() -> None:
    mean, log_std = t(0.3, -0.5).requires_grad_(), t(0.2, -1.0).requires_grad_()
    noise = t(1.5, -2.0)
    sample = Normal(mean, log_std).sample(noise=noise)
    torch.testing.assert_close(sample.detach(), mean.detach() + log_std.detach().exp() * noise)
    g_mean, g_log_std = torch.autograd.grad(sample.sum(), [mean, log_std])
    torch.testing.assert_close(g_mean, torch.ones(2))
    torch.testing.assert_close(g_log_std, log_std.detach().exp() * noise)


@pytest.mark.parametrize("cls", [Normal, TanhNormal])
def test_draws_come_from_the_generator_alone(cls: type[Normal] | type[TanhNormal]) -> None:
    pi = cls(torch.zeros(5, 2), torch.zeros(2))
    torch.manual_seed(1)
    first = pi.sample(generator=generator(7))
    state = torch.get_rng_state()
    torch.manual_seed(2)
    second = pi.sample(generator=generator(7))
    assert torch.equal(first, second)
    assert not torch.equal(first, pi.sample(generator=generator(8)))
    torch.manual_seed(1)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("cls", [Normal, TanhNormal])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dtypes_are_kept(cls: type[Normal] | type[TanhNormal], dtype: torch.dtype) -> None:
    pi = cls(torch.zeros(5, 2, dtype=dtype), torch.zeros(2, dtype=dtype))
    sample = pi.sample(generator=generator())
    assert sample.dtype == pi.log_prob(sample).dtype == pi.mode.dtype == dtype


# -------------------------------------------------------------------------------------------------- squashed Gaussian
@pytest.mark.parametrize(
    ("u", "expected"), [(0.5, -0.8037095193), (-1.5, -0.3330581912), (3.0, -0.8002815240), (8.0, -18.3052326693)]
)
def test_squashed_hand_numbers(u: float, expected: float) -> None:
    """u = 8 is where the form with `+ 1e-6` inside the logarithm is off by more than a nat."""
    pi = TanhNormal(t(0.0), t(0.0))
    assert float(pi.log_prob_pre_tanh(t(u))) == pytest.approx(expected, abs=1e-9)
    action, logp = pi.sample_log_prob(noise=t(u))
    assert float(logp) == pytest.approx(expected, abs=1e-9)
    assert float(action) == pytest.approx(math.tanh(u), abs=1e-15)


def test_the_usual_floor_of_the_jacobian_is_off_by_more_than_a_nat() -> None:
    """log(1 - tanh(u)^2 + 1e-6) at u = 8: what the exact form is there to avoid."""
    u = t(8.0)
    floored = Normal(t(0.0), t(0.0)).log_prob(u) - (1 - u.tanh().square() + 1e-6).log()
    assert float(floored) == pytest.approx(-19.4750884909, abs=1e-9)
    assert float(TanhNormal(t(0.0), t(0.0)).log_prob_pre_tanh(u) - floored) > 1.16


def test_squashed_hand_numbers_add_up_over_dimensions() -> None:
    pi = TanhNormal(torch.zeros(2, 2), torch.zeros(2))
    u = torch.tensor([[0.5, -1.5], [3.0, 8.0]])
    expected = t(-0.8037095193 - 0.3330581912, -0.8002815240 - 18.3052326693)
    torch.testing.assert_close(pi.log_prob_pre_tanh(u), expected, rtol=0, atol=1e-9)
    torch.testing.assert_close(pi.sample_log_prob(noise=u)[1], expected, rtol=0, atol=1e-9)


@pytest.mark.parametrize("u", [-40.0, -12.0, 0.0, 12.0, 40.0])
def test_squashed_log_prob_stays_finite_and_exact_far_out(u: float) -> None:
    """The Jacobian there is 4 exp(-2|u|) (1 + tiny)."""
    pre = t(u).requires_grad_()
    logp = TanhNormal(t(0.0), t(0.0)).log_prob_pre_tanh(pre)
    jacobian = -2 * abs(u) + math.log(4) - 2 * math.log1p(math.exp(-2 * abs(u)))
    assert float(logp.detach()) == pytest.approx(-u * u / 2 - 0.5 * math.log(2 * math.pi) - jacobian, rel=1e-11)
    (slope,) = torch.autograd.grad(logp, pre)
    assert float(slope) == pytest.approx(-u + 2 * math.tanh(u), abs=1e-9)


@pytest.mark.parametrize(
    ("mean", "std", "entropy"),
    [
        (0.0, 1.0, 0.669804),
        (0.0, 0.5, 0.499967),
        (0.0, 0.1, -0.893597),
        (1.0, 0.5, -0.253388),
        (0.0, 2.0, -0.001233),
        (0.0, 0.0897328, -1.0),
    ],
)
def test_squashed_entropy(mean: float, std: float, entropy: float) -> None:
    """-E[log pi] by fixed-seed Monte Carlo (within four standard errors) and by quadrature over u."""
    n = 200_000
    pi = TanhNormal(torch.full((n, 1), mean), torch.full((n, 1), math.log(std)))
    _, logp = pi.sample_log_prob(generator=generator(3))
    error = float(logp.std()) / n**0.5
    assert abs(-float(logp.mean()) - entropy) < 4 * error + 1e-6
    z = torch.linspace(-12, 12, 40_001)[:, None]
    grid = TanhNormal(torch.full_like(z, mean), torch.full_like(z, math.log(std)))
    weight = (-0.5 * z[:, 0].square()).exp() / math.sqrt(2 * math.pi)
    integral = -torch.trapezoid(weight * grid.sample_log_prob(noise=z)[1], z[:, 0])
    assert float(integral) == pytest.approx(entropy, abs=1e-6)


def test_no_squashed_entropy_exceeds_log_two_per_dimension() -> None:
    """That of the uniform density on (-1, 1), which standard deviations near 0.87 come closest to."""
    z = torch.linspace(-12, 12, 8001)[:, None, None]
    mean, std = torch.meshgrid(torch.linspace(-1, 1, 5), torch.linspace(0.05, 3, 60), indexing="ij")
    pi = TanhNormal(mean.reshape(-1, 1), std.reshape(-1, 1).log())
    logp = pi.spread(len(z)).sample_log_prob(noise=z.expand(-1, 300, 1))[1]
    weight = (-0.5 * z[:, 0].square()).exp() / math.sqrt(2 * math.pi)
    entropy = -torch.trapezoid(weight * logp, z[:, 0], dim=0)
    assert 0.67 < float(entropy.max()) < math.log(2)
    each = TanhNormal(torch.zeros(1, 3), torch.full((1, 3), math.log(0.87)))  # and per dimension, their sum
    draws = each.spread(4000).sample_log_prob(generator=generator())[1]
    assert 3 * 0.66 < -float(draws.mean()) < 3 * math.log(2)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (1.0, 0.5), (-0.4, 0.2)])
def test_squashed_density_integrates_to_one(mean: float, std: float) -> None:
    a = torch.linspace(-1 + 1e-6, 1 - 1e-6, 400_001)[:, None]
    density = TanhNormal(t(mean), t(math.log(std))).log_prob(a).exp()
    assert float(torch.trapezoid(density, a[:, 0])) == pytest.approx(1.0, abs=2e-4)


def test_squashed_equals_torch() -> None:
    mean, log_std = torch.randn(6, 3, generator=generator(0)), 0.3 * torch.randn(6, 3, generator=generator(1))
    base = torch.distributions.Normal(mean, log_std.exp())
    theirs = torch.distributions.TransformedDistribution(base, torch.distributions.TanhTransform())
    action = TanhNormal(mean, log_std).sample(generator=generator(2))
    torch.testing.assert_close(TanhNormal(mean, log_std).log_prob(action), theirs.log_prob(action).sum(-1))


def test_three_ways_to_the_same_log_prob() -> None:
    pi = TanhNormal(torch.randn(50, 2, generator=generator(0)), torch.full((50, 2), -0.5))
    noise = torch.randn(50, 2, generator=generator(1))
    action, logp = pi.sample_log_prob(noise=noise)
    torch.testing.assert_close(action, pi.sample(noise=noise))
    torch.testing.assert_close(logp, pi.log_prob_pre_tanh(pi.mean + pi.log_std.exp() * noise))
    torch.testing.assert_close(logp, pi.log_prob(action), rtol=1e-7, atol=1e-7)
    assert logp.shape == (50,)


def test_sample_log_prob_has_the_gradient_of_its_definition() -> None:
    """Through both the action and the density: d/d(mean, log s) of log pi(a(mean, s)) at fixed noise."""
    noise = torch.randn(7, 2, generator=generator(1))
    grads = []
    for ours in (True, False):
        mean, log_std = (torch.randn(7, 2, generator=generator(i)).requires_grad_() for i in (2, 3))
        if ours:
            action, logp = TanhNormal(mean, log_std).sample_log_prob(noise=noise)
        else:
            u = mean + log_std.exp() * noise
            action = u.tanh()
            logp = (torch.distributions.Normal(mean, log_std.exp()).log_prob(u) - (1 - action.square()).log()).sum(-1)
        grads.append(torch.autograd.grad((logp * (1 + action.sum(-1))).sum(), [mean, log_std]))
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8)


def test_log_prob_of_the_bounds_is_finite() -> None:
    """Replayed actions of exactly +-1 are clamped, in float32 too."""
    for dtype in (torch.float32, torch.float64):
        mean = torch.zeros(1, dtype=dtype, requires_grad=True)
        logp = TanhNormal(mean, torch.zeros(1, dtype=dtype)).log_prob(torch.tensor([[1.0], [-1.0]], dtype=dtype))
        assert bool(logp.isfinite().all())
        assert bool(torch.autograd.grad(logp.sum(), mean)[0].isfinite().all())


def test_mode_and_kl_of_the_squashed() -> None:
    new, old = new_and_old()
    squashed_new, squashed_old = TanhNormal(*vars(new).values()), TanhNormal(*vars(old).values())
    torch.testing.assert_close(squashed_new.mode, t(*NEW[0]).tanh())
    assert float(squashed_new.kl(squashed_old)) == pytest.approx(0.2508219945, abs=1e-10)
    n = 200_000
    wide = TanhNormal(squashed_new.mean.expand(n, 2), squashed_new.log_std)
    action, logp = wide.sample_log_prob(generator=generator(5))
    ratio = logp - squashed_old.log_prob(action)
    assert abs(float(ratio.mean()) - 0.2508219945) < 4 * float(ratio.std()) / n**0.5


def test_standard_normal_passes_noise_on() -> None:
    noise = torch.ones(2)
    assert module.standard_normal(torch.zeros(2), noise, None) is noise


def test_several_draws_of_each_distribution(double: None) -> None:
    pi = TanhNormal(torch.randn(4, 2), torch.randn(4, 2))
    noise = torch.randn(7, 4, 2)
    action, logp = pi.spread(7).sample_log_prob(noise)
    for k in range(7):
        one, logp_one = pi.sample_log_prob(noise[k])
        torch.testing.assert_close(action[k], one)
        torch.testing.assert_close(logp[k], logp_one)
    drawn = pi.spread(3).sample(generator=torch.Generator().manual_seed(0))
    assert drawn.shape == (3, 4, 2)
    assert not torch.equal(drawn[0], drawn[1])
