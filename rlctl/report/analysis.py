"""What a grid of runs supports saying: tables, aggregates, curves, comparisons, and the sentences on top of them.

The rules (docs/report.md): the seed is the unit; below 3 seeds no interval; below 5 no aggregate and no claim; "better"
takes an interval of the probability of improvement that excludes one half and a Holm-corrected permutation test.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import NamedTuple

import numpy as np

from rlctl.report import stats
from rlctl.report.grid import SAME_BUDGET, Grid
from rlctl.report.runs import RunRecord, Task
from rlctl.report.scale import Given, Scale, scale_of
from rlctl.report.stats import MIN_FOR_AGGREGATE, MIN_FOR_INTERVAL, Floats, Interval

LEVEL = 0.95
CURVE_POINTS = 60
BAND_REPLICATES = 2_000
ROW_PERMUTATIONS = 5_000
PULLS = 200
BUDGETS_MAX = 50
MIN_POLICIES = 3
"""In a pool from which choosing is worth a curve."""
DRAWN = 8
"""Policies that the bandit chooses among."""
CLONING = "bc"
"""The algorithm that is often the best choice where few episodes are left to choose by."""
METRICS: dict[str, stats.Statistic] = {
    "IQM": stats.iqm,
    "median": stats.median,
    "mean": stats.mean,
    "optimality gap": stats.optimality_gap,
}


@dataclass(frozen=True)
class Cell:
    """One column on one task."""

    column: str
    task: Task
    seeds: list[int | None]
    raw: Floats
    """Mean return of each seed."""
    normalized: Floats | None
    mean: Interval | None
    """Of the raw returns, with a t interval; None below 3 seeds."""
    normalized_mean: Interval | None
    diverged: int
    among_best: bool = False
    """Not separated from the highest mean of its task, where every column has the seeds to be compared."""

    @property
    def enough(self) -> bool:
        """For an aggregate or a claim."""
        return len(self.raw) >= MIN_FOR_AGGREGATE


class Band(NamedTuple):
    """A curve with a pointwise interval (None: too few seeds)."""

    column: str
    x: Floats
    y: Floats
    low: Floats | None
    high: Floats | None
    seeds: int
    members: list[tuple[Floats, Floats]]
    """The single seeds."""
    diverged: int = 0
    """Of the seeds, those that keep their last value from where they diverged."""
    without: int = 0
    """Seeds that count in the tables and have no curve, so are not in this one."""


class Pair(NamedTuple):
    """Is `a` better than `b`?"""

    a: str
    b: str
    tasks: list[Task]
    probability: Interval
    """That a run of `a` beats one of `b`."""
    p: float
    """Of the permutation test, Holm-corrected over the pairs of the family."""
    difference: float
    """Of the mean returns, a less b, in standard deviations of each task's runs."""
    comparable: bool
    """Both were measured under one protocol."""
    unequal: str = ""
    """What they do not share though a fair comparison would: budgets, physics."""
    by_task: tuple[float, ...] = ()
    """Difference of the mean returns on each of `tasks`, a less b."""

    @property
    def verdict(self) -> str:
        """`better`, `worse` (a against b), `not separated`, or what forbids to ask: `budgets differ` and the like."""
        if not self.comparable:
            return "protocols differ"
        if self.unequal:
            return f"{self.unequal} differ"
        side = separated(self.probability, self.p, self.difference)
        return {1: "better", -1: "worse", 0: "not separated"}[side]


def separated(probability: Interval, p: float, difference: float) -> int:
    """1 where the first side is better, -1 where it is worse, 0 where the evidence does not say.

    Two questions have to agree: does a run of one side usually beat one of the other (`probability`, whose interval
    must leave out a half), and does one side return more on average (`p` of the `difference`, whose sign must be the
    same)? They part where one side wins most draws narrowly and loses a few by far: then neither is better.
    """
    if p >= 1 - LEVEL or probability.low <= 0.5 <= probability.high:
        return 0
    side = 1 if probability.value > 0.5 else -1
    return side if difference * side > 0 else 0


class Budget(NamedTuple):
    """What choosing one policy of an algorithm's pool on a dataset costs in online episodes."""

    algo: str
    policies: int
    configs: int
    pulls: Floats
    value: Floats
    """True score of the policy that looks best after each pull, a mean over draws of the pool and of episodes."""
    error: Floats
    """Of that mean, from the finite number of draws alone: it says nothing about other seeds."""
    expected: Floats
    """Expected best of k different policies, k = 1 ..., whose true scores are known: what the bandit nears at its k."""


class Compute(NamedTuple):
    """Wall-clock of one column on one task."""

    column: str
    task: Task
    runs: int
    hours: float
    """Of these runs together."""
    minutes: float
    """Mean of a run."""
    shares: dict[str, float]
    """Of collect, learn and eval in it."""
    speed: float
    """Steps of the task's unit per second of collecting and learning."""
    machines: list[str]
    eval_episodes: float | None
    """Mean number of online episodes that an evaluated run used while training."""


@dataclass(frozen=True)
class Family:
    """Tasks that may be looked at together."""

    name: str
    tasks: list[Task]
    cells: dict[tuple[str, Task], Cell]
    columns: list[str]
    scales: dict[Task, Scale]
    aggregate_tasks: list[Task] = field(default_factory=list)
    aggregates: dict[str, dict[str, Interval]] = field(default_factory=dict)
    """By column, then metric."""
    aggregate_seeds: dict[str, int] = field(default_factory=dict)
    not_aggregated: dict[str, str] = field(default_factory=dict)
    """Column: why."""
    tasks_left_out: dict[str, str] = field(default_factory=dict)
    """Name of a task: why the aggregates of the others do without it."""
    profiles: dict[str, tuple[Floats, Floats, Floats, Floats]] = field(default_factory=dict)
    """By column: thresholds, value, low, high."""
    efficiency: list[Band] = field(default_factory=list)
    """IQM over the aggregate's tasks along training."""
    curves: dict[Task, list[Band]] = field(default_factory=dict)
    pairs: list[Pair] = field(default_factory=list)
    budgets: dict[Task, list[Budget]] = field(default_factory=dict)


@dataclass(frozen=True)
class Analysis:
    """Everything a report shows."""

    grid: Grid
    families: list[Family]
    compute: list[Compute]
    hours: float
    """Wall-clock of every run that was found, those that do not count included."""
    claims: list[str]
    """Sentences that the data support."""
    cautions: list[str]
    """Why less is said than a reader may wish."""
    seed: int
    replicates: int


Progress = Callable[[str], None]


def analyze(
    grid: Grid,
    *,
    given: Given | None = None,
    seed: int = 0,
    replicates: int = 50_000,
    progress: Progress = lambda _: None,
) -> Analysis:
    """All numbers of a report; `seed` is that of the bootstrap, `replicates` those of the aggregates."""
    rng = np.random.default_rng(seed)
    families = [_family(grid, name, given or {}, rng, replicates, progress) for name in grid.families()]
    claims, cautions = _statements(grid, families)
    hours = sum(sum(r.seconds.values()) for _, r in grid.records) / 3600
    return Analysis(grid, families, _compute(grid), hours, claims, cautions, seed, replicates)


def _family(
    grid: Grid, name: str, given: Given, rng: np.random.Generator, replicates: int, progress: Progress
) -> Family:
    tasks = [t for t in grid.tasks if t.family == name]
    columns = [c.name for c in grid.columns if any(grid.cells.get((c.name, t)) for t in tasks)]
    scales = {t: s for t in tasks if (s := scale_of(t, given)) is not None}
    progress(f"{name}: tables")
    cells = {
        (c, t): _cell(c, t, runs, scales.get(t)) for t in tasks for c in columns if (runs := grid.cells.get((c, t)))
    }
    cells |= _among_best(cells, tasks, grid, rng)
    progress(f"{name}: curves")
    drawn = {t: bands for t, bands in curves(grid).items() if t.family == name}
    family = Family(name, tasks, cells, columns, scales, curves=drawn)
    _aggregate(family, grid, rng, replicates, progress)
    progress(f"{name}: comparisons")
    family.pairs.extend(_pairs(family, grid, rng))
    if any(t.unit == "updates" for t in tasks):  # an agent that learns online needs no episodes to be chosen by
        progress(f"{name}: budgets")
        for t in tasks:
            if found := _budgets(grid, t, scales.get(t), rng):
                family.budgets[t] = found
    return family


# --------------------------------------------------------------------------------------------------------------- cells
def _cell(column: str, task: Task, runs: Sequence[RunRecord], scale: Scale | None) -> Cell:
    raw = np.array([r.score for r in runs], dtype=np.float64)
    normalized = None if scale is None else scale(raw)
    enough = len(raw) >= MIN_FOR_INTERVAL
    return Cell(
        column,
        task,
        [r.seed for r in runs],
        raw,
        normalized,
        stats.t_interval(raw, LEVEL) if enough else None,
        stats.t_interval(normalized, LEVEL) if enough and normalized is not None else None,
        sum(r.status == "diverged" for r in runs),
    )


def _among_best(
    cells: dict[tuple[str, Task], Cell], tasks: Sequence[Task], grid: Grid, rng: np.random.Generator
) -> dict[tuple[str, Task], Cell]:
    """Cells to be marked: no permutation test separates them from the highest mean of the row.

    Which mean is highest is known only afterwards, so Holm's correction is over all pairs of the row, not over those
    with the highest. No mark where the row was not measured alike.
    """
    marked = {}
    for task in tasks:
        row = [c for (_, t), c in cells.items() if t == task]
        if len(row) < 2 or not all(c.enough for c in row):
            continue
        names = [c.column for c in row]
        alike = len({frozenset(_protocols(grid, c, [task])) for c in names}) == 1
        if not alike or any(_unequal(grid, names[0], c, [task]) for c in names[1:]):
            continue
        top = max(row, key=lambda c: float(c.raw.mean()))
        pairs = list(combinations(row, 2))
        if len(pairs) >= (1 - LEVEL) * ROW_PERMUTATIONS:
            continue  # no p-value could be small enough
        p = stats.holm(
            [
                stats.permutation_test(a.raw[:, None], b.raw[:, None], rng, permutations=ROW_PERMUTATIONS)
                for a, b in pairs
            ]
        )
        apart = {
            b.column if a is top else a.column
            for (a, b), value in zip(pairs, p, strict=True)
            if value < 1 - LEVEL and (a is top or b is top)
        }
        best = [c for c in row if c.column not in apart]
        if len(best) == len(row):
            continue  # nothing stands out
        for c in best:
            marked[c.column, task] = Cell(**{**vars(c), "among_best": True})
    return marked


# -------------------------------------------------------------------------------------------------------------- curves
def curves(grid: Grid) -> dict[Task, list[Band]]:
    """Learning curves by task, a band per column that has been evaluated on it."""
    drawn = {
        t: [b for c in grid.columns if (b := _curve(c.name, grid.cells.get((c.name, t), []))) is not None]
        for t in grid.tasks
    }
    return {t: bands for t, bands in drawn.items() if bands}


def _curve(column: str, runs: Sequence[RunRecord]) -> Band | None:
    """Mean over seeds on a shared grid of steps, where every seed has been evaluated, with a t interval at each."""
    members, diverged = _carried(runs)
    if not members:
        return None
    x, y = _on_grid(members)
    low = high = None
    if len(members) >= MIN_FOR_INTERVAL:
        half = stats.student_t(LEVEL, len(members) - 1) * y.std(0, ddof=1) / np.sqrt(len(members))
        low, high = y.mean(0) - half, y.mean(0) + half
    thin = [_thin(m) for m in members]
    return Band(column, x, y.mean(0), low, high, len(members), thin, diverged, len(runs) - len(members))


def _carried(runs: Sequence[RunRecord]) -> tuple[list[tuple[Floats, Floats]], int]:
    """The curves of a cell as far as its finished runs go, and how many of them are of diverged runs.

    A diverged run keeps its last value from where it ended: left out, it would flatter its column, and left short, it
    would cut the curves of the others.
    """
    usable = [r for r in runs if len(r.curve[0]) > 0 and np.isfinite(r.curve[1]).all()]
    ends = [float(r.curve[0][-1]) for r in usable if r.status == "done"]
    end = min(ends) if ends else max((float(r.curve[0][-1]) for r in usable), default=0.0)
    out = []
    for r in usable:
        x, y = r.curve
        out.append((np.append(x, end), np.append(y, y[-1])) if r.status == "diverged" and x[-1] < end else (x, y))
    return out, sum(r.status == "diverged" for r in usable)


def _on_grid(members: Sequence[tuple[Floats, Floats]]) -> tuple[Floats, Floats]:
    """Steps [P] that all members span, and each member's value at them [members, P], linear between evaluations."""
    start, end = max(m[0][0] for m in members), min(m[0][-1] for m in members)
    same = all(np.array_equal(m[0], members[0][0]) for m in members)
    x = members[0][0] if same and len(members[0][0]) <= CURVE_POINTS else None
    if x is None:
        x = np.linspace(min(start, end), end, CURVE_POINTS if end > start else 1)
    return x, np.array([np.interp(x, *m) for m in members])


def _thin(curve: tuple[Floats, Floats]) -> tuple[Floats, Floats]:
    pick = np.unique(np.linspace(0, len(curve[0]) - 1, CURVE_POINTS).astype(int))
    return curve[0][pick], curve[1][pick]


# ---------------------------------------------------------------------------------------------------------- aggregates
def _aggregate(family: Family, grid: Grid, rng: np.random.Generator, replicates: int, progress: Progress) -> None:
    """Fill in aggregates, profiles and the sample-efficiency curve, over tasks that all columns in them share."""
    full = {
        c: {t for t in family.scales if (cell := family.cells.get((c, t))) is not None and cell.enough}
        for c in family.columns
    }
    wide = [c for c in family.columns if full[c] and 2 * len(full[c]) >= len(family.scales)]
    shared = set.intersection(*(full[c] for c in wide)) if wide else set()
    family.aggregate_tasks.extend(t for t in family.tasks if t in shared)
    for c in family.columns:
        if c not in wide or not shared:
            family.not_aggregated[c] = _why_not(family, c)
    if not shared:
        return
    for t in family.tasks:
        if t not in shared:
            family.tasks_left_out[t.name] = _why_without(family, t, wide)
    scores = {c: _matrix(family, c) for c in wide}
    every = np.concatenate([s.ravel() for s in scores.values()])
    thresholds = np.linspace(min(0.0, float(np.floor(every.min()))), max(100.0, float(np.ceil(every.max()))), 81)
    for c, s in scores.items():
        progress(f"{family.name}: aggregates of {c}")
        found = stats.bootstraps(s, list(METRICS.values()), rng, replicates=replicates, level=LEVEL)
        family.aggregates[c] = dict(zip(METRICS, found, strict=True))
        family.aggregate_seeds[c] = len(s)
        family.profiles[c] = (thresholds, *stats.profile_band(s, thresholds, rng, replicates=BAND_REPLICATES))
    progress(f"{family.name}: sample efficiency")
    family.efficiency.extend(_efficiency(family, grid, wide, rng))


def _why_not(family: Family, column: str) -> str:
    cells = [family.cells.get((column, t)) for t in family.tasks]
    if not family.scales:
        return "no task has a scale on which scores could be averaged (give one with --scale)"
    if few := [f"{c.task.name} {len(c.raw)}" for c in cells if c is not None and not c.enough]:
        return f"fewer than {MIN_FOR_AGGREGATE} seeds: {', '.join(few)}"
    absent = [t.name for t in family.tasks if (column, t) not in family.cells]
    return f"no runs on {', '.join(absent)}" if absent else "shares no task with the others"


def _why_without(family: Family, task: Task, columns: Sequence[str]) -> str:
    if task not in family.scales:
        return "has no scale on which its scores could be averaged with others (give one with --scale)"
    count = {c: len(family.cells[c, task].raw) if (c, task) in family.cells else 0 for c in columns}
    return "not enough seeds of " + ", ".join(f"{c} ({n})" for c, n in count.items() if n < MIN_FOR_AGGREGATE)


def _matrix(family: Family, column: str) -> Floats:
    """Normalised scores [runs, tasks] without holes: each task keeps as many seeds as the poorest has.

    Seeds that all tasks have are kept before others; seeds of different tasks are independent and need no pairing.
    """
    cells = [family.cells[column, t] for t in family.aggregate_tasks]
    n = min(len(c.raw) for c in cells)
    common = set.intersection(*(set(c.seeds) for c in cells))
    rows = []
    for c in cells:
        assert c.normalized is not None
        order = sorted(range(len(c.seeds)), key=lambda i: (c.seeds[i] not in common, i))[:n]
        rows.append(c.normalized[order])
    return np.array(rows).T


def _efficiency(family: Family, grid: Grid, columns: Sequence[str], rng: np.random.Generator) -> list[Band]:
    """IQM over tasks along training, each column as far as all its runs go; columns without curves are left out.

    Diverged seeds are in it as in the learning curves.
    """
    tasks = family.aggregate_tasks
    curves: dict[str, list[list[tuple[Floats, Floats]]]] = {}
    diverged: dict[str, int] = {}
    without: dict[str, int] = {}
    for c in columns:
        found = [_carried(grid.cells[c, t]) for t in tasks]
        if all(len(cell) >= MIN_FOR_AGGREGATE and all(len(m[0]) > 1 for m in cell) for cell, _ in found):
            curves[c] = [cell for cell, _ in found]
            diverged[c] = sum(n for _, n in found)
            without[c] = sum(len(grid.cells[c, t]) for t in tasks) - sum(len(cell) for cell in curves[c])
    if not curves or len({t.unit for t in tasks}) > 1:
        return []
    bands = []
    for c, cells in curves.items():
        n = min(len(cell) for cell in cells)
        start = max(float(m[0][0]) for cell in cells for m in cell)
        end = min(float(m[0][-1]) for cell in cells for m in cell)
        if start >= end:
            continue
        x = np.linspace(start, end, CURVE_POINTS)
        scaled = [[family.scales[t](np.interp(x, *m)) for m in cell[:n]] for t, cell in zip(tasks, cells, strict=True)]
        values = np.array(scaled).transpose(2, 1, 0)  # [points, runs, tasks]
        y, low, high = stats.curve_band(values, stats.iqm, rng, replicates=1_000)
        bands.append(Band(c, x, y, low, high, n, [], diverged[c], without[c]))
    return bands


# --------------------------------------------------------------------------------------------------------- comparisons
def _pairs(family: Family, grid: Grid, rng: np.random.Generator) -> list[Pair]:
    """Every two columns on the tasks where both have enough seeds."""
    found = []
    for a, b in combinations(family.columns, 2):
        tasks = [
            t
            for t in family.tasks
            if (x := family.cells.get((a, t))) and (y := family.cells.get((b, t))) and x.enough and y.enough
        ]
        if not tasks:
            continue
        left, right = ([family.cells[c, t].raw for t in tasks] for c in (a, b))
        comparable = _protocols(grid, a, tasks) == _protocols(grid, b, tasks)
        probability, p, difference = compare(left, right, rng)
        by_task = tuple(float(x.mean() - y.mean()) for x, y in zip(left, right, strict=True))
        unequal = _unequal(grid, a, b, tasks)
        found.append(Pair(a, b, tasks, probability, p, difference, comparable, unequal, by_task))
    adjusted = stats.holm([pair.p for pair in found])
    return [pair._replace(p=p) for pair, p in zip(found, adjusted, strict=True)]


def compare(x: Sequence[Floats], y: Sequence[Floats], rng: np.random.Generator) -> tuple[Interval, float, float]:
    """Probability that x improves on y, p-value of their difference, and that difference, from returns by task.

    No scale is needed: the probability counts wins within tasks, test and difference take standardised returns.
    """
    a, b = (np.array([s[: min(map(len, side))] for s in side]).T for side in (x, y))
    z, w = stats.standardized(a, b)
    return stats.improvement(a, b, level=LEVEL), stats.permutation_test(z, w, rng), float(z.mean() - w.mean())


def _unequal(grid: Grid, a: str, b: str, tasks: Sequence[Task]) -> str:
    """`budgets`, `physics`, both or neither, on any of the tasks."""
    cells = [[[r for r in grid.cells[c, t] if r.status == "done"] for c in (a, b)] for t in tasks]
    budgets = [[max((r.steps for r in cell), default=0) for cell in pair] for pair in cells]
    physics = [[{r.physics for r in cell} for cell in pair] for pair in cells]
    found = ["budgets"] if any(max(x) - min(x) > SAME_BUDGET * max(x) for x in budgets) else []
    return " and ".join(found + (["physics"] if any(x != y for x, y in physics) else []))


def _protocols(grid: Grid, column: str, tasks: Sequence[Task]) -> set[str]:
    return {r.protocol for t in tasks for r in grid.cells[column, t] if r.status == "done"}


# ------------------------------------------------------------------------------------------------- budgets of selection
def _budgets(grid: Grid, task: Task, scale: Scale | None, rng: np.random.Generator) -> list[Budget]:
    """Per algorithm: all its policies on the dataset, whatever their settings, as the pool to choose from.

    None for an algorithm with fewer than `MIN_POLICIES`: among two there is little to choose.
    """
    pools: dict[str, list[RunRecord]] = defaultdict(list)
    for c in grid.columns:
        if c.origin == "rlctl":
            pools[c.algo] += [r for r in grid.cells.get((c.name, task), []) if r.status == "done"]
    found = []
    for algo, runs in pools.items():
        if len(runs) < MIN_POLICIES:
            continue
        episodes = [np.asarray(r.episodes) if scale is None else scale(np.asarray(r.episodes)) for r in runs]
        value, error = stats.ucb_budget_curve([e.tolist() for e in episodes], rng, pulls=PULLS, policies=DRAWN)
        truth = np.array([e.mean() for e in episodes])
        known = range(1, min(len(runs), BUDGETS_MAX) + 1)
        expected = np.array([stats.expected_maximum(truth, k, replacement=False) for k in known])
        configs = len({r.config for r in runs})
        found.append(Budget(algo, len(runs), configs, np.arange(1.0, PULLS + 1), value, error, expected))
    return found


# ------------------------------------------------------------------------------------------------------------- compute
def _compute(grid: Grid) -> list[Compute]:
    rows = []
    for (column, task), runs in grid.cells.items():
        timed = [r for r in runs if r.seconds]
        if not timed:
            continue
        total = sum(sum(r.seconds.values()) for r in timed)
        parts: dict[str, float] = defaultdict(float)
        for r in timed:
            for what, s in r.seconds.items():
                parts[what] += s
        busy = total - parts.get("eval", 0.0)
        used = [r.selection[1] for r in runs if r.selection is not None]
        rows.append(
            Compute(
                column,
                task,
                len(timed),
                total / 3600,
                total / 60 / len(timed),
                {k: v / total for k, v in parts.items() if k != "total" and total},
                sum(r.steps for r in timed) / busy if busy else 0.0,
                sorted({r.machine for r in timed}),
                float(np.mean(used)) if used else None,
            )
        )
    order = {c.name: i for i, c in enumerate(grid.columns)}
    return sorted(rows, key=lambda r: (r.task.family != "online", r.task.family, r.task.name, order[r.column]))


# ---------------------------------------------------------------------------------------------------------- statements
MOST_SENTENCES = 8
_NO_QUESTION = {
    "protocols differ": "they were measured differently",
    "budgets differ": "they were given different budgets",
    "physics differ": "their tasks have different physics",
    "budgets and physics differ": "they were given different budgets and different physics",
}
"""Verdicts that leave the question open, and the reason in words."""


def _statements(grid: Grid, families: Sequence[Family]) -> tuple[list[str], list[str]]:
    """What may be claimed, and what keeps more from being claimed."""
    claims: list[str] = []
    cautions: list[str] = []
    for f in families:
        where = "" if len(families) == 1 else f"{f.name}: "
        won = [p if p.verdict == "better" else _turned(p) for p in f.pairs if p.verdict in ("better", "worse")]
        claims += [where + text for text in _wins(won)]
        even = [p for p in f.pairs if p.verdict == "not separated"]
        if even:
            listed = ", ".join(f"{p.a} and {p.b}" for p in even[:MOST_SENTENCES])
            more = f", and {len(even) - MOST_SENTENCES} more pairs" if len(even) > MOST_SENTENCES else ""
            claims.append(f"{where}Not separated by these runs: {listed}{more}. That is no proof that they are equal.")
        for kind, why in _NO_QUESTION.items():
            other = [p for p in f.pairs if p.verdict == kind]
            if other:
                listed = ", ".join(f"{p.a} and {p.b}" for p in other[:MOST_SENTENCES])
                more = f", and {len(other) - MOST_SENTENCES} more pairs" if len(other) > MOST_SENTENCES else ""
                cautions.append(f"{where}Not compared, because {why}: {listed}{more}.")
        if not f.pairs and len(f.columns) > 1:
            cautions.append(
                f"{where}No claim is made: no two columns have {MIN_FOR_AGGREGATE} seeds each on a task they share."
            )
        if len(f.columns) == 1:
            claims += [where + text for text in _alone(f)]
            cautions.append(f"{where}One column only: there is nothing to compare it with.")
    if not families or not any(f.cells for f in families):
        cautions.append("No run has a score yet: nothing can be said.")
    sizes = [len(runs) for runs in grid.cells.values() if runs]
    if sizes and min(sizes) < MIN_FOR_INTERVAL:
        cautions.append(
            f"Cells with fewer than {MIN_FOR_INTERVAL} seeds show their mean without an interval: luck of the "
            "seed may be all there is to them."
        )
    return claims, cautions


def _wins(won: Sequence[Pair]) -> list[str]:
    """A sentence per separated pair, or per winner where there are many."""
    if len(won) <= MOST_SENTENCES:
        ordered = sorted(won, key=lambda p: -p.probability.value)
        return [f"{p.a} scores higher than {p.b} {_where(p.tasks)}: {pair_evidence(p)}.{_except(p)}" for p in ordered]
    by_winner: dict[str, list[Pair]] = defaultdict(list)
    for p in won:
        by_winner[p.a].append(p)
    out = []
    for a, pairs in sorted(by_winner.items(), key=lambda x: -len(x[1])):
        on = {tuple(p.tasks) for p in pairs}
        where = _where(pairs[0].tasks) if len(on) == 1 else "over the tasks they share, taken together"
        low, largest = min(x.probability.low for x in pairs), max(x.p for x in pairs)
        names = ", ".join(x.b for x in pairs)
        every = "every lower bound" if len(pairs) > 1 else "lower bound"
        out.append(
            f"{a} scores higher than {names} {where} ({every} of the probability of improvement ≥ {low:.2f}, "
            f"Holm-corrected p ≤ {p_value(largest)}).{''.join(_except(x, named=True) for x in pairs)}"
        )
    return out


def _where(tasks: Sequence[Task]) -> str:
    """One test was made over all tasks, so nothing is said of each."""
    return f"on {tasks[0].name}" if len(tasks) == 1 else f"over {_names(tasks)} taken together"


def _except(p: Pair, named: bool = False) -> str:
    """The tasks on which the winner has the lower mean, as a sentence."""
    lower = ", ".join(t.name for t, x in zip(p.tasks, p.by_task, strict=True) if x < 0)
    return f" On {lower} its mean return is lower{f' than that of {p.b}' if named else ''}." if lower else ""


def _turned(p: Pair) -> Pair:
    value, low, high = p.probability
    turned = p._replace(a=p.b, b=p.a, probability=Interval(1 - value, 1 - high, 1 - low))
    return turned._replace(difference=-p.difference, by_task=tuple(-x for x in p.by_task))


def pair_evidence(p: Pair) -> str:
    """The two numbers behind a verdict."""
    i = p.probability
    return f"probability of improvement {i.value:.2f} [{i.low:.2f}, {i.high:.2f}], Holm-corrected p = {p_value(p.p)}"


def p_value(p: float) -> str:
    """Two digits, never a bare zero."""
    return f"{p:.2g}" if p >= 1e-4 else "0.0001 or less"


def _names(tasks: Sequence[Task]) -> str:
    names = [t.name for t in tasks]
    return ", ".join(names) if len(names) <= 4 else f"{len(names)} tasks"


def _alone(f: Family) -> list[str]:
    cells = [c for c in f.cells.values() if c.mean is not None]
    out = []
    for c in cells[:MOST_SENTENCES]:
        assert c.mean is not None
        out.append(
            f"{c.column} on {c.task.name}: mean return {c.mean.value:,.0f} [{c.mean.low:,.0f}, {c.mean.high:,.0f}] "
            f"over {len(c.raw)} seeds."
        )
    return out
