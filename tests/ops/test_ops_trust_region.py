"""Conjugate gradient, Fisher-vector products, natural steps, backtracking: against hand numbers and dense algebra."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlctl.nets import GaussianPolicy, Normal
from rlctl.ops.trust_region import (
    backtrack,
    conjugate_gradient,
    fisher_vector_product,
    flat,
    natural_step,
    write,
)


def test_conjugate_gradient_iterates(double: None) -> None:
    a = torch.tensor([[3.0, 1, 0], [1, 2, 0.5], [0, 0.5, 1]])
    b = torch.tensor([1.0, -1, 2])
    wanted = {
        1: [1.2, -1.2, 2.4],
        2: [0.9087378641, -1.6854368932, 2.7883495146],
        3: [0.8823529412, -1.6470588235, 2.8235294118],
    }
    for n, x in wanted.items():
        assert conjugate_gradient(lambda v: a @ v, b, n).tolist() == pytest.approx(x, abs=1e-9)
    exact = conjugate_gradient(lambda v: a @ v, b, 3)
    assert float((a @ exact - b).square().sum()) < 1e-28
    assert torch.equal(
        conjugate_gradient(lambda v: a @ v, b, 30), conjugate_gradient(lambda v: a @ v, b, 4)
    )  # it stops


def test_conjugate_gradient_without_positive_curvature_stays(double: None) -> None:
    b = torch.tensor([1.0, 2.0])
    assert conjugate_gradient(lambda v: -v, b, 5).tolist() == [0, 0]
    assert conjugate_gradient(lambda v: 0 * v, b, 5).tolist() == [0, 0]
    # diag(1, -3, 2) has a good direction, then a bad one: x stays where the first has led, however long one goes on
    c, d = torch.tensor([2.0, 1, 1]), torch.tensor([1.0, -3, 2])
    first = conjugate_gradient(lambda v: d * v, c, 1)
    assert first.tolist() == [4, 2, 2]  # |c|^2 / c'Dc = 6 / 3
    assert conjugate_gradient(lambda v: d * v, c, 9).tolist() == first.tolist()
    assert conjugate_gradient(lambda v: v, torch.zeros(2), 5).tolist() == [0, 0]


def gaussian(mean: float, std: float) -> tuple[Tensor, Tensor]:
    """Mean and log-std as parameters."""
    return torch.tensor([mean], requires_grad=True), torch.tensor([std]).log().requires_grad_()


@pytest.mark.parametrize("new_first", [True, False])
def test_fisher_of_a_gaussian(double: None, new_first: bool) -> None:
    """diag(1/s^2, 2) in (mean, log std), whichever way the divergence is taken."""
    params = gaussian(0.3, 0.7)
    new, old = Normal(*params), Normal(*params).detach()
    product = fisher_vector_product((new.kl(old) if new_first else old.kl(new)).mean(), params, 0.0)
    assert product(torch.tensor([1.0, 0.0])).tolist() == pytest.approx([2.0408163265, 0], abs=1e-10)
    assert product(torch.tensor([0.0, 1.0])).tolist() == pytest.approx([0, 2], abs=1e-10)


def test_the_natural_step_and_the_two_divergences(double: None) -> None:
    params = gaussian(0.3, 0.7)
    old = Normal(*params).detach()
    product = fisher_vector_product(Normal(*params).kl(old).mean(), params, 0.0)
    step = natural_step(product, torch.tensor([0.4, -0.2]), 0.01, 10)
    write(params, flat(params).detach() + step)
    new = Normal(*params)
    assert float(new.kl(old).detach()) == pytest.approx(0.0099402639, abs=1e-10)
    assert float(old.kl(new).detach()) == pytest.approx(0.0108142784, abs=1e-10)


@pytest.mark.parametrize(("damping", "step", "kl"), [(0.0, 0.05, 0.01), (0.1, 0.0496903995, 0.0098765432)])
def test_a_linear_mean(double: None, damping: float, step: float, kl: float) -> None:
    theta = torch.zeros(1, requires_grad=True)
    states, log_std = torch.tensor([[1.0], [2.0], [-1.0]]), torch.tensor([0.5]).log()
    old = Normal(states * theta, log_std).detach()
    product = fisher_vector_product(Normal(states * theta, log_std).kl(old).mean(), [theta], damping)
    assert float(product(torch.ones(1))) == pytest.approx(8 + damping, abs=1e-10)
    found = natural_step(product, torch.tensor([0.3]), 0.01, 10)
    assert float(found) == pytest.approx(step, abs=1e-10)
    assert float(Normal(states * found, log_std).kl(old).mean()) == pytest.approx(kl, abs=1e-10)


@pytest.mark.parametrize("new_first", [True, False])
def test_fisher_vector_product_is_the_dense_hessian(double: None, new_first: bool) -> None:
    """Five parameters, a hidden unit among them: H by double differentiation of the whole vector, and by hand.

    With J = d mean / d weights, F = E[J J^T] / s^2 for the weights and 2 for the log-std.
    """
    torch.manual_seed(0)
    pi, obs = GaussianPolicy(1, 1, (1,), log_std=-0.4, orthogonal=1.0), torch.randn(7, 1)
    named = dict(pi.named_parameters())
    params = list(named.values())
    for p in params[1:]:
        torch.nn.init.normal_(p)  # biases start at 0, where entries would coincide
    old = pi(obs).detach()
    assert flat(params).numel() == 5

    def kl(vector: Tensor) -> Tensor:
        pieces = torch.split(vector, [p.numel() for p in params])
        new = torch.func.functional_call(
            pi, {n: x.view_as(p) for (n, p), x in zip(named.items(), pieces, strict=True)}, (obs,)
        )
        return (new.kl(old) if new_first else old.kl(new)).mean()

    dense = torch.autograd.functional.hessian(kl, flat(params).detach())
    with torch.no_grad():
        hidden = (obs * named["mean.hidden0.weight"] + named["mean.hidden0.bias"]).tanh()
        slope = named["mean.out.weight"] * (1 - hidden.square())
        columns = {
            "mean.hidden0.weight": slope * obs,
            "mean.hidden0.bias": slope,
            "mean.out.weight": hidden,
            "mean.out.bias": torch.ones_like(obs),
            "log_std": torch.zeros_like(obs),
        }
        jacobian = torch.cat([columns[name] for name in named], 1)
        by_hand = jacobian.T @ jacobian / 7 / (2 * named["log_std"]).exp()
        at = list(named).index("log_std")
        by_hand[at, at] = 2.0
    torch.testing.assert_close(dense, by_hand, rtol=1e-9, atol=1e-12)
    new = pi(obs)
    product = fisher_vector_product((new.kl(old) if new_first else old.kl(new)).mean(), params, 0.0)
    for v in (*torch.eye(5), torch.randn(5)):
        torch.testing.assert_close(product(v), dense @ v, rtol=1e-9, atol=1e-12)


def test_a_full_step_reaches_the_radius_as_it_shrinks(double: None) -> None:
    torch.manual_seed(0)
    pi, obs = GaussianPolicy(3, 2, (4,), orthogonal=1.0), torch.randn(50, 3)
    params = list(pi.parameters())
    start = flat(params).detach()
    action, adv = torch.randn(50, 2), torch.randn(50)
    gradient = flat(torch.autograd.grad((pi(obs).log_prob(action) * adv).mean(), params))
    error = []
    for delta in (1e-2, 1e-4, 1e-6):
        write(params, start)
        old = pi(obs).detach()
        product = fisher_vector_product(pi(obs).kl(old).mean(), params, 1e-6)
        write(params, start + natural_step(product, gradient, delta, 100))
        error.append(abs(float(pi(obs).kl(old).mean().detach()) / delta - 1))
    assert error[2] < 5e-3
    assert error[2] < error[1] < error[0]


def test_no_step_where_nothing_can_be_trusted(double: None) -> None:
    gradient = torch.tensor([1.0, 2.0])
    assert natural_step(lambda v: -v, gradient, 0.01, 5).tolist() == [0, 0]
    assert natural_step(lambda v: v * torch.nan, gradient, 0.01, 5).tolist() == [0, 0]
    assert natural_step(lambda v: v, torch.zeros(2), 0.01, 5).tolist() == [0, 0]


def test_backtracking_takes_the_longest_allowed_step() -> None:
    p = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
    scale = backtrack([p], torch.tensor([8.0, 0.0]), lambda: p[0] <= 4.0, shrink=0.5, iterations=5)
    assert (float(scale), p.tolist()) == (0.25, [3.0, -2.0])


def test_a_rejected_step_leaves_every_bit() -> None:
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(3, 2)), torch.nn.Parameter(torch.tensor([1e-30, 7.0]))]
    before = [p.detach().clone() for p in params]
    scale = backtrack(params, torch.full((8,), 1e-3), lambda: torch.tensor(False), iterations=4)
    assert float(scale) == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    assert float(backtrack(params, torch.zeros(8), lambda: torch.tensor(True))) == 0  # no step is no acceptance
    nan = backtrack(params, torch.full((8,), torch.nan), lambda: params[0].sum() > -torch.inf, iterations=2)
    assert float(nan) == 0
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
