"""Gradient steps and slow copies."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn

M = TypeVar("M", bound=nn.Module)


def adam(params: Iterable[nn.Parameter], lr: float, eps: float = 1e-8) -> torch.optim.Adam:
    """Adam with one fused kernel call per step (the loop over parameters costs as much as a small network)."""
    return torch.optim.Adam(list(params), lr=lr, eps=eps, fused=True)


def minimize(loss: Tensor, opt: torch.optim.Optimizer, max_grad_norm: float | None = None) -> Tensor:
    """One gradient step of `opt` on the scalar `loss`; every gradient step of the project goes through here.

    Only the gradients of the optimiser's own parameters are computed: no other network receives any, and backward
    skips the weight gradients of networks the loss merely passes through (a frozen critic under an actor loss).
    `max_grad_norm` rescales the gradient to that global L2 norm when it is longer. Returns the detached loss.
    """
    params = [p for group in opt.param_groups for p in group["params"]]
    grads = list(torch.autograd.grad(loss, params))
    if max_grad_norm is not None:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_mul_(grads, (max_grad_norm / (norm + 1e-6)).clamp(max=1.0))
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    opt.step()
    opt.zero_grad(set_to_none=True)
    return loss.detach()


@torch.no_grad()
def polyak(source: nn.Module, lagged: nn.Module, tau: float) -> None:
    """`lagged <- lagged + tau * (source - lagged)` for every parameter, and a plain copy of every buffer."""
    torch._foreach_lerp_(list(lagged.parameters()), list(source.parameters()), tau)
    for slow, fast in zip(lagged.buffers(), source.buffers(), strict=True):
        slow.copy_(fast)


def frozen_copy(module: M) -> M:
    """A deep copy that no gradient reaches: the start of a lagged (target) network."""
    return copy.deepcopy(module).requires_grad_(False)
