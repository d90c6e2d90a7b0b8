"""The maths of ODICE: conjugates of two divergences, their weights, and the orthogonal-gradient sum.

Source: Mao et al. 2024, arXiv:2402.00348 (dual objective; orthogonal-gradient update, definition 1).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

Divergence = Literal["chi2", "reverse-kl"]


def conjugate(y: Tensor, divergence: Divergence) -> Tensor:
    """f*(y) = max_{w >= 0} (w y - f(w)), of the shape of `y`; convex, f*(0) = 0 and f*'(0) = 1 for chi2.

    chi2, f(w) = (w - 1)^2: y + y^2 / 4 where y > -2, else -1. reverse-kl: exp(y - 1).
    It has an absolute scale (the kink of chi2 is at y = -2): rewards have to be large against 2.
    """
    if divergence == "reverse-kl":
        return (y - 1).exp()
    w = dual_weight(y, divergence)
    return y * w - (w - 1).square()


def dual_weight(y: Tensor, divergence: Divergence) -> Tensor:
    """f*'(y), the maximising w of `conjugate`: max(y / 2 + 1, 0) for chi2, exp(y - 1) for reverse-kl."""
    return (y - 1).exp() if divergence == "reverse-kl" else (y / 2 + 1).clamp(min=0)


def orthogonal_sum(
    forward: Sequence[Tensor], backward: Sequence[Tensor], eps: float = 1e-10
) -> tuple[list[Tensor], Tensor]:
    """g_f plus what of g_b is orthogonal to it: (1 - c) g_f + g_b with c = <g_f, g_b> / max(<g_f, g_f>, eps).

    Both gradients are lists of tensors over the same parameters; the products run over ALL of them, so that there is
    one c (returned, 0-dim), not one per layer. The part along g_f is g_f itself, however far g_b points against it.
    """
    product, square = _dot(forward, backward), _dot(forward, forward)
    c = product / square.clamp(min=eps)
    return [(1 - c) * f + b for f, b in zip(forward, backward, strict=True)], c


def _dot(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(a, b, strict=True)]).sum()
