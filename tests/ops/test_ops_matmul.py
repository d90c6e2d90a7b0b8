"""`linear` and `matmul` equal torch's own in value and in first and second derivatives, on either path."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from rlctl.ops import matmul as products

HAVE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
ON = pytest.param(True, marks=pytest.mark.skipif(not HAVE, reason="this torch has no mkldnn._linear_pointwise"))
SMALL, LARGE = (5, 7, 3), (128, 128, 96)  # rows, in, out; 128 * 128 * 96 > SMALLEST


@pytest.fixture(params=[False, ON], ids=["torch", "onednn"])
def enabled(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    on = bool(request.param)
    monkeypatch.setattr(products, "ENABLED", on)
    return on


def draw(shape: tuple[int, int, int], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    rows, n_in, n_out = shape
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, n_in, generator=g, dtype=torch.float64)
    w = torch.randn(n_out, n_in, generator=g, dtype=torch.float64) / n_in**0.5
    b = torch.randn(n_out, generator=g, dtype=torch.float64)
    return tuple(t.to(dtype).requires_grad_() for t in (x, w, b))


def agree(ours: Tensor, exact: Tensor) -> None:
    """Float32 results against float64 ones, relative to the largest entry."""
    scale = float(exact.abs().max()) + 1e-30
    torch.testing.assert_close(ours.double() / scale, exact / scale, rtol=0, atol=2e-5)


def took_fast_path(out: Tensor) -> bool:
    node = out.grad_fn
    while node is not None:
        if type(node).__name__ in ("_LinearBackward", "_MatMulBackward"):
            return True
        node = node.next_functions[0][0] if node.next_functions else None
    return False


def test_the_sizes_are_on_both_sides_of_the_threshold() -> None:
    small, large = (torch.tensor(s).prod().item() for s in (SMALL, LARGE))
    assert small < products.SMALLEST <= large


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
@pytest.mark.parametrize("bias", [True, False])
def test_linear(enabled: bool, shape: tuple[int, int, int], bias: bool) -> None:
    """Value; gradients of a nonlinear loss; gradients of a function of those gradients."""

    def derivatives(fn, x: Tensor, w: Tensor, b: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
        leaves = [x, w, b] if bias else [x, w]
        out = fn(x, w, b if bias else None)
        first = torch.autograd.grad(out.tanh().square().sum(), leaves, create_graph=True)
        mixed = sum(((g * g.detach().cos()).sum() for g in first), torch.zeros((), dtype=x.dtype))
        second = torch.autograd.grad(mixed, leaves)
        return [out, *first, *second]

    ours = derivatives(products.linear, *draw(shape))
    exact = derivatives(functional.linear, *(t.double().detach().requires_grad_() for t in draw(shape)))
    assert took_fast_path(ours[0]) == (enabled and shape == LARGE)
    for a, b in zip(ours, exact, strict=True):
        assert a.dtype == torch.float32
        assert a.shape == b.shape
        agree(a.detach(), b.detach())


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_matmul(enabled: bool, shape: tuple[int, int, int]) -> None:
    def derivatives(fn, a: Tensor, b: Tensor) -> list[Tensor]:  # type: ignore[no-untyped-def]
        out = fn(a, b)
        first = torch.autograd.grad(out.tanh().square().sum(), [a, b], create_graph=True)
        second = torch.autograd.grad(sum((g.sin() * g.detach()).sum() for g in first), [a, b])
        return [out, *first, *second]

    x, w, _ = draw(shape)
    a, b = x, w.detach().t().contiguous().requires_grad_()
    ours = derivatives(products.matmul, a, b)
    exact = derivatives(torch.matmul, *(t.double().detach().requires_grad_() for t in (a, b)))
    assert took_fast_path(ours[0]) == (enabled and shape == LARGE)
    for p, q in zip(ours, exact, strict=True):
        agree(p.detach(), q.detach())


@pytest.mark.parametrize("shape", [SMALL, LARGE], ids=["small", "large"])
def test_under_functional_transforms(enabled: bool, shape: tuple[int, int, int]) -> None:
    def loss(fn):  # type: ignore[no-untyped-def]
        return lambda w, x, b: fn(x, w, b).tanh().square().sum()

    x, w, b = (t.detach() for t in draw(shape))
    exact = torch.func.grad(loss(functional.linear), argnums=(0, 1, 2))(w.double(), x.double(), b.double())
    ours = torch.func.grad(loss(products.linear), argnums=(0, 1, 2))(w, x, b)
    for p, q in zip(ours, exact, strict=True):
        agree(p, q)

    def nested(fn):  # type: ignore[no-untyped-def]
        return lambda w, x, b: torch.func.grad(loss(fn))(w, x, b).square().sum()

    agree(
        torch.func.grad(nested(products.linear))(w, x, b),
        torch.func.grad(nested(functional.linear))(w.double(), x.double(), b.double()),
    )


@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_under_vmap(enabled: bool) -> None:
    """One weight matrix per member of an ensemble, and the gradient of each."""
    x, w, b = (t.detach() for t in draw(LARGE))
    ws = torch.stack([w, -w, 2 * w])

    def grad_of(fn):  # type: ignore[no-untyped-def]
        return torch.func.vmap(torch.func.grad(lambda w, x, b: fn(x, w, b).tanh().sum()), (0, None, None))

    agree(grad_of(products.linear)(ws, x, b), grad_of(functional.linear)(ws.double(), x.double(), b.double()))


def test_leading_dimensions_and_awkward_strides(enabled: bool) -> None:
    """[2, 80, in], an input and a weight that are transposed views, and the stride-0 gradient of a sum."""
    g = torch.Generator().manual_seed(1)
    x = torch.randn(128, 2, 80, generator=g).permute(1, 2, 0).requires_grad_()
    w = torch.randn(128, 96, generator=g).t().requires_grad_()
    out = products.linear(x, w)
    assert out.shape == (2, 80, 96)
    assert took_fast_path(out) == enabled
    exact_x, exact_w = x.detach().double().requires_grad_(), w.detach().double().requires_grad_()
    exact = functional.linear(exact_x, exact_w)
    agree(out.detach(), exact.detach())
    for p, q in zip(
        torch.autograd.grad(out.sum(), [x, w]), torch.autograd.grad(exact.sum(), [exact_x, exact_w]), strict=True
    ):
        assert p.shape == q.shape
        agree(p, q)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2)])
def test_only_the_wanted_gradients(enabled: bool, wanted: tuple[int, ...]) -> None:
    """As when one network of a loss is frozen."""
    ours = [t.detach() for t in draw(LARGE)]
    exact = [t.double() for t in ours]
    for group in (ours, exact):
        for i in wanted:
            group[i].requires_grad_()
    a = torch.autograd.grad(products.linear(*ours).square().sum(), [ours[i] for i in wanted])
    b = torch.autograd.grad(functional.linear(*exact).square().sum(), [exact[i] for i in wanted])
    for p, q in zip(a, b, strict=True):
        agree(p, q)


def test_a_nan_is_not_swallowed(enabled: bool) -> None:
    """A network that has diverged must show it."""
    x, w, b = (t.detach() for t in draw(LARGE))
    x[3, 5] = torch.nan
    out = products.linear(x, w, b)
    assert bool(out[3].isnan().all())
    assert not bool(out[4].isnan().any())


def test_float64_takes_the_plain_path(enabled: bool) -> None:
    x, w, b = draw(LARGE, dtype=torch.float64)
    out = products.linear(x, w, b)
    assert not took_fast_path(out)
    assert torch.equal(out, functional.linear(x, w, b))


def test_same_numbers_every_time(enabled: bool) -> None:
    x, w, b = draw(LARGE)
    assert torch.equal(products.linear(x, w, b), products.linear(x, w, b))


@pytest.mark.skipif(not HAVE, reason="this torch has no mkldnn._linear_pointwise")
@given(rows=st.integers(1, 9), n_in=st.integers(1, 9), n_out=st.integers(1, 9), bias=st.booleans())
def test_the_operator_itself_on_any_shape(rows: int, n_in: int, n_out: int, bias: bool) -> None:
    """Vectors, single columns, single numbers: with the threshold at zero everything takes the fast path."""
    before = products.ENABLED, products.SMALLEST
    products.ENABLED, products.SMALLEST = True, 0
    try:
        leaves = list(draw((rows, n_in, n_out), seed=rows * 100 + n_in * 10 + n_out))[: 3 if bias else 2]
        out = products.linear(*leaves)
        grads = torch.autograd.grad(out.tanh().sum(), leaves)
    finally:
        products.ENABLED, products.SMALLEST = before
    assert took_fast_path(out)
    exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
    exact = functional.linear(*exact_leaves)
    agree(out.detach(), exact.detach())
    for p, q in zip(grads, torch.autograd.grad(exact.tanh().sum(), exact_leaves), strict=True):
        assert p.shape == q.shape
        agree(p, q)


def test_it_is_only_for_amd_processors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "cpu_vendor", lambda: "GenuineIntel")
    assert not products.onednn_is_faster()
    monkeypatch.setattr(products, "cpu_vendor", lambda: "AuthenticAMD")
    assert products.onednn_is_faster() == HAVE
