"""Networks as one autograd node: the numbers of the layers run one by one, and no gradient that nobody asked for."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from rlctl.nets import mlp
from rlctl.nets.mlp import MLP
from rlctl.ops import adam, gradients
from rlctl.ops import dense as fused
from rlctl.ops import matmul as products

ACTIVATIONS = ["relu", "tanh"]


def network(activation: str, dtype: torch.dtype = torch.float64) -> MLP:
    torch.manual_seed(3)
    return mlp(5, 2, (16, 12), activation).to(dtype)  # type: ignore[arg-type]


def one_by_one(net: MLP) -> Callable[[Tensor], Tensor]:
    """The network's layers as plain torch calls."""
    return lambda x: nn.Sequential.forward(net, x)


@pytest.fixture
def forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """One node whatever the size."""
    monkeypatch.setattr(fused, "SMALLEST", 0)


def is_one_node(out: Tensor) -> bool:
    return type(out.grad_fn).__name__ == "_DenseBackward"


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("rows", [1, 9])
def test_values_and_gradients(forced: None, activation: str, rows: int) -> None:
    net, x = network(activation), torch.randn(rows, 5, dtype=torch.float64, requires_grad=True)
    out, exact = net(x), one_by_one(net)(x)
    assert is_one_node(out)
    assert torch.equal(out, exact)
    leaves = [x, *net.parameters()]
    for a, b in zip(
        torch.autograd.grad(out.sin().sum(), leaves), torch.autograd.grad(exact.sin().sum(), leaves), strict=True
    ):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(forced: None, activation: str) -> None:
    """A gradient penalty: a function of the gradients is differentiated again."""
    net, x = network(activation), torch.randn(7, 5, dtype=torch.float64, requires_grad=True)
    leaves = [x, *net.parameters()]

    def penalty(f: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        first = torch.autograd.grad(f(x).square().sum(), leaves, create_graph=True)
        return torch.autograd.grad(sum(g.cos().sum() for g in first), leaves)  # type: ignore[arg-type]

    for a, b in zip(penalty(net), penalty(one_by_one(net)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_small_products_stay_layer_by_layer_and_large_ones_do_not() -> None:
    net = mlp(17, 6, (256, 256))
    assert not is_one_node(net(torch.randn(2, 17)))
    assert is_one_node(net(torch.randn(256, 17)))
    with torch.no_grad():
        assert net(torch.randn(256, 17)).grad_fn is None


@pytest.mark.parametrize("enabled", [False, True])
def test_the_size_of_the_field_in_float32(enabled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """256-256 at batch 256, through either library."""
    if enabled and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("this torch has no mkldnn._linear_pointwise")
    monkeypatch.setattr(products, "ENABLED", enabled)
    torch.manual_seed(0)
    net, x = mlp(23, 1, (256, 256)), torch.randn(256, 23, requires_grad=True)
    exact_net, exact_x = mlp(23, 1, (256, 256)).double(), x.detach().double().requires_grad_()
    exact_net.load_state_dict({k: v.double() for k, v in net.state_dict().items()})
    out, exact = net(x), one_by_one(exact_net)(exact_x)
    torch.testing.assert_close(out.double(), exact, rtol=1e-4, atol=1e-5)
    ours = torch.autograd.grad(out.square().mean(), [x, *net.parameters()])
    theirs = torch.autograd.grad(exact.square().mean(), [exact_x, *exact_net.parameters()])
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a.double() / b.abs().max(), b / b.abs().max(), rtol=0, atol=2e-5)


def test_leading_dimensions_and_a_stride_0_gradient(forced: None) -> None:
    net, x = network("relu"), torch.randn(5, 3, 4, dtype=torch.float64).permute(2, 1, 0).requires_grad_()
    out, exact = net(x), one_by_one(net)(x)
    assert out.shape == (4, 3, 2)
    for a, b in zip(torch.autograd.grad(out.sum(), [x]), torch.autograd.grad(exact.sum(), [x]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("trained", [(), (0,), (2, 3), (5,), (0, 5)])
@pytest.mark.parametrize("input_too", [False, True])
def test_partly_frozen(forced: None, trained: tuple[int, ...], input_too: bool) -> None:
    net, x = network("tanh"), torch.randn(7, 5, dtype=torch.float64, requires_grad=input_too)
    params = list(net.parameters())
    for i, p in enumerate(params):
        p.requires_grad_(i in trained)
    leaves = [*([x] if input_too else []), *(params[i] for i in trained)]
    if not leaves:
        assert net(x).grad_fn is None
        return
    ours = torch.autograd.grad(net(x).exp().sum(), leaves)
    theirs = torch.autograd.grad(one_by_one(net)(x).exp().sum(), leaves)
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)


def test_a_loss_through_a_network_does_not_pay_for_its_weights(forced: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As an actor loss through a critic: three products carry the gradient to the action, none goes into a weight."""
    critic, actor, obs = network("relu"), mlp(3, 5, (16,)).double(), torch.randn(7, 3, dtype=torch.float64)
    calls: list[tuple[int, ...]] = []
    real = fused.matmul

    def counted(a: Tensor, b: Tensor) -> Tensor:
        calls.append((*a.shape, b.shape[1]))
        return real(a, b)

    monkeypatch.setattr(fused, "matmul", counted)
    got = gradients(critic(actor(obs)).sum(), adam(actor.parameters(), 1e-3))
    critic_products = [(7, 2, 12), (7, 12, 16), (7, 16, 5)]
    assert calls[:3] == critic_products
    assert len(calls) == 3 + 3  # the actor: two weights, one gradient carried to its hidden layer
    exact = torch.autograd.grad(one_by_one(critic)(one_by_one(actor)(obs)).sum(), list(actor.parameters()))
    for a, b in zip(got, exact, strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-14)
    calls.clear()  # plain autograd has nobody to tell it, and computes all
    critic(actor(obs)).sum().backward()
    assert len(calls) == 6 + 3
    assert all(p.grad is not None for p in critic.parameters())


def test_stale_weights_are_an_error(forced: None) -> None:
    """A loss from before a step cannot be differentiated after it."""
    net, x = network("relu"), torch.randn(4, 5, dtype=torch.float64)
    loss = net(x).sum()
    with torch.no_grad():
        next(net.parameters()).add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(loss, list(net.parameters()))


def test_a_nan_is_not_swallowed(forced: None) -> None:
    net, x = network("relu"), torch.randn(4, 5, dtype=torch.float64)
    x[1, 2] = torch.nan
    out = net(x)
    assert bool(out[1].isnan().all())
    assert not bool(out[[0, 2, 3]].isnan().any())


def test_the_relu_has_no_slope_at_its_kink(forced: None) -> None:
    net = network("relu")
    for p in net.parameters():
        nn.init.zeros_(p)
    for g in torch.autograd.grad(net(torch.ones(3, 5, dtype=torch.float64)).sum(), list(net.hidden0.parameters())):
        assert not bool(g.any())


def test_functional_transforms_take_the_plain_path(forced: None) -> None:
    net, x = network("tanh"), torch.randn(6, 5, dtype=torch.float64)
    params = dict(net.named_parameters())

    def loss(p: dict[str, Tensor], row: Tensor) -> Tensor:
        return torch.func.functional_call(net, p, (row[None],)).sum()

    each = torch.func.vmap(torch.func.grad(loss), (None, 0))(params, x)
    whole = torch.autograd.grad(one_by_one(net)(x).sum(), list(net.parameters()))
    for a, b in zip(each.values(), whole, strict=True):
        torch.testing.assert_close(a.sum(0), b, rtol=1e-10, atol=1e-12)
    _, tangent = torch.func.jvp(lambda y: net(y), (x,), (torch.ones_like(x),))
    slow = torch.autograd.functional.jvp(one_by_one(net), (x,), (torch.ones_like(x),))[1]
    torch.testing.assert_close(tangent, slow, rtol=1e-10, atol=1e-12)


def test_layer_norm_and_other_activations_run_layer_by_layer() -> None:
    for net in (mlp(5, 2, (16,), layer_norm=True), mlp(5, 2, (16,), "silu")):
        x = torch.randn(4, 5)
        assert torch.equal(net(x), one_by_one(net)(x))


# --------------------------------------------------------------------------------------- what a reader would trip over
def test_a_network_that_meets_itself_with_a_graph(forced: None) -> None:
    """The input comes from the same weights: with and without a graph the first derivatives are the same."""
    torch.manual_seed(0)
    net = mlp(5, 5, (16,), "tanh").double()
    x, params = torch.randn(7, 5, dtype=torch.float64), list(net.parameters())
    loss = net(net(x)).square().mean()
    with_graph = torch.autograd.grad(loss, params, create_graph=True)
    plain = torch.autograd.grad(one_by_one(net)(one_by_one(net)(x)).square().mean(), params)
    for a, b in zip(with_graph, plain, strict=True):
        torch.testing.assert_close(a.detach(), b, rtol=1e-10, atol=1e-13)


def test_weights_that_are_no_leaves_keep_their_gradient(forced: None) -> None:
    """Fast weights of an inner step, an adapter, a hypernetwork: the loss must reach what they were made of."""
    net, x = network("tanh"), torch.randn(7, 5, dtype=torch.float64)
    opt = adam(net.parameters(), 1e-3)

    def loss() -> Tensor:
        fast = {name: p * 0.9 for name, p in net.named_parameters()}
        return torch.func.functional_call(net, fast, (x,)).square().mean()

    inner = [p * 0.9 for p in net.parameters()]
    h = torch.tanh(x @ inner[0].t() + inner[1])
    exact = (torch.tanh(h @ inner[2].t() + inner[3]) @ inner[4].t() + inner[5]).square().mean()
    for a, b in zip(gradients(loss(), opt), torch.autograd.grad(exact, list(net.parameters())), strict=True):
        assert a is not None
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_threads_do_not_disturb_each_other(forced: None) -> None:
    import threading

    failures: list[BaseException] = []

    def train(seed: int) -> None:
        try:
            net = mlp(5, 2, (16,)).double()
            opt = adam(net.parameters(), 1e-3)
            for _ in range(60):
                gradients(net(torch.randn(8, 5, dtype=torch.float64)).square().mean(), opt)
        except BaseException as e:
            failures.append(e)

    threads = [threading.Thread(target=train, args=(k,)) for k in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert failures == []


def test_a_changed_network_runs_as_it_is_now(forced: None) -> None:
    x = torch.randn(4, 5, dtype=torch.float64)
    replaced, longer, hooked = network("relu"), network("relu"), network("relu")
    replaced[2] = nn.Linear(16, 12).double()
    longer.append(nn.Tanh())
    seen: list[int] = []
    hooked.hidden0.register_forward_hook(lambda *_: seen.append(1))  # type: ignore[operator, union-attr]
    for net in (replaced, longer, hooked):
        assert torch.equal(net(x), one_by_one(net)(x))
        assert not is_one_node(net(x))
    assert len(seen) == 3
