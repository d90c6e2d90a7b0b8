"""`minimize`, `adam`, `polyak`, `frozen_copy`."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from rlctl.ops import adam, apply_gradients, frozen_copy, gradients, minimize, polyak
from rlctl.ops.optim import Adam

pytestmark = pytest.mark.usefixtures("double")


def pair() -> tuple[nn.Module, nn.Module, Tensor]:
    torch.manual_seed(0)
    return nn.Linear(3, 4), nn.Linear(4, 2), torch.randn(5, 3)


def loss_of(first: nn.Module, second: nn.Module, x: Tensor) -> Tensor:
    loss: Tensor = second(first(x).tanh()).square().sum()
    return loss


def snapshot(module: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in module.parameters()]


def test_minimize_steps_only_the_parameters_of_its_optimiser() -> None:
    first, second, x = pair()
    old_first, old_second = snapshot(first), snapshot(second)
    expected = torch.autograd.grad(loss_of(first, second, x), list(first.parameters()))
    value = minimize(loss_of(first, second, x), torch.optim.SGD(first.parameters(), lr=1.0))
    for p, old, g in zip(first.parameters(), old_first, expected, strict=True):
        assert torch.equal(p, old - g)
    for p, old in zip(second.parameters(), old_second, strict=True):
        assert torch.equal(p, old)
    assert all(p.grad is None for p in [*first.parameters(), *second.parameters()])
    assert not value.requires_grad
    assert value.shape == ()


def test_minimize_passes_through_a_frozen_network() -> None:
    first, second, x = pair()
    expected = torch.autograd.grad(loss_of(first, second, x), list(first.parameters()))
    second.requires_grad_(False)
    old = snapshot(first)
    minimize(loss_of(first, second, x), torch.optim.SGD(first.parameters(), lr=1.0))
    for p, o, g in zip(first.parameters(), old, expected, strict=True):
        assert torch.equal(p, o - g)


def test_minimize_forgets_gradients_left_by_others() -> None:
    first, second, x = pair()
    clean = copy.deepcopy(first)
    for p in first.parameters():
        p.grad = torch.full_like(p, 1e3)
    for net in (first, clean):
        minimize(loss_of(net, second, x), torch.optim.SGD(net.parameters(), lr=0.1))
    for p, q in zip(first.parameters(), clean.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("limit", [1e-3, 0.5, 3.0, 1e6])
def test_minimize_clips_the_global_norm_over_all_groups(limit: float) -> None:
    first, second, x = pair()
    params = [*first.parameters(), *second.parameters()]
    grads = torch.autograd.grad(loss_of(first, second, x), params)
    norm = float(torch.stack([g.square().sum() for g in grads]).sum().sqrt())
    old = [p.detach().clone() for p in params]
    opt = torch.optim.SGD([{"params": list(first.parameters())}, {"params": list(second.parameters())}], lr=1.0)
    minimize(loss_of(first, second, x), opt, max_grad_norm=limit)
    scale = min(1.0, limit / (norm + 1e-6))
    for p, o, g in zip(params, old, grads, strict=True):
        torch.testing.assert_close(p.detach(), o - scale * g, rtol=1e-13, atol=1e-15)
    steps = [(p.detach() - o).square().sum() for p, o in zip(params, old, strict=True)]
    moved = torch.stack(steps).sum().sqrt()
    assert float(moved) <= min(limit, norm) * (1 + 1e-12)
    if norm > limit:
        assert float(moved) == pytest.approx(limit, rel=1e-5)


def test_minimize_without_a_limit_never_rescales() -> None:
    p = nn.Parameter(torch.tensor([3.0]))
    minimize((1e9 * p).sum(), torch.optim.SGD([p], lr=1e-9))
    assert float(p.detach()) == pytest.approx(2.0, abs=1e-12)


def test_adam_first_steps_by_hand() -> None:
    """Bias-corrected moments; eps outside the root."""
    p, lr, eps = nn.Parameter(torch.tensor([1.0, -2.0])), 0.1, 0.5
    opt = adam([p], lr, eps=eps)
    m = v = torch.zeros(2)
    expected = p.detach().clone()
    for t, g in enumerate(([2.0, -1.0], [0.5, 3.0], [-4.0, 0.1]), start=1):
        grad = torch.tensor(g)
        m, v = 0.9 * m + 0.1 * grad, 0.999 * v + 0.001 * grad.square()
        expected = expected - lr * (m / (1 - 0.9**t)) / ((v / (1 - 0.999**t)).sqrt() + eps)
        minimize((p * grad).sum(), opt)
        torch.testing.assert_close(p.detach(), expected, rtol=1e-12, atol=1e-12)


class Noted(nn.Module):
    """A parameter, a float and an integer buffer."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([value, -value]))
        self.register_buffer("mean", torch.tensor([10 * value]))
        self.register_buffer("count", torch.tensor(int(value)))


@pytest.mark.parametrize(
    ("tau", "expected"), [(0.25, [1.5, -1.5]), (0.75, [2.5, -2.5]), (0.0, [1, -1]), (1.0, [3, -3])]
)
def test_polyak_is_exact(tau: float, expected: list[float]) -> None:
    source, lagged = Noted(3.0), frozen_copy(Noted(1.0))
    polyak(source, lagged, tau)
    assert lagged.weight.tolist() == expected
    assert lagged.get_buffer("mean").tolist() == [30.0]  # buffers are copied, not averaged
    assert int(lagged.get_buffer("count")) == 3
    assert source.weight.tolist() == [3.0, -3.0]
    assert not lagged.weight.requires_grad
    assert source.weight.requires_grad


def test_polyak_of_many_steps_is_the_exponential_average() -> None:
    source, lagged = Noted(3.0), frozen_copy(Noted(1.0))
    for _ in range(50):
        polyak(source, lagged, 0.1)
    assert float(lagged.weight[0]) == pytest.approx(3 - 2 * 0.9**50, abs=1e-13)


def test_frozen_copy_is_separate_and_without_gradient() -> None:
    net = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    lagged = frozen_copy(net)
    for a, b in zip(net.state_dict().values(), lagged.state_dict().values(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()
    assert not any(p.requires_grad for p in lagged.parameters())
    assert all(p.requires_grad for p in net.parameters())
    assert not lagged(torch.randn(4, 2)).requires_grad
    before = snapshot(lagged)
    minimize(net(torch.randn(4, 2)).square().sum(), torch.optim.SGD(net.parameters(), lr=0.1))
    assert all(torch.equal(a, b) for a, b in zip(before, lagged.parameters(), strict=True))


def test_weight_decay_is_an_l2_penalty_inside_adam() -> None:
    first, second, x = pair()
    twin = copy.deepcopy(first)
    ours, theirs = adam(first.parameters(), 0.01, weight_decay=0.1), torch.optim.Adam(twin.parameters(), 0.01)
    for _ in range(3):
        minimize(loss_of(first, second, x), ours)
        penalty = sum(p.square().sum() for p in twin.parameters())
        minimize(loss_of(twin, second, x) + 0.05 * penalty, theirs)
    for a, b in zip(first.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_gradients_of_two_losses_of_one_graph() -> None:
    first, second, x = pair()
    opt = adam(first.parameters(), 0.1)
    shared = second(first(x).tanh())
    a = gradients(shared.sum(), opt, retain_graph=True)
    b = gradients(shared.square().sum(), opt)
    for got, loss in ((a, second(first(x).tanh()).sum()), (b, loss_of(first, second, x))):
        for g, expected in zip(got, torch.autograd.grad(loss, list(first.parameters())), strict=True):
            torch.testing.assert_close(g, expected)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(shared.sum(), opt)


def test_gradients_of_any_layout_and_length() -> None:
    """A sum's gradient is expanded, a transpose's is strided: the kernel must not take either for dense."""
    a, b = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.arange(12.0).view(3, 4))
    opt = adam([a, b], 0.1)
    w = torch.randn(4, 3, generator=torch.Generator().manual_seed(0))
    exact = [torch.nn.Parameter(p.detach().clone()) for p in (a, b)]
    theirs = torch.optim.Adam(exact, 0.1)
    for _ in range(3):
        minimize(5 * a.sum() + (b.t() * w).square().sum(), opt, max_grad_norm=1.0)
        theirs.zero_grad()
        (5 * exact[0].sum() + (exact[1].t() * w).square().sum()).backward()
        torch.nn.utils.clip_grad_norm_(exact, 1.0)
        theirs.step()
    for p, q in zip((a, b), exact, strict=True):
        torch.testing.assert_close(p, q)
    with pytest.raises(ValueError, match="1 gradients for 2 parameters"):
        apply_gradients(opt, [torch.ones(3)])


def test_one_tensor_for_two_parameters_is_clipped_once() -> None:
    a, b = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    opt = torch.optim.SGD([a, b], 1.0)
    minimize((3 * (a + b)).square().sum(), opt, max_grad_norm=1.0)
    moved = torch.cat([1 - a.detach(), 1 - b.detach()])
    assert float(moved.norm()) == pytest.approx(1.0, rel=1e-5)
    apply_gradients(opt, [None, None], max_grad_norm=1.0)  # nothing to clip, nothing to do


def test_options_adam_does_not_have_are_refused() -> None:
    with pytest.raises(TypeError):
        Adam([torch.nn.Parameter(torch.ones(2))], amsgrad=True)  # type: ignore[call-arg]


@pytest.mark.parametrize("again", ["", "copied", "loaded"])
def test_every_parameter_counts_its_own_steps(again: str) -> None:
    """Beside torch's Adam, with a parameter that has no gradient in some steps, from the first on or later."""
    params = [[torch.nn.Parameter(torch.full((2,), x)) for x in (1.0, 2.0, 3.0)] for _ in range(2)]
    ours, theirs = adam(params[0], 0.1), torch.optim.Adam(params[1], 0.1, fused=True)
    for step, present in enumerate(["110", "111", "111", "101", "111", "111"]):
        if step == 3 and again == "copied":
            params[0], ours = copy.deepcopy((params[0], ours))
        elif step == 3 and again == "loaded":
            ours.load_state_dict(copy.deepcopy(ours.state_dict()))
        grads = [torch.full((2,), 0.1 * (step + 1) * (k + 1)) if x == "1" else None for k, x in enumerate(present)]
        ours.step_with(grads)
        for p, g in zip(params[1], grads, strict=True):
            p.grad = g
        theirs.step()
        for p, q in zip(*params, strict=True):
            assert torch.equal(p, q), step
            assert ours.state[p].get("step") == theirs.state[q].get("step")
    assert [int(ours.state[p]["step"]) for p in params[0]] == [6, 5, 5]
