"""Exact nearest neighbours in a table of rows, behind one method: `nearest(query, k) -> index of the k-th nearest`.

Three ways to the same answer. `Tree` asks a KD-tree on the host, which visits a small part of the rows. `Shortlist`
looks first into a list of rows known to be near, and asks the tree where that does not settle the matter. `Matrix`
computes every distance in chunks without leaving the device: nothing is read on the host, and the work grows with the
table. Which is faster is measured by `benchmarks/speed/prdc.py`; what was measured is in benchmarks/README.md.
"""

from __future__ import annotations

from typing import Literal, Protocol

import torch
from scipy.spatial import cKDTree
from torch import Tensor

Method = Literal["auto", "shortlist", "tree", "matrix"]


class Neighbours(Protocol):
    """A table of rows [M, D] that can be asked for the nearest ones."""

    host_reads: str
    """Why a query leaves the device; empty if it does not."""

    def nearest(self, query: Tensor, k: int = 1, row: Tensor | None = None) -> Tensor:
        """Index [B] int64 of the row that is the `k`-th nearest (1: the nearest) to each `query` [B, D].

        Distances are Euclidean, compared in float64. Of rows equally near, any one. `row` [B] int64 says which row of
        the table has the same state part as the query, -1 for none: a hint that changes no answer.
        """


class Tree:
    """A KD-tree in float64 on the host, queried on as many threads as torch uses.

    Nodes are split in their middle rather than at the median, and hold up to 32 rows.
    """

    host_reads = "the KD-tree of its neighbours is outside of torch"

    def __init__(self, rows: Tensor) -> None:
        self.tree = cKDTree(rows.double().cpu().numpy(), leafsize=32, balanced_tree=False)

    def nearest(self, query: Tensor, k: int = 1, row: Tensor | None = None) -> Tensor:
        """See `Neighbours`."""
        _check(query, k, self.tree.n, self.tree.m)
        _, index = self.tree.query(query.detach().double().cpu().numpy(), [k], workers=torch.get_num_threads())
        return torch.from_numpy(index[:, 0]).to(query.device)


EXACT_DIMS = 12
"""Up to this many dimensions of the state, short lists hold the very nearest at once. At 11 (Hopper) that takes 0.2 ms
a row; at 17 (HalfCheetah) 5.2 ms, and 0.4 ms with slack 1, which settles 94 to 98 % of questions near the data."""


class Shortlist:
    """For queries (the state of a row, any action): first among the rows whose states are nearest to that one.

    The `size` nearest states of a row are found once, when it is first asked for, by a tree over states alone. The
    squared distance to a listed row is that of the states, which is kept, plus that of the actions. A row outside of
    the list is no nearer than the farthest listed state: where the best listed row is within that distance, it is the
    nearest of all. The other queries, and those without a row, go to a tree over whole rows. The lists take 12 `size`
    bytes per row of the table.

    Finding the very nearest states is dear in many dimensions, and mostly not needed: with slack e the tree passes over
    what is not closer than 1 / (1 + e) of the farthest it lists, so a row outside of the list is no nearer than that. A
    list that does not settle a query is made anew without slack, once, before the tree over whole rows is asked.
    """

    host_reads = Tree.host_reads

    def __init__(self, rows: Tensor, state_dim: int, size: int = 32, slack: float | None = None) -> None:
        """Index `rows` [M, D], of which the first `state_dim` numbers are the state; `slack` None: by dimension."""
        self.whole = Tree(rows)
        wide = rows.double()
        self.states, self.actions = wide[:, :state_dim].contiguous(), wide[:, state_dim:].contiguous()
        self.by_state = Tree(self.states)
        self.size = min(size, len(rows))
        first = (0.0 if state_dim <= EXACT_DIMS else 1.0) if slack is None else slack
        self.slacks = (first, 0.0) if first else (0.0,)
        self.slack = torch.full((len(rows),), float("inf"), device=rows.device)  # of the list of a row; inf: none yet
        self.near = torch.empty(len(rows), self.size, dtype=torch.int32, device=rows.device)
        self.square = torch.empty(len(rows), self.size, dtype=torch.float64, device=rows.device)

    def nearest(self, query: Tensor, k: int = 1, row: Tensor | None = None) -> Tensor:
        """See `Neighbours`."""
        if row is None or k > self.size:
            return self.whole.nearest(query, k)
        _check(query, k, self.whole.tree.n, self.whole.tree.m)
        action = query.detach().double()[:, self.states.shape[-1] :]
        found = torch.empty_like(row)
        open_ = (row >= 0).nonzero()[:, 0]
        for slack in self.slacks:
            found[open_], settled = self._listed(action[open_], k, row[open_], slack)
            open_ = open_[~settled]
        asked = torch.cat([open_, (row < 0).nonzero()[:, 0]])
        if len(asked):
            found[asked] = self.whole.nearest(query[asked], k)
        return found

    def _listed(self, action: Tensor, k: int, row: Tensor, slack: float) -> tuple[Tensor, Tensor]:
        """The k-th nearest of the listed rows to (the state of `row`, `action`), and whether none is nearer, [B]."""
        self.fill(row, slack)
        near, square = self.near[row].long(), self.square[row]
        best, at = _smallest(square + (self.actions[near] - action.unsqueeze(1)).square().sum(-1), k)
        settled = best[:, k - 1] <= square[:, -1] / (1 + self.slack[row].double()).square()
        if self.size == self.whole.tree.n:
            settled = torch.ones_like(settled)
        return near.gather(-1, at)[:, k - 1], settled

    def fill(self, row: Tensor, slack: float) -> None:
        """Make the lists of `row` [B] int64 that are missing or were made with more slack."""
        missing = torch.unique(row[self.slack[row] > slack])
        if len(missing):
            distance, near = self.by_state.tree.query(
                self.states[missing].cpu().numpy(), self.size, eps=slack, workers=torch.get_num_threads()
            )
            shape = (len(missing), self.size)  # a list of one comes without its axis
            self.near[missing] = torch.from_numpy(near.reshape(shape)).to(self.near)
            self.square[missing] = torch.from_numpy(distance.reshape(shape)).to(self.square).square()
            self.slack[missing] = slack


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

    def nearest(self, query: Tensor, k: int = 1, row: Tensor | None = None) -> Tensor:
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


def neighbours(rows: Tensor, method: Method = "auto", state_dim: int | None = None) -> Neighbours:
    """An index of `rows` [M, D]: as named, or (`auto`) by tree on a CPU if D is at most 64, else the matrix.

    Where `state_dim` says how many of the D numbers are the state, `auto` puts the short lists before the tree.
    """
    if method == "auto":
        small = rows.device.type == "cpu" and rows.shape[-1] <= TREE_DIMS
        method = "matrix" if not small else "tree" if state_dim is None else "shortlist"
    if method == "shortlist":
        if state_dim is None:
            raise ValueError("a short list is of states: say how many of the numbers of a row they are (state_dim)")
        return Shortlist(rows, state_dim)
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
