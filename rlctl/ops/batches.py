"""Cutting rollouts into minibatches, and averaging what they report."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

R = TypeVar("R", bound=tuple[Any, ...])


def minibatches(rows: R, size: int, generator: torch.Generator | None = None) -> Iterator[R]:
    """One shuffled pass over `rows`, a named tuple of tensors `[B, ...]`, in pieces of `size` (the last may be short).

    Every row comes exactly once. One gather for the whole pass; the pieces are views of it.
    """
    order = torch.randperm(len(rows[0]), generator=generator, device=rows[0].device)
    make = type(rows)._make  # type: ignore[attr-defined]
    for parts in zip(*[x[order].split(size) for x in rows], strict=True):
        yield make(parts)


def column_moments(x: Tensor, block: int = 1 << 14) -> tuple[Tensor, Tensor]:
    """Mean and (population) std [D] in float64 of the rows of `x` [M, D], `block` rows at a time: no wide copy of x."""
    blocks = torch.split(x, block)
    mean = torch.stack([rows.double().sum(0) for rows in blocks]).sum(0) / len(x)
    var = torch.stack([(rows.double() - mean).square().sum(0) for rows in blocks]).sum(0) / len(x)
    return mean, var.sqrt()


def mean_of(log: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean by name of 0-dim tensors."""
    return {name: torch.stack([row[name] for row in log]).mean() for name in log[0]}
