"""Gradient steps and slow copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def adam(params: Iterable[nn.Parameter], lr: float, eps: float = 1e-8) -> torch.optim.Adam:
    """Adam with one fused kernel call per step (the loop over parameters costs as much as a small network)."""
    return torch.optim.Adam(list(params), lr=lr, eps=eps, fused=True)


def minimize(loss: Tensor, opt: torch.optim.Optimizer, max_grad_norm: float | None = None) -> Tensor:
    """One gradient step of `opt` on the scalar `loss`. Returns the detached loss.

    Every gradient step of the project goes through here or through its two halves, `gradients` and `apply_gradients`,
    which a method needs that changes gradients in between or takes several losses at the same parameters.
    """
    apply_gradients(opt, gradients(loss, opt), max_grad_norm)
    return loss.detach()


def gradients(loss: Tensor, opt: torch.optim.Optimizer, *, allow_unused: bool = False) -> list[Tensor | None]:
    """Gradients of `loss` in the parameters of `opt`, in their order.

    No other network receives any, and backward skips the weight gradients of networks the loss merely passes through
    (a frozen critic under an actor loss). A parameter that `loss` does not depend on is an error unless `allow_unused`,
    which gives None for it: that step then leaves it alone.
    """
    return list(torch.autograd.grad(loss, _params(opt), allow_unused=allow_unused))


def apply_gradients(
    opt: torch.optim.Optimizer, grads: Sequence[Tensor | None], max_grad_norm: float | None = None
) -> None:
    """Step `opt` with `grads`; `max_grad_norm` first rescales them, in place, to that global L2 norm when longer."""
    params = _params(opt)
    if max_grad_norm is not None:
        present = [g for g in grads if g is not None]
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(present)))
        torch._foreach_mul_(present, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    opt.zero_grad(set_to_none=True)
    # the fused kernel does not tell autograd that it wrote: without this, a loss computed before the step and
    # differentiated after it would silently get gradients of a mixture of old and new weights instead of an error
    torch.autograd.graph.increment_version(params)


def _params(opt: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [p for group in opt.param_groups for p in group["params"]]


@torch.no_grad()
def polyak(source: nn.Module, lagged: nn.Module, tau: float) -> None:
    """`lagged <- lagged + tau * (source - lagged)` for every parameter, and a plain copy of every buffer."""
    torch._foreach_lerp_(list(lagged.parameters()), list(source.parameters()), tau)
    for slow, fast in zip(lagged.buffers(), source.buffers(), strict=True):
        slow.copy_(fast)


def frozen_copy(module: M) -> M:
    """A deep copy that no gradient reaches: the start of a lagged (target) network."""
    return copy.deepcopy(module).requires_grad_(False)
