"""Is B better than A, and where?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rlctl.errors import UsageError
from rlctl.report import grid, runs, stats
from rlctl.report.analysis import LEVEL, separated
from rlctl.report.analysis import compare as measure
from rlctl.report.grid import Grid
from rlctl.report.runs import RunRecord, Task
from rlctl.report.stats import MIN_FOR_AGGREGATE, MIN_FOR_INTERVAL, Floats, Interval

VERDICTS = {1: "yes", -1: "no, worse", 0: "not separated"}
"""Of B against A, as `rlctl compare` words them."""


def compare(a: Path, b: Path, *, seed: int = 0) -> dict[str, Any]:
    """Everything `rlctl compare` says, by task and over all tasks where both have enough seeds.

    UsageError where a side holds runs of several algorithms or settings, or the two share no task.
    """
    if a.resolve() == b.resolve():
        raise UsageError(f"both sides are {a}: give two folders")
    rng = np.random.default_rng(seed)
    sides = [_side(a), _side(b)]
    tasks = [t for t in sides[0].tasks if t in sides[1].tasks]
    if not tasks:
        raise UsageError(
            f"{a} and {b} share no task: A has {', '.join(t.name for t in sides[0].tasks)}, "
            f"B {', '.join(t.name for t in sides[1].tasks)}"
        )
    rows: list[dict[str, Any]] = []
    enough: list[Task] = []
    unlike: list[Task] = []
    tested: list[tuple[dict[str, Any], Interval, float]] = []
    for t in tasks:
        x, y = (_scores(side, t) for side in sides)
        row: dict[str, Any] = {"task": t.name, "a": _describe(x), "b": _describe(y)}
        row |= {"probability_b_beats_a": None, "p": None, "p_holm": None}
        if _protocols(sides[0], t) != _protocols(sides[1], t):
            row["verdict"] = "measured differently"
            unlike.append(t)
        elif min(len(x), len(y)) < MIN_FOR_AGGREGATE:
            row["verdict"] = f"no verdict below {MIN_FOR_AGGREGATE} seeds"
        else:
            enough.append(t)
            probability, row["p"], difference = measure([y], [x], rng)
            row["probability_b_beats_a"] = probability._asdict()
            tested.append((row, probability, difference))
        rows.append(row)
    adjusted = stats.holm([row["p"] for row, _, _ in tested])
    for (row, probability, difference), p in zip(tested, adjusted, strict=True):
        row["p_holm"], row["verdict"] = p, VERDICTS[separated(probability, p, difference)]
    overall = None
    if enough:
        left, right = ([_scores(side, t) for t in enough] for side in sides)
        probability, p, difference = measure(right, left, rng)
        overall = {
            "tasks": [t.name for t in enough],
            "probability_b_beats_a": probability._asdict(),
            "p": p,
            "verdict": VERDICTS[separated(probability, p, difference)],
            "seeds_used": [min(map(len, scores)) for scores in (left, right)],
        }
    warnings = _warnings(sides, tasks) + _trimmed(sides, enough)
    return {
        "a": _identity(a, sides[0]),
        "b": _identity(b, sides[1]),
        "settings": _settings(sides, tasks),
        "tasks": rows,
        "overall": overall,
        "answer": _answer(overall, rows, unlike, warnings),
        "warnings": warnings,
    }


def _side(path: Path) -> Grid:
    found = grid.build(runs.load([path]))
    if len(found.columns) != 1:
        names = ", ".join(c.name for c in found.columns)
        raise UsageError(
            f"{path} holds {len(found.columns)} columns ({names}): give a folder with the runs of one algorithm under "
            "one set of settings per task, or see all of them with `rlctl report`"
        )
    return found


def _runs(side: Grid, task: Task) -> list[RunRecord]:
    return side.cells.get((side.columns[0].name, task), [])


def _scores(side: Grid, task: Task) -> Floats:
    return np.array([r.score for r in _runs(side, task)], dtype=np.float64)


def _protocols(side: Grid, task: Task) -> set[str]:
    return {r.protocol for r in _runs(side, task) if r.status == "done"}


def _describe(x: Floats) -> dict[str, Any] | None:
    if not len(x):
        return None
    interval = stats.t_interval(x, LEVEL) if len(x) >= MIN_FOR_INTERVAL else None
    low, high = (None, None) if interval is None else (interval.low, interval.high)
    return {"seeds": len(x), "mean": float(x.mean()), "low": low, "high": high, "returns": x.tolist()}


def _identity(path: Path, side: Grid) -> dict[str, Any]:
    return {"path": str(path), "column": side.columns[0].name, "runs": len(side.records)}


def _settings(sides: list[Grid], tasks: list[Task]) -> dict[str, tuple[Any, Any]]:
    """Settings that differ between the sides on a task they share."""
    out: dict[str, tuple[Any, Any]] = {}
    for t in tasks:
        a, b = (_runs(side, t)[:1] for side in sides)
        if not a or not b or a[0].algo != b[0].algo:
            continue  # settings of different algorithms are different things
        x, y = a[0].settings, b[0].settings
        for key in sorted(x.keys() | y.keys()):
            pair = (x.get(key, "unset"), y.get(key, "unset"))
            if pair[0] != pair[1]:
                out.setdefault(key, pair)
    return out


def _answer(overall: dict[str, Any] | None, rows: list[dict[str, Any]], unlike: list[Task], warnings: list[str]) -> str:
    """One sentence, or two."""
    if overall is None:
        if unlike:
            return "No verdict: the two sides were measured under different protocols."
        few = min((x["seeds"] for r in rows for x in (r["a"], r["b"]) if x is not None), default=0)
        one = " One run is one draw of luck." if few == 1 else ""
        return f"No verdict: that takes {MIN_FOR_AGGREGATE} seeds of either side on a task.{one}"
    i = overall["probability_b_beats_a"]
    evidence = f"probability {i['value']:.2f} [{i['low']:.2f}, {i['high']:.2f}], p = {overall['p']:.2g}"
    n = len(overall["tasks"])
    on = f"over {n} tasks" if n > 1 else f"on {overall['tasks'][0]}"
    yes = [r["task"] for r in rows if r["verdict"] == "yes"]
    no = [r["task"] for r in rows if r["verdict"] == "no, worse"]
    where = ""
    if n > 1 and (yes or no):
        parts = ([f"better on {', '.join(yes)}"] if yes else []) + ([f"worse on {', '.join(no)}"] if no else [])
        rest = ["elsewhere not separated"] if len(yes + no) < n else []
        where = f" Task by task: {'; '.join(parts + rest)}."
    if any("udgets differ" in w for w in warnings):
        where += " Their budgets differ: that may be all there is to it."
    head = {"yes": "B is better", "no, worse": "B is worse", "not separated": "A and B are not separated"}
    return f"{head[overall['verdict']]} {on} ({evidence}).{where}"


def _trimmed(sides: list[Grid], enough: list[Task]) -> list[str]:
    """Seeds that the comparison over all tasks leaves out, because it takes as many of each task."""
    out = []
    for letter, side in zip("AB", sides, strict=True):
        counts = [len(_runs(side, t)) for t in enough]
        if len(set(counts)) > 1:
            text = f"{letter}: the tasks have {min(counts)} to {max(counts)} seeds"
            out.append(f"{text}; over all tasks the first {min(counts)} of each count.")
    return out


def _warnings(sides: list[Grid], tasks: list[Task]) -> list[str]:
    """What either side breaks, and what the two do not share."""
    out = []
    for letter, side in zip("AB", sides, strict=True):
        # the table says itself how many seeds there are
        out += [f"{letter}: {w}" for w in side.warnings if not w.startswith("Fewer than")]
    by_task = {t: {letter: _runs(side, t) for letter, side in zip("AB", sides, strict=True)} for t in tasks}
    out += grid.across(by_task, alone=False)
    return list(dict.fromkeys(out))
