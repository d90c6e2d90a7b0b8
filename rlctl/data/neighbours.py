"""Exact nearest neighbours in a table of rows, behind one method: `nearest(query, k) -> index of the k-th nearest`.

Two ways to the same answer. `Tree` asks a KD-tree on the host, which visits a small part of the rows. `Matrix` computes
every distance in chunks without leaving the device: nothing is read on the host, and the work grows with the table.
Which one is faster is measured by `benchmarks/speed/prdc.py`; what was measured is in benchmarks/README.md.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from scipy.spatial import cKDTree
from torch import Tensor

Method = Literal["auto", "tree", "matrix"]


class Neighbours(Protocol):
    """A table of rows [M, D] that can be asked for the nearest ones."""

    host_reads: str
    """Why a query leaves the device; empty if it does not."""

    def nearest(self, query: Tensor, k: int = 1) -> Tensor:
        """Index [B] int64 of the row that is the `k`-th nearest (1: the nearest) to each `query` [B, D].

        Distances are Euclidean, compared in float64. Of rows equally near, any one.
        """


class Tree:
    """A KD-tree in float64 on the host, queried on as many threads as torch uses.

    Nodes are split in their middle rather than at the median, and hold up to 32 rows.
    """

    host_reads = "the KD-tree of its neighbours is outside of torch"

    def __init__(self, rows: Tensor) -> None:
        self.tree = cKDTree(rows.double().cpu().numpy(), leafsize=32, balanced_tree=False)

    def nearest(self, query: Tensor, k: int = 1) -> Tensor:
        """See `Neighbours`."""
        _check(query, k, self.tree.n, self.tree.m)
        _, index = self.tree.query(query.detach().double().cpu().numpy(), [k], workers=torch.get_num_threads())
        return torch.from_numpy(index[:, 0]).to(query.device)


class Matrix:
    """All distances, `chunk` rows of the table at a time, in float64 on the device of `rows`.

    Compared is |x|^2 - 2 <q, x>, the squared distance without the |q|^2 that all rows share, as one matrix product: in
    float32 its rounding (1e-7 of |x|^2) would confuse rows that lie near each other far from the origin.
    """

    host_reads = ""

    def __init__(self, rows: Tensor, chunk: int | None = None) -> None:
        wide = rows.double()
        self.rows = torch.cat([wide, wide.square().sum(-1, keepdim=True)], -1)  # [M, D + 1]
        self.chunk = chunk or (1 << 16 if rows.is_cuda else 1 << 13)  # on a CPU a chunk's distances stay in the cache

    def nearest(self, query: Tensor, k: int = 1) -> Tensor:
        """See `Neighbours`."""
        _check(query, k, len(self.rows), self.rows.shape[1] - 1)
        wide = query.detach().double()
        factor = torch.cat([-2 * wide, wide.new_ones(len(wide), 1)], -1)
        near, index = wide.new_empty(len(wide), 0), torch.empty(len(wide), 0, dtype=torch.int64, device=wide.device)
        for start in range(0, len(self.rows), self.chunk):
            part, at = _smallest(factor @ self.rows[start : start + self.chunk].T, k)
            near, index = torch.cat([near, part], -1), torch.cat([index, at + start], -1)
            near, best = _smallest(near, k)
            index = index.gather(-1, best)
        return index[:, k - 1]


TREE_DIMS = 64
"""Up to this many dimensions `auto` takes the tree on a CPU. It took a tenth of the matrix's time or less at 14, about
the same or less at 23, 1.4 to 10 times as much at 113 and 365, where it ends up visiting most rows."""


def neighbours(rows: Tensor, method: Method = "auto") -> Neighbours:
    """An index of `rows` [M, D]: as named, or (`auto`) the tree on a CPU if D is at most 64, else the matrix."""
    if method == "auto":
        method = "tree" if rows.device.type == "cpu" and rows.shape[-1] <= TREE_DIMS else "matrix"
    return Tree(rows) if method == "tree" else Matrix(rows)


def _smallest(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The `k` smallest entries of each row (all, if it has fewer), ascending, and where they are."""
    found = x.min(-1, keepdim=True) if k == 1 else x.topk(min(k, x.shape[-1]), largest=False)
    return found.values, found.indices


def _check(query: Tensor, k: int, rows: int, dim: int) -> None:
    if query.dim() != 2 or query.shape[-1] != dim:
        raise ValueError(f"a query is [B, {dim}] like the rows of the table, got {tuple(query.shape)}")
    if not 1 <= k <= rows:
        raise ValueError(f"k={k}: the table has {rows} rows, so k is in 1..{rows}")
