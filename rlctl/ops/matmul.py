"""Matrix products that use the faster of the two libraries PyTorch ships on x86.

PyTorch sends float32 products to MKL, which on AMD processors runs at about half the speed of oneDNN (256 x 256 x 256
on a Zen 5 core: 0.32 ms against 0.15 ms). oneDNN costs about 10 us more per call, so small products stay where they
are. The choice depends on the processor's vendor, dtype and shapes alone, never on a timing: a run stays reproducible.
`benchmarks/speed/matmul.py` measures both.

`linear` is a drop-in for `torch.nn.functional.linear`, differentiable to any order in reverse mode. Forward mode
(`torch.func.jvp`) has no rule here: set `ENABLED = False` around it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from rlctl.provenance import cpu_vendor

SMALLEST = 1_200_000
"""Multiply-adds below which oneDNN's overhead outweighs its speed."""


def onednn_is_faster() -> bool:
    """AMD processor and a torch that exposes the operator."""
    return (
        cpu_vendor() == "AuthenticAMD"
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    )


ENABLED = onednn_is_faster()


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: `[..., in]`, `[out, in]`, `[out]` -> `[..., out]`."""
    if not _worth_it(x, weight, x.numel() * weight.shape[0]):
        return functional.linear(x, weight, bias)
    flat = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
    if torch.is_grad_enabled():
        out: Tensor = _Linear.apply(flat, weight, bias)  # type: ignore[no-untyped-call]
    else:  # spare the call its bookkeeping
        out = _linear(flat, weight, bias)
    return out if x.dim() == 2 else out.reshape(*x.shape[:-1], weight.shape[0])


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a b for two matrices, `[n, k]`, `[k, m]` -> `[n, m]`."""
    if not _worth_it(a, b, a.numel() * b.shape[1]):
        return a @ b
    out: Tensor = _MatMul.apply(a, b) if torch.is_grad_enabled() else _matmul(a, b)  # type: ignore[no-untyped-call]
    return out


def _worth_it(a: Tensor, b: Tensor, multiply_adds: int) -> bool:
    return (
        ENABLED
        and not torch.compiler.is_compiling()  # before the sizes: comparing them would tie an export to its example's
        and multiply_adds >= SMALLEST
        and a.dtype == b.dtype == torch.float32
        and a.device.type == "cpu"
    )


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return out


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    out: Tensor = torch.ops.mkldnn._linear_pointwise(a, b.t(), None, "none", [], "")
    return out


class _Linear(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return _linear(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor | None], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        need_x, need_weight, need_bias = ctx.needs_input_grad
        return (
            matmul(grad, weight) if need_x else None,
            matmul(grad.t(), x) if need_weight else None,
            grad.sum(0) if need_bias else None,
        )


class _MatMul(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _matmul(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        a, b = ctx.saved_tensors
        need_a, need_b = ctx.needs_input_grad
        return matmul(grad, b.t()) if need_a else None, matmul(a.t(), grad) if need_b else None
