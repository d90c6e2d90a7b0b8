"""Choosing one of several candidate actions by their values."""

from __future__ import annotations

import torch
from torch import Tensor


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
    if uniform is None:
        like = {"dtype": weights.dtype, "device": weights.device}
        uniform = torch.rand(weights.shape[:-1], generator=generator, **like)  # type: ignore[call-overload]
    sums = weights.cumsum(-1)
    return picked(actions, (sums[..., :-1] <= uniform.unsqueeze(-1) * sums[..., -1:]).sum(-1))
