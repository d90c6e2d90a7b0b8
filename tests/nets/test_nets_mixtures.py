"""Gaussian mixtures, squashed and not: hand numbers, quadrature; Monte-Carlo KL and entropy with their gradients."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from rlctl.nets import (
    GaussianPolicy,
    MixturePolicy,
    Normal,
    NormalMixture,
    TanhGaussianPolicy,
    TanhMixturePolicy,
    TanhNormal,
    TanhNormalMixture,
)
from rlctl.nets.distributions import Distribution, entropy, k3, kl, mc_entropy, mc_kl, take

pytestmark = pytest.mark.usefixtures("double")

W = [0.2, 0.5, 0.3]
MEAN, STD = [[-1.0], [0.0], [1.5]], [[0.5], [0.3], [0.8]]
MEAN_2D, STD_2D = [[-1.0, 0.2], [0.0, 0.5], [1.5, -0.7]], [[0.5, 0.4], [0.3, 0.9], [0.8, 0.6]]


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def mixture(w: Any = W, mean: Any = MEAN, std: Any = STD) -> NormalMixture:
    return NormalMixture(torch.tensor(w).log(), Normal(torch.tensor(mean), torch.tensor(std).log()))


def squashed(p: NormalMixture) -> TanhNormalMixture:
    return TanhNormalMixture(p.logits, TanhNormal(p.components.mean, p.components.log_std))


def random_mixture(seed: int, *lead: int, num: int = 3, dim: int = 2) -> NormalMixture:
    g = generator(seed)
    logits, mean = torch.randn(*lead, num, generator=g), torch.randn(*lead, num, dim, generator=g)
    return NormalMixture(logits, Normal(mean, 0.3 * torch.randn(*lead, num, dim, generator=g) - 0.3))


# ---------------------------------------------------------------------------------------------------------- densities
def test_hand_numbers_1d() -> None:
    p, a = mixture(), torch.tensor([0.4])
    expected = [-4.1457913526, -0.6038546178, -1.6411074819]
    assert p.component_log_probs(a).tolist() == pytest.approx(expected, abs=1e-10)
    assert float(p.log_prob(a)) == pytest.approx(-1.0946823073, abs=1e-10)
    assert float(squashed(p).log_prob_pre_tanh(a)) == pytest.approx(-0.9387753365, abs=1e-10)
    assert float(a.tanh()) == pytest.approx(0.3799489623, abs=1e-10)
    assert float(squashed(p).log_prob(a.tanh())) == pytest.approx(-0.9387753365, abs=1e-10)


def test_hand_numbers_2d() -> None:
    p, a = mixture(W, MEAN_2D, STD_2D), torch.tensor([0.1, 0.3])
    expected = [-2.6796891540, -0.6087906601, -4.0240467802]
    assert p.component_log_probs(a).tolist() == pytest.approx(expected, abs=1e-10)
    assert float(p.log_prob(a)) == pytest.approx(-1.2341392256, abs=1e-10)
    assert p.responsibilities(a).tolist() == pytest.approx([0.0471233, 0.9344486, 0.0184281], abs=5e-8)


@pytest.mark.parametrize("squash", [False, True])
def test_density_integrates_to_one(squash: bool) -> None:
    p = mixture()
    x = torch.linspace(-1 + 1e-7, 1 - 1e-7, 800_001) if squash else torch.linspace(-8, 9, 100_001)
    density = (squashed(p) if squash else p).log_prob(x[:, None]).exp()
    assert float(torch.trapezoid(density, x)) == pytest.approx(1.0, abs=2e-4)


@pytest.mark.parametrize("squash", [False, True])
def test_equal_components_are_one_whatever_the_weights(squash: bool) -> None:
    one = TanhNormal(torch.randn(5, 2, generator=generator()), torch.zeros(5, 2))
    same = TanhNormal(one.mean.unsqueeze(1).expand(5, 4, 2), one.log_std.unsqueeze(1).expand(5, 4, 2))
    p = TanhNormalMixture(torch.randn(5, 4, generator=generator(1)), same)
    a = torch.rand(5, 2, generator=generator(2)) * 1.8 - 0.9
    if squash:
        torch.testing.assert_close(p.log_prob(a), one.log_prob(a))
    else:
        torch.testing.assert_close(p.unsquashed.log_prob(a), one.unsquashed.log_prob(a))


@pytest.mark.parametrize("squash", [False, True])
def test_the_mixture_is_denser_than_each_weighted_component(squash: bool) -> None:
    p: Any = random_mixture(0, 6)
    p = squashed(p) if squash else p
    a = torch.rand(6, 2, generator=generator(1)) * 1.8 - 0.9
    assert bool((p.log_prob(a).unsqueeze(-1) >= p.log_weights + p.component_log_probs(a)).all())
    torch.testing.assert_close(p.weights.sum(-1), torch.ones(6))
    torch.testing.assert_close(p.log_weights.exp(), p.weights)
    torch.testing.assert_close(p.responsibilities(a).sum(-1), torch.ones(6))


def test_log_prob_does_not_underflow() -> None:
    """17 dimensions, ten standard deviations out: the density is exp(-850) and its logarithm is exact."""
    p = NormalMixture(torch.zeros(3), Normal(torch.zeros(3, 17), torch.zeros(3, 17)))
    expected = Normal(torch.zeros(17), torch.zeros(17)).log_prob(torch.full((17,), 10.0))
    assert float(expected) < -800
    assert float(p.log_prob(torch.full((17,), 10.0))) == pytest.approx(float(expected), rel=1e-12)


def test_one_component_is_its_component_bit_for_bit() -> None:
    one = TanhNormal(torch.randn(5, 2, generator=generator()), 0.1 * torch.randn(5, 2, generator=generator(1)))
    p = TanhNormalMixture(torch.randn(5, 1), TanhNormal(one.mean.unsqueeze(1), one.log_std.unsqueeze(1)))
    a = torch.rand(5, 2, generator=generator(2)) * 1.8 - 0.9
    assert torch.equal(p.log_prob(a), one.log_prob(a))
    assert torch.equal(p.unsquashed.log_prob(a), one.unsquashed.log_prob(a))
    assert torch.equal(p.mode, one.mode)
    assert torch.equal(p.sample(generator=generator(7)), one.sample(generator=generator(7)))  # no draw for the gate


# ------------------------------------------------------------------------------------------------------------ sampling
def test_choose_inverts_the_distribution_function() -> None:
    p = NormalMixture(torch.tensor([0.25, 0.0, 0.75]).log().expand(4, 3), Normal(torch.zeros(4, 3, 1), torch.zeros(1)))
    uniform = torch.tensor([0.0, 0.2499, 0.25, 0.9999])
    assert p.choose(uniform).tolist() == [0, 0, 2, 2]
    never_first = NormalMixture(torch.tensor([0.0, 1.0]).log(), Normal(torch.zeros(2, 1), torch.zeros(1)))
    assert int(never_first.choose(torch.tensor(0.0))) == 1


def test_draws_follow_the_weights_and_the_components() -> None:
    n = 100_000
    p = NormalMixture(
        torch.tensor(W).log().expand(n, 3), Normal(torch.tensor(MEAN).expand(n, 3, 1), torch.tensor(STD).log())
    )
    k = p.choose(generator=generator())
    share = torch.stack([(k == i).double().mean() for i in range(3)])
    assert share.tolist() == pytest.approx(W, abs=4 * 0.5 / n**0.5)
    a = p.sample(generator=generator())[:, 0]
    w, m, s = torch.tensor(W), torch.tensor(MEAN)[:, 0], torch.tensor(STD)[:, 0]
    mean = (w * m).sum()
    var = (w * (s.square() + m.square())).sum() - mean.square()
    assert float(a.mean()) == pytest.approx(float(mean), abs=4 * float(var.sqrt()) / n**0.5)
    assert float(a.var()) == pytest.approx(float(var), rel=0.03)


def test_a_draw_is_that_of_the_chosen_component() -> None:
    p = squashed(random_mixture(0, 4))
    uniform, noise = torch.tensor([0.01, 0.5, 0.99, 0.3]), torch.randn(4, 2, generator=generator(1))
    k = p.choose(uniform)
    expected = (take(p.components.mean, k) + take(p.components.log_std, k).exp() * noise).tanh()
    torch.testing.assert_close(p.sample(noise, uniform=uniform), expected)
    torch.testing.assert_close(p.select(k).sample(noise), expected)
    for i in range(4):
        assert torch.equal(p.select(k).mean[i], p.components.mean[i, k[i]])
    for q in (p, p.unsquashed):
        action, logp = q.sample_log_prob(noise, uniform=uniform)
        torch.testing.assert_close(action, q.sample(noise, uniform=uniform))
        torch.testing.assert_close(logp, q.log_prob(action), rtol=1e-7, atol=1e-7)


def test_draws_come_from_the_generator_alone() -> None:
    p = random_mixture(0, 5)
    state = torch.get_rng_state()
    first, second = p.sample(generator=generator(7)), p.sample(generator=generator(7))
    assert torch.equal(first, second)
    assert not torch.equal(first, p.sample(generator=generator(8)))
    assert torch.equal(torch.get_rng_state(), state)


def test_the_mode_is_the_mean_of_the_heaviest_component() -> None:
    p = mixture()
    assert p.mode.tolist() == [0.0]
    assert squashed(mixture([0.2, 0.2, 0.6])).mode.tolist() == pytest.approx([math.tanh(1.5)])


def test_a_draw_has_no_gradient_and_a_density_has() -> None:
    p = random_mixture(0, 4)
    parts = [p.logits, p.components.mean, p.components.log_std]
    for x in parts:
        x.requires_grad_()
    q = squashed(NormalMixture(p.logits, p.components))
    assert not q.sample(generator=generator()).requires_grad
    action, logp = q.sample_log_prob(generator=generator())
    assert not action.requires_grad
    assert all(float(g.abs().sum()) > 0 for g in torch.autograd.grad(logp.sum(), parts))
    assert not any(x.requires_grad for x in (q.detach().logits, q.detach().components.mean))
    assert torch.equal(q.detach().log_prob(action), q.log_prob(action))


# ----------------------------------------------------------------------------------------- densities of one dimension
@pytest.mark.parametrize("cls", [Normal, TanhNormal])
def test_log_prob_per_dimension_adds_up(cls: type[Normal] | type[TanhNormal]) -> None:
    p = cls(torch.randn(5, 3, generator=generator(0)), 0.2 * torch.randn(5, 3, generator=generator(1)))
    a = torch.rand(5, 3, generator=generator(2)) * 1.8 - 0.9
    per_dim = p.log_prob(a, reduce=False)
    assert per_dim.shape == (5, 3)
    torch.testing.assert_close(per_dim.sum(-1), p.log_prob(a))
    for i in range(3):
        alone = cls(p.mean[:, i : i + 1], p.log_std[:, i : i + 1])
        torch.testing.assert_close(per_dim[:, i], alone.log_prob(a[:, i : i + 1]))
    weights = torch.tensor([1.51944, 0.92159, 0.55897])  # unequal weights per dimension need the parts, not the sum
    assert float(((weights * per_dim).sum(-1) - p.log_prob(a)).abs().max()) > 0.01


def test_a_draw_and_its_log_prob_per_dimension() -> None:
    p = TanhNormal(torch.randn(5, 3, generator=generator(0)), 0.2 * torch.randn(5, 3, generator=generator(1)))
    noise = torch.randn(5, 3, generator=generator(2))
    u, per_dim = p.sample_pre_tanh(noise, reduce=False)
    _, summed = p.sample_pre_tanh(noise)
    torch.testing.assert_close(u, p.mean + p.log_std.exp() * noise)
    torch.testing.assert_close(per_dim, p.log_prob_pre_tanh(u, reduce=False))
    torch.testing.assert_close(per_dim.sum(-1), summed)
    assert torch.equal(summed, p.sample_log_prob(noise)[1])


# ------------------------------------------------------------------------------------------------------- KL and entropy
def quadrature(p: NormalMixture, q: NormalMixture | None = None) -> Tensor:
    """KL(p || q), or the entropy of p, of mixtures in one dimension."""
    x = torch.linspace(-12, 12, 20_001)
    logp = p.log_prob(x[:, None])
    return torch.trapezoid(logp.exp() * (logp - q.log_prob(x[:, None]) if q else -logp), x)


def test_entropy_sandwich() -> None:
    p = mixture()
    parts, gate = (p.weights * p.components.entropy()).sum(), -(p.weights * p.log_weights).sum()
    assert float(parts) == pytest.approx(0.6113796, abs=5e-8)
    assert float(parts + gate) == pytest.approx(1.6410326, abs=5e-8)
    assert float(quadrature(p)) == pytest.approx(1.3447644, abs=1e-6)
    noise = torch.randn(3, 100_000, 1, generator=generator())
    u = p.components.mean.unsqueeze(1) + p.components.log_std.unsqueeze(1).exp() * noise
    errors = p.log_prob(u).std(1) * p.weights / 100_000**0.5
    assert abs(float(mc_entropy(p, noise=noise)) - 1.3447644) < 4 * float(errors.norm())


def test_entropy_of_squashed_distributions() -> None:
    one = TanhNormal(torch.zeros(1), torch.zeros(1))
    assert float(mc_entropy(one, 200_000, generator=generator())) == pytest.approx(0.669804, abs=0.01)
    p = squashed(mixture())
    a = torch.linspace(-1 + 1e-7, 1 - 1e-7, 800_001)
    logp = p.log_prob(a[:, None])
    exact = float(-torch.trapezoid(logp.exp() * logp, a))
    assert float(mc_entropy(p, 200_000, generator=generator())) == pytest.approx(exact, abs=0.01)


@pytest.mark.parametrize("reverse", [False, True])
def test_mc_kl_of_mixtures_in_both_directions(reverse: bool) -> None:
    p, q = mixture([0.8, 0.1, 0.1]), mixture([0.2, 0.2, 0.6])
    p, q = (q, p) if reverse else (p, q)
    exact = float(quadrature(p, q))
    assert exact > 0.1
    assert abs(float(quadrature(q, p)) - exact) > 0.05  # the directions differ
    assert float(mc_kl(p, q, 400_000, generator=generator())) == pytest.approx(exact, abs=0.003)


def test_mc_kl_of_gaussians_equals_the_closed_form() -> None:
    new = Normal(torch.tensor([0.3, -0.5]), torch.tensor([0.8, 1.2]).log())
    old = Normal(torch.zeros(2), torch.zeros(2))
    assert float(mc_kl(new, old, 400_000, generator=generator())) == pytest.approx(0.2508219945, abs=0.005)
    assert float(mc_kl(old, new, 400_000, generator=generator())) == pytest.approx(0.2447682833, abs=0.005)


def test_mc_gradients_equal_those_of_quadrature() -> None:
    """Gate, means and log-stds, of the entropy and of the KL in both arguments."""

    def parts(p: NormalMixture) -> list[Tensor]:
        return [x.clone().requires_grad_() for x in (p.logits, p.components.mean, p.components.log_std)]

    a, b = parts(mixture()), parts(mixture([0.6, 0.1, 0.3], [[-0.5], [0.2], [1.0]], [[0.6], [0.5], [0.75]]))
    p, q = NormalMixture(a[0], Normal(a[1], a[2])), NormalMixture(b[0], Normal(b[1], b[2]))
    for estimate, exact, inputs in (
        (mc_kl(p, q, 150_000, generator=generator()), quadrature(p, q), [*a, *b]),
        (mc_kl(q, p, 150_000, generator=generator()), quadrature(q, p), [*a, *b]),
        (mc_entropy(p, 150_000, generator=generator()), quadrature(p), a),
    ):
        for g, h in zip(torch.autograd.grad(estimate, inputs), torch.autograd.grad(exact, inputs), strict=True):
            torch.testing.assert_close(g, h, rtol=0.03, atol=0.004)
            assert float(h.abs().max()) > 0.03


def test_mc_kl_of_a_distribution_to_itself_is_flat() -> None:
    p = random_mixture(0, 5)
    parts = [p.logits.requires_grad_(), p.components.mean.requires_grad_(), p.components.log_std.requires_grad_()]
    old = p.detach()
    for value in (mc_kl(p, old, generator=generator()), mc_kl(old, p, generator=generator())):
        torch.testing.assert_close(value, torch.zeros(5))
        for g in torch.autograd.grad(value.sum(), parts, retain_graph=True):
            torch.testing.assert_close(g, torch.zeros_like(g))


def test_mc_estimates_shape_noise_and_sign() -> None:
    p, q = random_mixture(0, 5), random_mixture(1, 5, num=4)
    noise = torch.randn(3, 7, 5, 2, generator=generator())
    value = mc_kl(p, q, noise=noise)
    assert value.shape == (5,)
    assert bool((value > 0).all())
    expected = torch.zeros(5)
    for k in range(3):
        for n in range(7):
            a = p.components.mean[:, k] + p.components.log_std[:, k].exp() * noise[k, n]
            x = q.log_prob(a) - p.log_prob(a)
            expected = expected + p.weights[:, k] * (x.exp() - 1 - x) / 7
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(mc_kl(squashed(p), squashed(q), noise=noise), value)  # tanh is one-to-one
    assert torch.equal(mc_kl(p, q, 7, generator=generator()), value)
    assert mc_entropy(squashed(p), noise=noise).shape == (5,)


def test_kl_and_entropy_take_the_closed_form_where_there_is_one() -> None:
    normal, tanh = (cls(torch.randn(5, 2), torch.zeros(5, 2)) for cls in (Normal, TanhNormal))
    other = Normal(torch.ones(5, 2), torch.full((2,), 0.3))
    assert torch.equal(kl(normal, other), normal.kl(other))
    assert torch.equal(kl(tanh, TanhNormal(*vars(other).values())), tanh.unsquashed.kl(other))
    assert torch.equal(entropy(normal), normal.entropy())
    p, q = random_mixture(0, 5), random_mixture(1, 5)
    assert torch.equal(kl(p, q, 4, generator()), mc_kl(p, q, 4, generator=generator()))
    assert torch.equal(entropy(tanh, 4, generator()), mc_entropy(tanh, 4, generator=generator()))
    assert torch.equal(kl(normal, p, 4, generator()), mc_kl(normal, p, 4, generator=generator()))
    mismatched: list[tuple[Distribution, Distribution]] = [(normal, tanh), (squashed(p), q), (p, tanh)]
    for a, b in mismatched:
        with pytest.raises(TypeError, match="one is squashed, the other is not"):
            kl(a, b)


def test_k3_by_number_and_its_slope() -> None:
    x = torch.tensor(-1.8858137524 + 2.3691270664)
    assert float(k3(x)) == pytest.approx(0.1381245306, abs=1e-10)
    zero = torch.tensor(0.0).requires_grad_()
    assert float(torch.autograd.grad(k3(zero), zero)[0]) == 0.0


# ------------------------------------------------------------------------------------------------------------ policies
def copied(source: torch.nn.Module, target: torch.nn.Module) -> None:
    target.load_state_dict(source.state_dict())


def test_mixture_policy_of_one_component_is_the_gaussian_policy() -> None:
    single, p = GaussianPolicy(3, 2, (8, 8), log_std=-0.3), MixturePolicy(3, 2, (8, 8), 1, log_std=-0.3)
    copied(single.mean, p.mean)
    obs, a = torch.randn(6, 3), torch.randn(6, 2)
    assert torch.equal(p(obs).log_prob(a), single(obs).log_prob(a))
    assert torch.equal(p(obs).mode, single(obs).mode)
    ours = torch.autograd.grad(p(obs).log_prob(a).sum(), [*p.mean.parameters(), p.log_std])
    theirs = torch.autograd.grad(single(obs).log_prob(a).sum(), [*single.mean.parameters(), single.log_std])
    for g, h in zip(ours, theirs, strict=True):
        torch.testing.assert_close(g.reshape(h.shape), h, rtol=1e-12, atol=1e-12)


def test_tanh_mixture_policy_of_one_component_is_the_tanh_gaussian_policy() -> None:
    single, p = TanhGaussianPolicy(3, 2, (8, 8)), TanhMixturePolicy(3, 2, (8, 8), 1)
    copied(single.net, p.net)
    obs, a = torch.randn(6, 3), torch.rand(6, 2) * 1.8 - 0.9
    assert torch.equal(p(obs).log_prob(a), single(obs).log_prob(a))
    assert torch.equal(p(obs).sample(generator=generator()), single(obs).sample(generator=generator()))


@pytest.mark.parametrize("gate", ["features", "obs"])
@pytest.mark.parametrize("cls", [MixturePolicy, TanhMixturePolicy])
def test_mixture_policies(cls: type[MixturePolicy] | type[TanhMixturePolicy], gate: Any) -> None:
    pi = cls(3, 2, (5, 4), 3, gate=gate)
    obs = torch.randn(7, 6, 3)
    p = pi(obs)
    assert p.logits.shape == (7, 6, 3)
    assert p.components.mean.shape == (7, 6, 3, 2)
    assert p.sample().shape == p.mode.shape == (7, 6, 2)
    assert p.log_prob(p.sample()).shape == (7, 6)
    assert pi.gate.linear.in_features == (4 if gate == "features" else 3)
    trunk = [x for name, x in pi.named_parameters() if not name.startswith("gate")]
    assert all(g is None for g in torch.autograd.grad(p.logits.sum(), trunk, retain_graph=True, allow_unused=True))
    reached = torch.autograd.grad(p.log_prob(p.sample()).sum(), list(pi.parameters()))
    assert all(float(g.abs().sum()) > 0 for g in reached)
    assert cls(3, 2, (), 3, gate=gate)(obs).logits.shape == (7, 6, 3)  # without hidden layers both see the observation


def test_tanh_mixture_policy_clamps_log_std() -> None:
    pi = TanhMixturePolicy(3, 1, (5,), 2)
    last = pi.net[-1]
    assert isinstance(last, torch.nn.Linear)
    torch.nn.init.zeros_(last.weight)
    last.bias.data = torch.tensor([0.3, -0.7, 100.0, -100.0])  # means of both components, then log-stds
    p = pi(torch.randn(4, 3))
    torch.testing.assert_close(p.components.mean[0], torch.tensor([[0.3], [-0.7]]))
    torch.testing.assert_close(p.components.log_std[0], torch.tensor([[2.0], [-20.0]]))


def test_free_log_stds_belong_to_components() -> None:
    pi = MixturePolicy(3, 2, (5,), 3, log_std=-0.5)
    assert pi.log_std.shape == (3, 2)
    assert pi.log_std.requires_grad
    p = pi(torch.randn(4, 3))
    assert float(p.components.mean.detach().abs().max()) < 0.1  # the last layer starts at gain 0.01
    torch.testing.assert_close(p.select(torch.tensor([0, 1, 2, 0])).log_std, torch.full((4, 2), -0.5))
