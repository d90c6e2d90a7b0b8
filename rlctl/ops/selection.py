"""Choosing among candidate actions by their values, and searching for better ones near them."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlctl.ops.dense import wanted


def best_of(actions: Tensor, values: Tensor) -> Tensor:
    """Of `actions` [..., N, A] the one of the largest of `values` [..., N], [..., A]; of equals the first."""
    return picked(actions, values.argmax(-1))


def picked(actions: Tensor, index: Tensor) -> Tensor:
    """Entry `index` [...] (int64) of `actions` [..., N, A], [..., A]."""
    return actions.gather(-2, index[..., None, None].expand(*index.shape, 1, actions.shape[-1])).squeeze(-2)


def drawn(
    actions: Tensor, weights: Tensor, uniform: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """One of `actions` [..., N, A] with chances proportional to `weights` [..., N] >= 0, by inverting their sums.

    `uniform` [...] in [0, 1) decides, or is drawn from `generator`.
    """
    sums = weights.cumsum(-1)
    return picked(actions, reached(sums, uniform_for(weights, uniform, generator) * sums[..., -1]))


def uniform_for(weights: Tensor, uniform: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """`uniform` itself if given, else one draw from [0, 1) per row of `weights` [..., N], [...]."""
    if uniform is not None:
        return uniform
    return torch.rand(weights.shape[:-1], generator=generator, dtype=weights.dtype, device=weights.device)


def reached(sums: Tensor, height: Tensor) -> Tensor:
    """Index [...] (int64) of the first of the running sums [..., N] that exceeds `height` [...], at most N - 1."""
    return (sums[..., :-1] <= height.unsqueeze(-1)).sum(-1)


def top(actions: Tensor, values: Tensor, num: int) -> Tensor:
    """Of `actions` [..., N, A] the `num` of the largest `values` [..., N], [..., num, A], the best first."""
    index = values.topk(num, -1).indices
    return actions.gather(-2, index.unsqueeze(-1).expand(*index.shape, actions.shape[-1]))


@torch.no_grad()
def climbed(
    value: Callable[[Tensor], Tensor], actions: Tensor, steps: int, size: float, bound: float = 1.0
) -> tuple[Tensor, Tensor]:
    """The best points that gradient ascent from `actions` [..., A] passes, [..., A], and their values [...].

    `steps` times a <- clip(a + size dvalue/da, +-bound); the start and the end are points it passes, so no result is
    worse than its start. `value` maps [..., A] to [...], each entry by itself.
    """
    best, best_value = actions, torch.full(actions.shape[:-1], -torch.inf, dtype=actions.dtype, device=actions.device)
    for k in range(steps + 1):
        moving = k < steps
        with torch.set_grad_enabled(moving), wanted(()):
            x = actions.detach().requires_grad_(moving)
            v = value(x)
            slope = torch.autograd.grad(v.sum(), x)[0] if moving else None
        v = v.detach()
        better = v > best_value
        best, best_value = torch.where(better.unsqueeze(-1), actions, best), torch.where(better, v, best_value)
        if slope is not None:
            actions = (actions + size * slope).clamp(-bound, bound)
    return best, best_value
