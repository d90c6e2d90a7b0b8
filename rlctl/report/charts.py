"""The figures of a report as data: what `svg` and `raster` draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from rlctl.report.analysis import Analysis, Band, Family
from rlctl.report.grid import Grid
from rlctl.report.runs import Task
from rlctl.report.stats import Floats, Interval

PALETTE = [  # light, dark: distinguishable by the colour-blind, and readable on white and on near-black
    ("#0067a5", "#56b4e9"),
    ("#c9570b", "#ff9b57"),
    ("#00805a", "#3fd0a2"),
    ("#a83279", "#ee8fc6"),
    ("#7a6000", "#e3c54a"),
    ("#5b4bb8", "#a79bff"),
    ("#b3262e", "#ff7f86"),
    ("#3d6b1f", "#9ccf6f"),
    ("#5c5c5c", "#bdbdbd"),
    ("#14171a", "#f4f4f4"),
]
SHORT = 4
"""Times that the longest budget of a panel exceeds the shortest before its beginning is drawn once more."""
DASHES = ["", "6 3", "2 2.5", "8 2.5 2 2.5"]


@dataclass(frozen=True)
class Line:
    """One curve; `style` picks its colour and dashes."""

    label: str
    style: int
    x: Floats
    y: Floats
    low: Floats | None = None
    high: Floats | None = None
    members: Sequence[tuple[Floats, Floats]] = ()
    """Single runs, drawn thin where there is no band."""
    note: str = ""
    """Shown when pointed at."""


@dataclass(frozen=True)
class Panel:
    """Curves over one pair of axes."""

    title: str
    x_label: str
    y_label: str
    lines: list[Line]
    y_range: tuple[float, float] | None = None
    percent: bool = False
    reference: float | None = None
    """A vertical guide."""


@dataclass(frozen=True)
class Dots:
    """Point estimates with intervals, one row each."""

    title: str
    rows: list[tuple[str, int, Interval]] = field(default_factory=list)


def styles(analysis: Analysis) -> dict[str, int]:
    """The same style for a column in every figure."""
    return {c.name: i for i, c in enumerate(analysis.grid.columns)}


def curve_panels(analysis: Analysis, family: Family) -> list[Panel]:
    """Return against steps, a panel per task, or two: see `_steps`."""
    return _beginnings_last([_curves(task, bands, styles(analysis)) for task, bands in family.curves.items()])


def plain_curves(grid: Grid, curves: Mapping[Task, Sequence[Band]]) -> tuple[list[Panel], list[tuple[str, int]]]:
    """Panels of all tasks without an analysis, and their legend."""
    style = {c.name: i for i, c in enumerate(grid.columns)}
    drawn = {b.column for bands in curves.values() for b in bands}
    panels = _beginnings_last([_curves(t, bands, style) for t, bands in curves.items()])
    return panels, [(c, i) for c, i in style.items() if c in drawn]


def _curves(task: Task, bands: Sequence[Band], style: Mapping[str, int]) -> list[Panel]:
    return _steps(task.name, task.unit, "mean return", bands, style, "mean return")


def efficiency_panels(analysis: Analysis, family: Family) -> list[Panel]:
    """IQM over tasks against steps; none, one or two panels."""
    if not family.efficiency:
        return []
    n, unit = len(family.aggregate_tasks), family.aggregate_tasks[0].unit
    title = f"IQM over {n} task{'s' * (n > 1)}"
    return _steps(title, unit, "normalised score", family.efficiency, styles(analysis), "IQM")


def _steps(
    title: str, unit: str, y_label: str, bands: Sequence[Band], style: Mapping[str, int], what: str
) -> list[Panel]:
    """Curves over their steps, and once more the beginning of all where a much shorter budget would not be seen."""
    panels = [Panel(title, unit, y_label, [_line(b, style[b.column], what) for b in bands])]
    ends = [float(b.x[-1]) for b in bands]
    if max(ends) >= SHORT * min(ends) > 0:
        early = [cut for b in bands if (cut := _until(b, min(ends))) is not None]
        lines = [_line(b, style[b.column], what) for b in early]
        panels.append(Panel(f"{title}: the first {min(ends):,.0f}", unit, y_label, lines))
    return panels


def _beginnings_last(by_task: Sequence[list[Panel]]) -> list[Panel]:
    """First a panel per task, then what `_steps` added."""
    return [p for panels in by_task for p in panels[:1]] + [p for panels in by_task for p in panels[1:]]


def _until(b: Band, end: float) -> Band | None:
    """The curve up to `end`; None where it begins later."""
    if b.x[0] > end:
        return None
    x = np.append(b.x[b.x < end], end)
    low, high = (None if y is None else np.interp(x, b.x, y) for y in (b.low, b.high))
    members = [(np.append(m[m < end], end), np.interp(np.append(m[m < end], end), m, y)) for m, y in b.members]
    return b._replace(x=x, y=np.interp(x, b.x, b.y), low=low, high=high, members=members)


def profile_panel(analysis: Analysis, family: Family) -> Panel | None:
    """Share of runs above a score."""
    if not family.profiles:
        return None
    style = styles(analysis)
    lines = [
        Line(c, style[c], x, y, low, high, note=f"{c}: half of its runs score above {_crossing(x, y):.0f}")
        for c, (x, y, low, high) in family.profiles.items()
    ]
    return Panel("Performance profile", "normalised score", "share of runs above it", lines, (0.0, 1.0), percent=True)


def aggregate_dots(analysis: Analysis, family: Family) -> list[Dots]:
    """One figure per metric."""
    style = styles(analysis)
    metrics = list(next(iter(family.aggregates.values()), {}))
    return [Dots(m, [(c, style[c], found[m]) for c, found in family.aggregates.items()]) for m in metrics]


def budget_panels(analysis: Analysis, family: Family) -> list[Panel]:
    """Two panels per dataset: score of the chosen policy against online episodes, and against policies known fully.

    Without bands: what the draws leave unknown is too little to be seen, and what other seeds would have changed cannot
    be had from one pool.
    """
    algos = sorted({b.algo for found in family.budgets.values() for b in found})
    panels = []
    for task, found in family.budgets.items():
        bandit, known = [], []
        for b in found:
            pool, style = f"{b.algo}: {b.policies} policies of {b.configs} configs", algos.index(b.algo)
            reached = f"{b.value[-1]:,.1f} after {len(b.pulls)} episodes"
            best = f"expected best of {len(b.expected)} {b.expected[-1]:,.1f}"
            bandit.append(Line(b.algo, style, b.pulls, b.value, note=f"{pool}, {reached}"))
            known.append(Line(b.algo, style, np.arange(1.0, len(b.expected) + 1), b.expected, note=f"{pool}, {best}"))
        what = f"{'score' if task in family.scales else 'return'} of the chosen policy"
        panels.append(Panel(task.name, "online episodes used to choose", what, bandit))
        panels.append(Panel(f"{task.name}: best of k", "policies whose scores are known", what, known))
    return panels


def _line(b: Band, style: int, what: str) -> Line:
    last = f"{b.y[-1]:,.1f}" if abs(b.y[-1]) < 100 else f"{b.y[-1]:,.0f}"
    if b.low is not None and b.high is not None:
        digits = 1 if abs(b.y[-1]) < 100 else 0
        last += f" [{b.low[-1]:,.{digits}f}, {b.high[-1]:,.{digits}f}]"
    note = f"{b.column}: {what} {last} at {b.x[-1]:,.0f}, {b.seeds} seed{'s' * (b.seeds > 1)}"
    note += f", {b.diverged} run{'s' * (b.diverged > 1)} diverged and carried on" if b.diverged else ""
    note += f", {b.without} run{'s' * (b.without > 1)} without a curve" if b.without else ""
    return Line(b.column, style, b.x, b.y, b.low, b.high, b.members, note)


def _crossing(x: Floats, y: Floats) -> float:
    below = np.flatnonzero(y < 0.5)
    return float(x[below[0]] if len(below) else x[-1])
