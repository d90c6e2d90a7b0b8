"""Columns that can be computed from whole episodes, for those learners that ask for them.

Each is a pure function of flat rows [M] and `ends` [E] (one past the last row of each episode) and never looks across
the end of an episode.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from rlctl.types import Batch

if TYPE_CHECKING:
    from rlctl.data.reward import RewardTransform

NAMES = ("timestep", "next_action", "episode_return", "mc_return", "row")
OF_A_DATASET = {"row"}
"""Columns that episodes of an environment do not have."""


class Request(NamedTuple):
    """What a learner asked of its dataset, to be asked of later episodes too; see `Dataset.require`."""

    names: tuple[str, ...]
    gamma: float | None = None
    reward: RewardTransform | None = None
    extend_truncated: bool = False

    def compute(self, rows: Batch, ends: Tensor, returns: Tensor | None = None) -> dict[str, Tensor]:
        """The columns of whole episodes."""
        names, gamma, reward, extend = self
        return compute(names, rows, ends, gamma=gamma, reward=reward, extend_truncated=extend, returns=returns)


def compute(
    names: Iterable[str],
    rows: Batch,
    ends: Tensor,
    *,
    gamma: float | None = None,
    reward: RewardTransform | None = None,
    extend_truncated: bool = False,
    returns: Tensor | None = None,
) -> dict[str, Tensor]:
    """The columns `names` of whole episodes; see `Dataset.require` for the parameters.

    `returns` [E] are those of the episodes where they have had more rows than are here.
    """
    out: dict[str, Tensor] = {}
    for name in names:
        if name == "timestep":
            out[name] = timestep(ends)
        elif name == "next_action":
            out[name], out["has_next_action"] = next_action(rows.action, ends)
        elif name == "episode_return":
            out[name] = episode_return(rows.reward, ends, returns)
        elif name == "row":
            out[name] = torch.arange(len(rows.reward), device=rows.reward.device)
        elif name == "mc_return":
            if gamma is None:
                raise ValueError("mc_return needs gamma, the learner's discount per step")
            seen = rows.reward if reward is None else reward(rows.reward)
            out[name] = mc_return(seen, ends, gamma, extend=rows.truncated & ~rows.terminated & extend_truncated)
        else:
            close = get_close_matches(name, NAMES, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(NAMES)}"
            raise ValueError(f"no column '{name}': {hint}")
    return out


def column(b: Batch, name: str) -> Tensor:
    """The column `name` of a batch; ValueError for a batch of data that nobody asked for it."""
    if name not in b.extra:
        raise ValueError(f"this batch has no column '{name}': call prepare(dataset) of the agent before its update")
    return b.extra[name]


def lengths(ends: Tensor) -> Tensor:
    """[E] steps of each episode."""
    return ends.diff(prepend=ends.new_zeros(1))


def timestep(ends: Tensor) -> Tensor:
    """[M] int64: steps since the first stored row of the episode, from 0."""
    steps = lengths(ends)
    starts = ends - steps
    return torch.arange(int(ends[-1]), device=ends.device) - starts.repeat_interleave(steps)


def next_action(action: Tensor, ends: Tensor) -> tuple[Tensor, Tensor]:
    """The action [M, A] of the row that follows in the same episode, and [M] bool whether there is one.

    The last row of an episode has none and repeats its own: mask it, unless it terminates and is masked anyway.
    """
    following = action.roll(-1, 0)
    following[ends - 1] = action[ends - 1]
    known = torch.ones(len(action), dtype=torch.bool, device=action.device)
    known[ends - 1] = False
    return following, known


def episode_return(reward: Tensor, ends: Tensor, returns: Tensor | None = None) -> Tensor:
    """[M] float32: the undiscounted return of the whole episode a row belongs to: `returns` [E], or the sum."""
    steps = lengths(ends)
    total = torch.segment_reduce(reward.double(), "sum", lengths=steps) if returns is None else returns
    return total.float().repeat_interleave(steps)


def mc_return(reward: Tensor, ends: Tensor, gamma: float, extend: Tensor | None = None) -> Tensor:
    """[M] float32: discounted return-to-go, G_t = r_t + gamma G_{t+1}, ending with the episode.

    At the end of an episode whose last row is marked in `extend` [M] bool the last reward goes on for ever: G = r /
    (1 - gamma) there. A sparse task's failed trajectory, r < 0 all along, then has that value at every step (Cal-QL).
    Works backwards through all episodes side by side, in float64.
    """
    steps, order = lengths(ends).sort(descending=True)
    last = ends[order] - 1
    r = reward.double()
    out = torch.empty_like(r)
    g = torch.zeros(len(ends), dtype=torch.float64, device=reward.device)
    if extend is not None and bool(extend.any()):
        if gamma >= 1:
            raise ValueError(f"an episode that goes on for ever needs gamma < 1, got {gamma}")
        g = torch.where(extend[last], r[last] / (1 - gamma), g)
    # how many episodes have more than k steps, for every k
    longest = int(steps[0])
    longer = (len(ends) - torch.bincount(steps, minlength=longest + 1).cumsum(0)).tolist()
    for k in range(longest):
        n = longer[k]
        at = last[:n] - k
        g = r[at] + gamma * g[:n]
        out[at] = g
    return out.float()
