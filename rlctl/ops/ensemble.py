"""The smallest of a few randomly chosen members of an ensemble of critics: less optimistic than one, less pessimistic
than the smallest of all.

Source: Chen et al. 2021, arXiv:2101.05982 (REDQ), algorithm 1.
"""

from __future__ import annotations

from math import comb

import torch
from torch import Tensor


def subset_min(q: Tensor, size: int, generator: torch.Generator | None = None) -> Tensor:
    """min over `size` of the E members of `q` [E, ...], [...]: one draw without replacement for all entries.

    With `size` E all members count, and no random number is drawn.
    """
    chosen = random_subset(len(q), size, q.device, generator)
    return (q if chosen is None else q.index_select(0, chosen)).amin(0)


def random_subset(num: int, size: int, device: torch.device, generator: torch.Generator | None = None) -> Tensor | None:
    """`size` of `num` members, [size] (int64); None, and no random number, if that is all of them."""
    check(num, size)
    return None if size == num else torch.randperm(num, generator=generator, device=device)[:size]


def mean_subset_min(q: Tensor, size: int) -> Tensor:
    """What `subset_min` gives on average over all subsets, [...], from `q` [E, ...].

    The k-th smallest of E values (k = 0, 1, ...) is the smallest of a subset with chance C(E - 1 - k, size - 1) /
    C(E, size).
    """
    num = len(q)
    check(num, size)
    chances = [comb(num - 1 - k, size - 1) / comb(num, size) for k in range(num)]
    weights = torch.cat([q.new_full((1,), chance) for chance in chances])  # filled on the device: nothing is copied
    return torch.tensordot(weights, q.sort(0).values, dims=1)


def check(num: int, size: int) -> None:
    """ValueError unless a subset of `size` can be taken of `num` critics."""
    if not 1 <= size <= num:
        raise ValueError(f"a backup takes the smallest of 1 to {num} critics, as many as there are; not of {size}")
