"""Fully connected networks as one autograd node, their backward pass written out.

`dense` runs a network layer by layer; where the products are large enough for it to pay, all layers are one node of the
autograd graph. Values and gradients are the same bit for bit, derivatives of higher order (in reverse mode) included.

`wanted` makes up for something autograd does not tell a Python function: which of the possible gradients were asked
for. `rlctl.ops.gradients` sets it, so that an actor loss through a critic skips the weight gradients of the critic.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor

from rlctl.ops.matmul import SMALLEST, linear, matmul

FusedActivation = Literal["relu", "tanh"]


class _Asked(threading.local):
    """Of each thread: ids of the parameters whose gradients are asked for; None: of all."""

    ids: frozenset[int] | None = None


_asked = _Asked()


@contextmanager
def wanted(params: Sequence[Tensor]) -> Iterator[None]:
    """Within, backward passes compute gradients of no other parameters of `dense` than `params`."""
    before, _asked.ids = _asked.ids, frozenset(map(id, params))
    try:
        yield
    finally:
        _asked.ids = before


def dense(x: Tensor, params: Sequence[Tensor], activation: FusedActivation) -> Tensor:
    """`[..., in] -> [..., out]` through the layers of `params` (weight `[out, in]`, bias `[out]`, weight, ...).

    `activation` follows every layer but the last.
    """
    if not _one_node(x, params):
        return _layers(x, params, activation)[-1]
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    out: Tensor = _Dense.apply(activation, flat, *params)  # type: ignore[no-untyped-call]
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], out.shape[-1])


def _one_node(x: Tensor, params: Sequence[Tensor]) -> bool:
    """Whether `_Dense` pays off (its own overhead is that of several nodes) and can do what is asked."""
    if torch.compiler.is_compiling():  # first of all: a comparison of sizes would tie an export to its example's
        return False
    rows = x.numel() // max(x.shape[-1], 1)
    return (
        rows * max(w.numel() for w in params[::2]) >= SMALLEST
        and x.device.type == "cpu"
        and x.dtype.is_floating_point
        and torch.is_grad_enabled()
        and not torch._C._are_functorch_transforms_active()
        and not torch.is_autocast_enabled("cpu")
        and torch.autograd.forward_ad._current_level < 0
    )


def _layers(x: Tensor, params: Sequence[Tensor], activation: FusedActivation) -> list[Tensor]:
    """What each layer gives, its activation included; `x` comes first."""
    out = [x]
    last = len(params) - 2
    for k in range(0, len(params), 2):
        x = linear(x, params[k], params[k + 1])
        if k < last:
            x = x.relu_() if activation == "relu" else x.tanh_()
        out.append(x)
    return out


class _Dense(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, activation: FusedActivation, x: Tensor, *params: Tensor) -> Tensor:
        layers = _layers(x, params, activation)
        ctx.activation = activation
        # only of a leaf can be known whether its gradient was asked for: others lead on to what was
        ctx.ids = [id(p) if p.is_leaf else None for p in params]
        ctx.save_for_backward(*params, *layers[:-1])
        return layers[-1]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        depth = len(saved) // 3
        params, layers = saved[: 2 * depth], saved[2 * depth :]
        need, asked = ctx.needs_input_grad[1:], _asked.ids
        if asked is not None:
            need = need[:1] + tuple(n and (i is None or i in asked) for n, i in zip(need[1:], ctx.ids, strict=True))
        if torch.is_grad_enabled():  # somebody differentiates this backward pass: let autograd see every operation
            return None, *_differentiable(ctx.activation, grad, layers[0], params, need)
        grads: list[Tensor | None] = [None] * (2 * depth)
        # the lowest layer that anything is wanted of; below it there is nothing to carry the gradient to
        stop = 0 if need[0] else min((k for k in range(depth) if need[2 * k + 1] or need[2 * k + 2]), default=depth)
        for k in range(depth - 1, stop - 1, -1):
            if need[2 * k + 1]:
                grads[2 * k] = matmul(grad.t(), layers[k])
            if need[2 * k + 2]:
                grads[2 * k + 1] = grad.sum(0)
            if k > stop or need[0]:
                grad = matmul(grad, params[2 * k])
            if k > stop:
                if ctx.activation == "relu":
                    grad = torch.ops.aten.threshold_backward(grad, layers[k], 0)
                else:
                    grad = torch.ops.aten.tanh_backward(grad, layers[k])
        return None, grad if need[0] else None, *grads


def _differentiable(
    activation: FusedActivation, grad: Tensor, x: Tensor, params: Sequence[Tensor], need: Sequence[bool]
) -> list[Tensor | None]:
    """The same gradients by autograd, from the beginning, with a graph."""
    # aliases: x may come from these very parameters, and only what happens in this network counts
    tensors = [t.view_as(t) for t in (x, *params)]
    out = _layers(tensors[0], tensors[1:], activation)[-1]
    inputs = [t for t, n in zip(tensors, need, strict=True) if n]
    found = iter(torch.autograd.grad(out, inputs, grad, create_graph=True))
    return [next(found) if n else None for n in need]
