"""Look at a dataset: what it holds (`summarize`), and what is wrong with it (`verify`)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from rlctl.data import flat_files, minari_files
from rlctl.data.arrays import Array, DatasetError, Findings, Origin, Table, jumps
from rlctl.data.dataset import locate, read
from rlctl.data.reference import dataset_labels, normalized_score, reference_name

CLIPPED = 1 - 1e-4
"""An action component of at least this size counts as clipped."""
PILE = 3
"""At least so many episodes of exactly the greatest length are what a step limit leaves."""
OF_A_KIND = 5
"""Findings of one kind that are listed; the rest is counted."""
RANGE_FACTOR = 1000.0
"""A reward this many times the 99th percentile of |r| (at least 1) is out of range."""


def summarize(table: Table, origin: Origin, bins: int = 20) -> dict[str, Any]:
    """Episodes, returns, lengths, actions, normalised scores and the histogram of returns, JSON-able."""
    steps = np.diff(table.ends, prepend=0)
    a = np.abs(table.action)
    counts, edges = np.histogram(table.returns, bins=bins)
    task = reference_name(origin.env_id or origin.id)
    mean = float(table.returns.mean())
    box = origin.action_box
    ref: dict[str, Any] = {k: origin.meta[k] for k in ("ref_min_score", "ref_max_score") if k in origin.meta}
    labels: dict[str, Any] = dataset_labels(origin.id, origin.format, origin.meta)
    return labels | {
        "format": origin.format,
        "env": origin.env_id,
        "env_options": origin.env_options,
        "transitions": len(table.reward),
        "episodes": len(steps),
        "obs_dim": table.obs.shape[1],
        "act_dim": table.action.shape[1],
        "terminated_episodes": int(table.terminated[table.ends - 1].sum()),
        "return": _moments(table.returns),
        "length": _moments(steps),
        "reward": _moments(table.reward),
        "action_min": table.action.min(0).tolist(),
        "action_max": table.action.max(0).tolist(),
        "action_box": None if box is None else [np.broadcast_to(x, a.shape[1]).tolist() for x in box],
        "clipped_actions": float((a >= CLIPPED).mean()),
        "normalized_score": normalized_score(task, mean) if task else None,
        "score_reference": task,
        **ref,
        "algorithm": origin.meta.get("algorithm_name"),
        "author": _people(origin.meta.get("author")),
        "description": origin.meta.get("description"),
        "histogram": {"counts": counts.tolist(), "edges": edges.tolist()},
    }


def _people(author: Any) -> list[str]:
    return sorted(author) if isinstance(author, list) else [author] if author else []


def _moments(x: Array) -> dict[str, float]:
    x = np.asarray(x, np.float64)
    return {"mean": float(x.mean()), "std": float(x.std()), "min": float(x.min()), "max": float(x.max())}


# ------------------------------------------------------------------------------------------------------------- verify
@dataclass(frozen=True)
class Finding:
    """One thing that is wrong (`error`) or worth knowing (`note`)."""

    level: Literal["error", "note"]
    about: str
    """The quantity: next_obs, terminated, reward, ..."""
    message: str


def verify(
    source: str, *, episode_len: int | None = None, reward_range: tuple[float, float] | None = None
) -> list[Finding]:
    """Everything wrong with a dataset, one finding per line; an empty list for a clean one.

    Looked for: arrays of unequal lengths, missing arrays, damaged files, NaN and infinities, flags that are neither 0
    nor 1, `next_obs` that is a copy of `obs`, not the observation that follows or that of a reset, ends that `timeouts`
    misses, terminals at the time limit, actions outside [-1, 1], rewards out of `reward_range` (or far out of their
    own, without one), metadata that disagrees with the data.

    DatasetError only where there is no dataset of that name.
    """
    if Path(source).name == "main_data.hdf5":
        source = str(Path(source).parent)
    file = locate(source)  # a wrong name is the caller's mistake, not the dataset's
    found = Findings()
    try:
        table, origin = read(source, episode_len=episode_len, found=found)
    except DatasetError as error:
        return [_error("file", line) for line in _lengths(file) or folded([*found, str(error)])]
    out = [_error("data", line) for line in folded(found)]
    out += _successors(table)
    out += _missed_ends(table, origin)
    out += _resets(table)
    out += _terminals(table, origin, episode_len)
    out += _actions(table)
    out += _rewards(table, reward_range)
    out += _metadata(table, origin, file)
    return sorted(out, key=lambda f: f.level)


def folded(lines: Iterable[str]) -> list[str]:
    """`lines`; of those that differ in numbers alone the first `OF_A_KIND`, and how many more there are."""
    kinds: dict[str, list[str]] = {}
    for line in lines:
        kinds.setdefault(re.sub(r"\d+", "#", line), []).append(line)
    out = []
    for kind in kinds.values():
        shown, more = kind[:OF_A_KIND], len(kind) - OF_A_KIND
        out += shown if more <= 0 else [*shown[:-1], f"{shown[-1]}; {more:,} more like it"]
    return out


def _lengths(file: Path) -> list[str]:
    """Every array of a flat file whose length is wrong, where that is what the reader stumbled over."""
    if file.is_dir():
        return []
    try:
        return flat_files.unequal_lengths(file)
    except DatasetError:
        return []


def _inner(table: Table) -> Array:
    """[M] bool: rows that another row of the same episode follows."""
    inner = np.ones(len(table.reward), bool)
    inner[table.ends - 1] = False
    return inner


def _successors(table: Table) -> Iterator[Finding]:
    inner = _inner(table)
    goes_on = ~table.terminated  # a terminal row without a stored successor holds its own observation by construction
    n = int(inner.sum())
    same = (table.next_obs == table.obs).all(1) & goes_on
    moved = jumps(table.obs, table.next_obs) & inner
    if same.sum() > 0.5 * goes_on.sum():
        share = same.sum() / goes_on.sum()
        yield _error("next_obs", f"is a copy of obs in {share:.0%} of the rows: nothing can be learnt from such pairs")
    elif moved.any():
        where = f"in {int(moved.sum()):,} of {n:,} rows within episodes, first in row {int(moved.argmax())}"
        level = _error if moved.sum() > 0.01 * n else _note
        yield level("next_obs", f"is not the observation of the row that follows {where}")


def _missed_ends(table: Table, origin: Origin) -> Iterator[Finding]:
    missed, episodes = origin.unflagged_ends, len(table.ends)
    if missed:
        # few are seams where files were joined; with many, timeouts or next_obs cannot be trusted
        level = _error if missed > min(0.01 * len(table.reward), 0.1 * episodes) else _note
        yield level(
            "timeouts",
            f"not set in {missed:,} rows whose next_obs is not the observation of the row that follows: these are read "
            f"as ends of episodes, {episodes:,} in all; the view d4rl_compat pairs across them",
        )


def _resets(table: Table) -> Iterator[Finding]:
    """Successors of cut rows that an environment which resets by itself put in the place of the true ones.

    Data that goes on without a reset (mazes that only move the goal) also have the next episode's first observation
    there. It is one step away then; a reset leads farther than nearly all steps do, in at least one number.
    """
    last = table.ends[:-1] - 1
    last = last[table.truncated[last] & ~table.terminated[last]]
    wrong = (table.next_obs[last] == table.obs[last + 1]).all(1)
    inner = np.flatnonzero(_inner(table))
    if not wrong.any() or wrong.sum() < 0.9 * len(last) or not len(inner):
        return
    some = inner[:: 1 + len(inner) // 100_000]
    usual = np.percentile(np.abs(table.next_obs[some] - table.obs[some]), 99, axis=0)
    step = np.abs(table.next_obs[last] - table.obs[last])
    far = ((step > usual) & (usual > 0)).any(1)  # what hardly ever changes within an episode is a goal
    if far.sum() > 0.5 * len(last):
        yield _error(
            "next_obs",
            f"is the first observation of the next episode in {int(wrong.sum()):,} of {len(last):,} truncated rows: "
            "the environment had reset before it was stored",
        )


def _terminals(table: Table, origin: Origin, episode_len: int | None) -> Iterator[Finding]:
    steps = np.diff(table.ends, prepend=0)
    terminated, truncated = (x[table.ends - 1] for x in (table.terminated, table.truncated))
    named = origin.episode_len or episode_len
    limit = named or int(steps.max())
    at_limit = terminated & (steps == limit) & (limit > 1)  # of one step: a bandit, whose ends are real
    plain = at_limit & ~truncated
    cut = truncated & ~terminated & (steps >= limit - 1)  # without stored successors a cut episode loses its last row
    # a real end may fall on the limit, and then carries both flags, but that does not happen to nearly all
    nearly_all = at_limit.sum() > 1 and at_limit.sum() > 9 * cut.sum()
    wrong = at_limit if nearly_all else plain
    if wrong.any() and (named or (nearly_all and _piled_up(steps))):
        beside = " beside truncated" if plain.sum() < 0.5 * wrong.sum() else ""
        yield _error(
            "terminated",
            f"set{beside} on the last row of {int(wrong.sum()):,} episodes of exactly {limit} steps, "
            f"{'the time limit' if named else 'the greatest length'}: a cut that was recorded as an end",
        )
    both = int((terminated & truncated).sum())
    if both:
        yield _note("terminated", f"and truncated are both set at the end of {both:,} episodes")
    if named and (steps > named).any():
        yield _error("length", f"{int((steps > named).sum()):,} episodes are longer than the limit of {named} steps")


def _piled_up(steps: Array) -> bool:
    """Whether chance does not explain how many episodes have exactly the greatest length.

    Lengths that only chance made thin out towards the greatest. A step limit heaps up there all that would have gone
    on: at least `PILE` episodes, 1 % of all, and twice as many as in the tenth below it (at least 10 lengths wide).
    """
    most = int(steps.max())
    heap, near = int((steps == most).sum()), int(((steps >= most - max(10, most // 10)) & (steps < most)).sum())
    return heap >= max(PILE, 0.01 * len(steps)) and heap > 2 * near


def _actions(table: Table) -> Iterator[Finding]:
    outside = (np.abs(table.action) > 1 + 1e-5).any(1)
    if outside.any():
        far, row = float(np.abs(table.action[outside]).max()), int(outside.argmax())
        yield _error("action", f"outside [-1, 1] in {int(outside.sum()):,} rows, up to {far:.4g}, first in row {row}")
    frozen = (table.action == table.action[0]).all(0)
    if len(table.action) > 1 and frozen.any():
        yield _note("action", f"component {', '.join(map(str, np.flatnonzero(frozen)[:8]))} never changes")


def _rewards(table: Table, bounds: tuple[float, float] | None) -> Iterator[Finding]:
    reward = table.reward[np.isfinite(table.reward)]
    if not len(reward):
        return
    if bounds is not None:
        low, high = bounds
        why = f"[{low:g}, {high:g}]"
    else:
        high = RANGE_FACTOR * max(1.0, float(np.percentile(np.abs(reward), 99)))
        low, why = -high, f"±{high:.4g} ({RANGE_FACTOR:g} times the 99th percentile of |r|)"
    outside = (table.reward < low) | (table.reward > high)
    if outside.any():
        row = int(outside.argmax())
        count = f"{int(outside.sum()):,} rows"
        yield _error("reward", f"outside {why} in {count}, first in row {row}: {table.reward[row]:.4g}")
    if len(reward) > 1 and (reward == reward[0]).all():
        yield _note("reward", f"is {reward[0]:g} in every row")


def _metadata(table: Table, origin: Origin, file: Path) -> Iterator[Finding]:
    if not file.is_dir():
        return
    counts = {"total_steps": len(table.reward), "total_episodes": minari_files.count_episodes(file)}
    for key, count in counts.items():
        said = origin.meta.get(key)
        if said is not None and said != count:
            yield _error("metadata", f"{key} is {said!r}, the data holds {count}")
    for what, width in (("observation", table.obs.shape[1]), ("action", table.action.shape[1])):
        said = minari_files.space_width(origin.meta.get(f"{what}_space"))
        if said is not None and said != width:
            yield _error("metadata", f"the {what} space is one of {said} numbers, each stored {what} has {width}")


def _error(about: str, message: str) -> Finding:
    return Finding("error", about, message)


def _note(about: str, message: str) -> Finding:
    return Finding("note", about, message)
