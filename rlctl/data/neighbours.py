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


TREE_STATE_DIMS = 12
"""Up to this many dimensions of the state, the nearest states of a row are found by a tree, above by `_Groups`."""


class Shortlist:
    """For queries (the state of a row, any action): first among the rows whose states are nearest to that one.

    The `size` nearest states of a row are found once, when it is first asked for. The squared distance to a listed row
    is that of the states, which is kept, plus that of the actions. A row outside of the list is no nearer than the
    farthest listed state: where the best listed row is within that distance, it is the nearest of all. The other
    queries, and those without a row, go to a tree over whole rows. The lists take 12 `size` bytes per row of the table.
    """

    host_reads = Tree.host_reads

    def __init__(self, rows: Tensor, state_dim: int, size: int = 32, search: _States | None = None) -> None:
        """Index `rows` [M, D], of which the first `state_dim` numbers are the state; `search` None: by dimension."""
        self.whole = Tree(rows)
        wide = rows.double()
        self.states, self.actions = wide[:, :state_dim].contiguous(), wide[:, state_dim:].contiguous()
        self.search = search or (_ByTree if state_dim <= TREE_STATE_DIMS else _Groups)(self.states)
        self.size = min(size, len(rows))
        # squared distance of states within which a list holds every row; negative where there is no list yet
        self.reach = torch.full((len(rows),), -1.0, dtype=torch.float64, device=rows.device)
        self.near = torch.empty(len(rows), self.size, dtype=torch.int32, device=rows.device)
        self.square = torch.empty(len(rows), self.size, dtype=torch.float64, device=rows.device)

    def nearest(self, query: Tensor, k: int = 1, row: Tensor | None = None) -> Tensor:
        """See `Neighbours`."""
        if row is None or k > self.size:
            return self.whole.nearest(query, k)
        _check(query, k, self.whole.tree.n, self.whole.tree.m)
        known = row.clamp(min=0)
        self.fill(known)
        near, square = self.near[known].long(), self.square[known]
        action = query.detach().double()[:, self.states.shape[-1] :]
        best, at = _smallest(square + (self.actions[near] - action.unsqueeze(1)).square().sum(-1), k)
        found = near.gather(-1, at)[:, k - 1]
        asked = ((best[:, k - 1] > self.reach[known]) | (row < 0)).nonzero()[:, 0]
        if len(asked):
            found[asked] = self.whole.nearest(query[asked], k)
        return found

    def fill(self, row: Tensor) -> None:
        """Make the lists of `row` [B] int64, where they are missing."""
        missing = torch.unique(row[self.reach[row] < 0])
        for some in missing.split(256) if len(missing) else ():  # in parts, which bounds the memory of the search
            near, square, reach = self.search.lists(self.states[some], self.size)
            self.near[some], self.square[some] = near.to(self.near), square
            self.reach[some] = reach if self.size < len(self.states) else torch.inf


class _States(Protocol):
    """A table of states [M, S] that can be asked for the nearest of many."""

    def lists(self, query: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        """Of each `query` [B, S] the `size` nearest rows, their squared distances (float64), both [B, size] and
        ascending, and the squared distance [B] that no other row is within."""


class _ByTree:
    def __init__(self, states: Tensor) -> None:
        self.tree = Tree(states).tree

    def lists(self, query: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        distance, near = self.tree.query(query.cpu().numpy(), size, workers=torch.get_num_threads())
        shape = (len(query), size)  # a list of one comes without its axis
        square = torch.from_numpy(distance.reshape(shape)).to(query).square()
        return torch.from_numpy(near.reshape(shape)).to(query.device), square, square[:, -1]


class _Groups:
    """All distances in float32 as one matrix product, of which the least of each `GROUP` rows is kept; the rows of the
    groups that come first are then compared in float64.

    Where a tree has to visit most of its leaves this costs a tenth to a twentieth. What float32 may hide is taken off
    the distance that no other row is within, so no answer depends on it.
    """

    GROUP, SPARE, CHUNK = 32, 8, 1 << 12

    def __init__(self, states: Tensor) -> None:
        self.states = states.double()
        self.centre = self.states.mean(0)
        x = self.states - self.centre  # near the origin float32 rounds least
        square = x.square().sum(-1, keepdim=True)
        self.largest = float(square.max())
        self.table = torch.cat([x, square], -1).float()
        pad = self.table.new_zeros(-len(x) % self.GROUP, x.shape[-1] + 1)
        pad[:, -1] = torch.inf  # rows that are infinitely far
        self.table = torch.cat([self.table, pad])

    def lists(self, query: Tensor, size: int) -> tuple[Tensor, Tensor, Tensor]:
        wide = query.double()
        q = wide - self.centre
        own = q.square().sum(-1)
        factor = torch.cat([-2 * q, torch.ones_like(q[:, :1])], -1).float()
        parts = [self.table[k : k + self.CHUNK] for k in range(0, len(self.table), self.CHUNK)]
        least = torch.cat([(factor @ x.T).view(len(q), -1, self.GROUP).amin(-1) for x in parts], -1)
        # the `size` nearest rows lie in the `size` groups with the nearest rows, but for what float32 confuses
        taken = min(size + self.SPARE, least.shape[-1])
        values, group = least.topk(min(taken + 1, least.shape[-1]), largest=False)
        row = group[:, :taken, None] * self.GROUP + torch.arange(self.GROUP, device=query.device)
        row = row.flatten(1)
        real = row < len(self.states)
        row = row.clamp(max=len(self.states) - 1)
        apart = (self.states[row] - wide.unsqueeze(1)).square().sum(-1).where(real, torch.inf)
        square, at = apart.topk(size, largest=False)
        reach = square[:, -1]
        if taken < least.shape[-1]:
            rounding = (q.shape[-1] + 3) * torch.finfo(torch.float32).eps * (own + 2 * self.largest)
            reach = torch.minimum(reach, values[:, taken].double() + own - rounding).clamp(min=0)
        return row.gather(-1, at), square, reach


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
