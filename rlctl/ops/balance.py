"""A family of policies indexed by a balance coefficient beta: how beta is drawn and how a network is told of it.

Source: Wang et al. 2023, arXiv:2310.17966 (FamO2O); official code github.com/LeapLabTHU/FamO2O.
"""

from __future__ import annotations

import torch
from torch import Tensor

ENCODING_DIM = 6
"""Numbers a coefficient is encoded in."""


def encoded(beta: Tensor, base: float = 10_000.0) -> Tensor:
    """`beta` [...] as [..., 6]: sin(beta / base^(2i/6)) at 2i and cos of the same at 2i + 1, i = 0, 1, 2."""
    i = torch.arange(0, ENCODING_DIM, 2, dtype=beta.dtype, device=beta.device)
    angle = beta.unsqueeze(-1) / base ** (i / ENCODING_DIM)
    return torch.stack([angle.sin(), angle.cos()], -1).flatten(-2)


def conditioned(obs: Tensor, beta: Tensor) -> Tensor:
    """[s, encoded(beta)], [..., O + 6], of `obs` [..., O] and `beta` [...]."""
    return torch.cat([obs, encoded(beta)], -1)


def spanned(x: Tensor, low: float, high: float) -> Tensor:
    """x in [-1, 1] mapped onto [low, high], of the shape of `x`."""
    return low + (x + 1) / 2 * (high - low)


def uniform(like: Tensor, low: float, high: float, generator: torch.Generator) -> Tensor:
    """A coefficient from [low, high) for every entry of `like` [B]."""
    draw = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=like.device)
    return low + draw * (high - low)
