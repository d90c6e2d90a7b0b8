"""What every reader produces: flat arrays of transitions, and the two views of them.

- `exact`: the true successor of every row; `terminated` and `truncated` apart; no pair crosses from one episode into
  the next. A row whose successor is unknown is dropped, unless it terminates (its value is masked then).
- `d4rl_compat`: the pairs that D4RL's `qlearning_dataset` gives and most published offline results were trained on:
  the successor is simply the next row of the file, rows at a timeout and the last row of the file are dropped.

Memory: arrays are allocated once, at their final size and type, filled, and shortened in place.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
from numpy.typing import NDArray

from rlctl.errors import UsageError

BLOCK = 1 << 14
"""Rows worked on at a time."""
ROUNDING = 1e-5
"""Two numbers that differ by no more than this, times 1 + their size, are the same one, rounded."""

Array = NDArray[Any]
View = Literal["exact", "d4rl_compat"]


class DatasetError(UsageError):
    """A dataset that is not there, cannot be read or is not what was expected. One line: what came, what to do."""


class Table(NamedTuple):
    """Transitions of whole episodes, one after the other. `M` rows, `E` episodes; floats are float32."""

    obs: Array
    """[M, O] as stored."""
    action: Array
    """[M, A] in units of [-1, 1]."""
    reward: Array
    """[M] as stored."""
    next_obs: Array
    """[M, O]; `exact`: the true successor, where a row terminates and the file lacks it `obs` again."""
    terminated: Array
    """[M] bool."""
    truncated: Array
    """[M] bool."""
    ends: Array
    """[E] int64, one past the last row of each episode."""
    returns: Array
    """[E] float64, sum of the stored rewards, those of rows that could not be kept included."""


@dataclass(frozen=True)
class Origin:
    """Where a table comes from."""

    id: str
    """Minari id, or the file name without its suffix."""
    format: str
    """minari-hdf5, minari-arrow, minari-parquet, d4rl-hdf5 or npz; `memory` for one that was not read."""
    env_id: str | None = None
    """Gymnasium id of the task it was recorded on ("Hopper-v5"), None where the source does not say."""
    env_options: dict[str, Any] = field(default_factory=dict)
    """Keyword arguments the task was made with, where the source says."""
    episode_len: int | None = None
    """Steps after which the task truncates an episode, where the source says."""
    action_box: tuple[Array, Array] | None = None
    """Low and high [A] that the stored actions were mapped to [-1, 1] from; None: they are as stored."""
    unflagged_ends: int = 0
    """Ends of episodes that the `timeouts` of a flat file miss, found where its `next_observations` jump."""
    meta: dict[str, Any] = field(default_factory=dict)
    """The source's own description (Minari's metadata). Of what `rlctl data convert` wrote: `converted_from`, the `id`
    and `format` of its source."""


class Findings(list[str]):
    """Collects what is wrong with a dataset where a reader would otherwise stop at the first thing."""


def complain(found: Findings | None, message: str) -> None:
    """Note `message`, or raise it as a DatasetError when nobody collects."""
    if found is None:
        raise DatasetError(message)
    found.append(message)


def as_flags(values: Array, what: str, found: Findings | None = None) -> Array:
    """`values` (bool, integers or floats) as bool; refuse, by the name of `what` they are, others than 0 and 1."""
    flags: Array = values != 0
    wrong = flags & (values != 1)
    if wrong.any():
        row = int(wrong.reshape(-1).argmax())
        complain(
            found,
            f"{what} holds values other than 0 and 1 in {int(wrong.sum()):,} rows, "
            f"first {values.reshape(-1)[row]} in row {row}: set each to one of them",
        )
    return flags


def check_view(view: str) -> None:
    """DatasetError for a view there is not."""
    if view not in get_args(View):
        raise DatasetError(f"no view '{view}': allowed are {' and '.join(get_args(View))}")


def allocate(m: int, obs_dim: int, act_dim: int) -> Table:
    """An empty table of `m` rows."""
    none = np.empty(0)
    return Table(
        np.empty((m, obs_dim), np.float32),
        np.empty((m, act_dim), np.float32),
        np.empty(m, np.float32),
        np.empty((m, obs_dim), np.float32),
        np.empty(m, bool),
        np.empty(m, bool),
        ends=none,
        returns=none,
    )


def exact(
    table: Table, reward: Array, terminal: Array, timeout: Array, *, successors: bool, unflagged_ends: Array
) -> Table:
    """The exact view of `N` flat rows, in the table's own memory.

    `obs` and `action` are filled, `next_obs` too where `successors`. `reward` [N] float64; `terminal`, `timeout` and
    `unflagged_ends` (an episode ends here though no flag says so) [N] bool. With successors every row is kept.
    Without, the successor is the next row of the same episode: the last row of an episode that is not terminal has
    none and is dropped, the row before it carries `truncated`; a terminal row gets `obs` again.
    """
    stop = terminal | timeout | unflagged_ends
    stop[-1] = True
    if successors:
        keep = np.ones(len(stop), bool)
    else:
        keep = ~stop | terminal
        table.next_obs[:-1] = table.obs[1:]
        table.next_obs[terminal] = table.obs[terminal]
    return _cut(table, reward, terminal, timeout, keep, stop)


def d4rl_compat(table: Table, reward: Array, terminal: Array, timeout: Array) -> Table:
    """D4RL's training pairs of `N` flat rows, in the table's own memory; parameters as of `exact`.

    The successor of row i is row i + 1 of the file, also where i terminates (the first observation of the next episode;
    masked in a target, wrong anywhere else). Rows with a timeout are dropped, and so is the last row of the file.
    The row before a dropped one carries `truncated`, so episodes stay apart here too.
    """
    keep = ~timeout
    keep[-1] = False
    table.next_obs[:-1] = table.obs[1:]
    stop = terminal | timeout
    stop[-1] = True
    return _cut(table, reward, terminal, np.zeros_like(timeout), keep, stop)


def _cut(table: Table, reward: Array, terminal: Array, timeout: Array, keep: Array, stop: Array) -> Table:
    """Keep the rows of `keep`, and say where episodes (which end at `stop`) now end and what they returned."""
    stops = np.flatnonzero(stop) + 1
    dropped = np.searchsorted(np.flatnonzero(~keep), stops)  # up to the end of each episode
    rows = np.diff(stops - dropped, prepend=0)  # kept, per episode
    held = rows > 0  # an episode of one row without a successor leaves nothing
    ends, returns = np.cumsum(rows)[held], sums(reward, stops)[held]
    if len(ends) == 0:
        raise DatasetError("it holds no transition whose successor is known")
    table.reward[:], table.terminated[:], table.truncated[:] = reward, terminal, timeout
    if not keep.all():
        table = table._replace(**{k: compact(getattr(table, k), keep) for k in Table._fields[:6]})
    last = ends - 1
    table.truncated[last] |= ~table.terminated[last]
    return table._replace(ends=ends.astype(np.int64), returns=returns)


def compact(array: Array, keep: Array) -> Array:
    """The rows of `keep` [N] bool, moved to the front of `array` [N, ...] and returned as a view of it."""
    a = 0
    for lo in range(0, len(array), BLOCK):
        kept = array[lo : lo + BLOCK][keep[lo : lo + BLOCK]]  # a copy: its rows may be overwritten by it
        array[a : a + len(kept)] = kept
        a += len(kept)
    return array[:a]


def sums(reward: Array, ends: Array) -> Array:
    """[E] sum of `reward` [N] over each episode."""
    return np.add.reduceat(reward, np.append(0, ends[:-1]))


def step_limit(terminal: Array, episode_len: int) -> Array:
    """[N] bool: the `episode_len`-th step after the last end."""
    check_limit(episode_len)
    n = len(terminal)
    starts = np.concatenate([[0], np.flatnonzero(terminal) + 1])
    step = np.arange(n) - np.repeat(starts, np.diff(starts, append=n))
    out: Array = step % episode_len == episode_len - 1
    return out


def d4rl_step_limit(terminal: Array, episode_len: int) -> Array:
    """[N] bool: the rows D4RL takes for timeouts in a file that has none.

    Its step counter starts at 1, not 0, after a terminal (it is reset and then counts the terminal row itself), so
    such an episode is cut one step early; and at 0 after a cut.
    """
    check_limit(episode_len)
    out = np.zeros(len(terminal), bool)
    begin, count = 0, 0
    for end in [*(np.flatnonzero(terminal) + 1), len(terminal)]:
        first = begin + episode_len - 1 - count
        if first >= begin:
            out[first:end:episode_len] = True
        count = 0 if end > begin and out[end - 1] else 1
        begin = end
    return out


def check_limit(episode_len: int) -> None:
    """DatasetError unless it is a whole number of steps, at least one."""
    if not isinstance(episode_len, int) or episode_len < 1:
        raise DatasetError(
            f"an episode has at least one step, and a whole number of them: got episode_len={episode_len!r}"
        )


def jumps(observations: Array, successors: Array) -> Array:
    """[N] bool: the stored successor is not the next row's observation, rounding aside (the last row: False)."""
    n = len(observations)
    jump = np.zeros(n, bool)
    for lo in range(0, n - 1, BLOCK):
        hi = min(lo + BLOCK, n - 1)
        following = observations[lo + 1 : hi + 1]
        gap = np.abs(successors[lo:hi] - following)
        jump[lo:hi] = (gap > ROUNDING * (1 + np.abs(following))).any(1)
    return jump


def check_finite(table: Table, where: str, found: Findings | None = None) -> None:
    """Refuse numbers that are not finite."""
    for name in ("obs", "action", "reward", "next_obs"):
        array, first, count = getattr(table, name), -1, 0
        for lo in range(0, len(array), BLOCK):
            block = array[lo : lo + BLOCK]
            bad = ~np.isfinite(block.reshape(len(block), -1)).all(1)
            if bad.any():
                first = lo + int(bad.argmax()) if first < 0 else first
                count += int(bad.sum())
                if found is None:
                    break
        if count:
            episode = int(np.searchsorted(table.ends, first, side="right"))
            more = "" if found is None or count == 1 else f", as are those of {count - 1:,} more"
            row = f"{name} of transition {first} (episode {episode}) is NaN or infinite{more}"
            complain(found, f"{where}: {row}: take the episode out or fetch the dataset again")
