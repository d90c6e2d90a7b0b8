"""From loose runs to an algorithm-by-task-by-seed grid: columns, what is missing, and which rules were broken."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlctl.config import fingerprint
from rlctl.errors import UsageError
from rlctl.report.runs import COUNTED, LAST_AGENT, RunRecord, Task
from rlctl.report.stats import MIN_FOR_AGGREGATE, MIN_FOR_INTERVAL

SEEDS_FOR_CLOSE_CALLS = 10
FINAL_EPISODES = 100
SAME_BUDGET = 0.05
"""Relative difference of training steps that still counts as one budget (loops end on whole rollouts)."""
SHAPING_PACKAGES = ("mujoco", "gymnasium", "torch", "numpy")
"""Packages whose version may shape a score."""
SHORT_LABEL = 3
UNSET = "unset"
"""Stands for a setting that a run does not have."""


@dataclass(frozen=True)
class Column:
    """What is compared: an algorithm under one set of settings, or somebody else's runs of it."""

    name: str
    algo: str
    origin: str = "rlctl"
    differs: Mapping[str, Any] = field(default_factory=dict)
    """Settings by which it differs from other columns of the same algorithm."""


@dataclass(frozen=True)
class Grid:
    """The runs, sorted in."""

    columns: list[Column]
    tasks: list[Task]
    cells: dict[tuple[str, Task], list[RunRecord]]
    """By column name and task: the runs that count, one per seed."""
    troubles: list[tuple[str, RunRecord]]
    """(column name, run) of everything that failed, diverged, is unfinished, missing, unreadable or a duplicate."""
    warnings: list[str]
    records: list[tuple[str, RunRecord]]
    """(column name, run) of every run found, and of those a suite planned and nobody started."""

    def families(self) -> list[str]:
        """Families of tasks in a fixed order."""
        return sorted({t.family for t in self.tasks}, key=lambda f: (f != "online", f))

    def column(self, name: str) -> Column:
        """By name."""
        return next(c for c in self.columns if c.name == name)


def build(records: Sequence[RunRecord], *, by: Literal["config", "algo"] = "config") -> Grid:
    """Sort runs into columns and tasks.

    `by="config"` gives every set of settings its own column where a task has runs under more than one (settings tuned
    per task are one column); `by="algo"` puts all of an algorithm into one and warns of the mixture.
    """
    columns, of = _columns(records, by)
    by_cell: dict[tuple[str, Task], list[RunRecord]] = defaultdict(list)
    troubles: list[tuple[str, RunRecord]] = []
    for r in records:
        if r.status == "unreadable":
            troubles.append((of[id(r)], r))
        else:
            by_cell[of[id(r)], r.task].append(r)
    cells: dict[tuple[str, Task], list[RunRecord]] = {}
    for (column, task), runs in by_cell.items():
        counted, spare = _one_per_seed(runs)
        troubles += [(column, r) for r in spare]
        troubles += [(column, r) for r in counted if r.status != "done" or r.score is None]
        cells[column, task] = [r for r in counted if r.score is not None]
    tasks = sorted({t for _, t in by_cell}, key=lambda t: (t.family != "online", t.family, t.name))
    troubles += _missing(columns, by_cell)
    shown = [c for c in columns if any(name == c.name for name, _ in by_cell)]
    order = {"diverged": 0, "failed": 1, "unreadable": 2, "missing": 3, "unfinished": 4, "done": 5}
    troubles.sort(key=lambda x: (order[x[1].status], x[0], x[1].task, x[1].seed if x[1].seed is not None else -1))
    warnings = _warnings(shown, tasks, cells, troubles)
    return Grid(shown, tasks, cells, troubles, warnings, [(of[id(r)], r) for r in records])


def select(records: Sequence[RunRecord], algos: Sequence[str], tasks: Sequence[str]) -> list[RunRecord]:
    """The runs of these algorithms on these tasks (empty: all); UsageError for a name that no run has."""

    def keep(wanted: Sequence[str], kind: str, name: Callable[[RunRecord], str]) -> None:
        known = sorted({name(r) for r in records})
        if unknown := [w for w in wanted if w not in known]:
            raise UsageError(f"no run of {kind} {', '.join(unknown)}: there are {', '.join(known)}")

    keep(algos, "algorithm", lambda r: r.algo)
    keep(tasks, "task", lambda r: r.task.name)
    return [r for r in records if (not algos or r.algo in algos) and (not tasks or r.task.name in tasks)]


# ------------------------------------------------------------------------------------------------------------- columns
def _columns(records: Iterable[RunRecord], by: str) -> tuple[list[Column], dict[int, str]]:
    """Columns in order of their names, and the column of each run by `id`."""
    groups: dict[tuple[str, str], list[RunRecord]] = defaultdict(list)
    for r in records:
        groups[r.origin, r.label or r.algo].append(r)
    columns: dict[str, Column] = {}
    of: dict[int, str] = {}
    for (origin, label), runs in groups.items():
        base = label if origin == "rlctl" else f"{label} ({origin})"
        keys = _varying(runs) if by == "config" and origin == "rlctl" else []
        for r in runs:
            differs = {k: r.settings.get(k, UNSET) for k in keys}
            name = base + _label(differs)
            columns[name] = Column(name, r.algo, origin, differs)
            of[id(r)] = name
    return sorted(columns.values(), key=lambda c: (c.origin != "rlctl", c.name)), of


def _varying(runs: Sequence[RunRecord]) -> list[str]:
    """Settings in which runs of one algorithm differ on one task (what is tuned per task does not count)."""
    by_task: dict[Task, list[RunRecord]] = defaultdict(list)
    for r in runs:
        if r.settings:
            by_task[r.task].append(r)
    varying: set[str] = set()
    for same_task in by_task.values():
        for key in {k for r in same_task for k in r.settings} - {"env_options.physics"}:
            if len({repr(r.settings.get(key, UNSET)) for r in same_task}) > 1:
                varying.add(key)
    return sorted(varying)


def _label(differs: Mapping[str, Any]) -> str:
    differs = {k: v for k, v in differs.items() if v != UNSET}
    if not differs:
        return ""
    if len(differs) > SHORT_LABEL:
        return f" #{fingerprint({k: repr(v) for k, v in differs.items()})[:4]}"
    return " " + " ".join(f"{k}={_short(v)}" for k, v in differs.items())


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    return str(value).replace(" ", "")


def _one_per_seed(runs: Sequence[RunRecord]) -> tuple[list[RunRecord], list[RunRecord]]:
    """The newest finished run of each seed, and the rest, each with a note saying why it does not count."""
    by_seed: dict[Any, list[RunRecord]] = defaultdict(list)
    for r in runs:
        by_seed[r.where if r.seed is None else r.seed].append(r)
    kept, spare = [], []
    for same in by_seed.values():
        same.sort(key=lambda r: (r.status in COUNTED, r.started), reverse=True)
        kept.append(same[0])
        for r in same[1:]:
            why = f"not counted: {same[0].where} is the run of this seed that does"
            spare.append(replace(r, note=f"{r.note}; {why}" if r.note else why))
    return sorted(kept, key=lambda r: (r.seed is None, r.seed or 0)), spare


def _missing(
    columns: Sequence[Column], cells: Mapping[tuple[str, Task], Sequence[RunRecord]]
) -> list[tuple[str, RunRecord]]:
    """What a full grid would hold and nobody started: seeds of a column, and tasks of its family.

    Not for the columns of a suite: what it planned is known, and need not be a full grid.
    """
    found = []
    for c in columns:
        own = {task: runs for (name, task), runs in cells.items() if name == c.name}
        if any(r.label for runs in own.values() for r in runs):
            continue
        mine = {task: {r.seed for r in runs if r.seed is not None} for task, runs in own.items()}
        seeds = set().union(*mine.values()) if mine else set()
        families = {t.family for t in mine}
        for task in {t for _, t in cells if t.family in families}:
            lacking = sorted(seeds - mine.get(task, set()))
            if task not in mine:
                note = "no run of this algorithm on this task"
                found.append((c.name, RunRecord("", c.algo, task, None, "missing", origin=c.origin, note=note)))
            elif seeds and lacking:
                note = f"no run of seed {', '.join(map(str, lacking))}, which other tasks have"
                seed = lacking[0] if len(lacking) == 1 else None
                found.append((c.name, RunRecord("", c.algo, task, seed, "missing", origin=c.origin, note=note)))
    return found


# ------------------------------------------------------------------------------------------------------------ warnings
def _warnings(
    columns: Sequence[Column],
    tasks: Sequence[Task],
    cells: Mapping[tuple[str, Task], Sequence[RunRecord]],
    troubles: Sequence[tuple[str, RunRecord]],
) -> list[str]:
    """Every rule of a fair comparison that these runs break, most serious first."""
    out: list[str] = []
    count = Counter(r.status for _, r in troubles)
    if lost := [f"{count[s]} {s}" for s in ("failed", "missing", "unfinished", "unreadable") if count[s]]:
        out.append(f"Not in any figure: {', '.join(lost)} (see the list of runs that need attention).")
    if count["diverged"]:
        scored = sum(r.status == "diverged" and r.score is not None for _, r in troubles)
        text = f"{count['diverged']} diverged; {scored} of them count with the last evaluation before."
        if scored < count["diverged"]:
            text += " The others were never evaluated, so their columns look better than they are."
        out.append(text)
    out += _seed_warnings(cells)
    for c in columns:
        mine = {t: cells[c.name, t] for t in tasks if cells.get((c.name, t))}
        out += _mixtures(c, mine)
    by_task = {t: {c.name: runs for c in columns if (runs := cells.get((c.name, t)))} for t in tasks}
    out += across(by_task)
    if imported := [c.name for c in columns if c.origin != "rlctl"]:
        out.append(
            f"Imported, under protocols of their own: {', '.join(imported)}. Shown beside the others, and in a claim "
            "only with each other, where their scores were taken in one way."
        )
    return out


def _seed_warnings(cells: Mapping[tuple[str, Task], Sequence[RunRecord]]) -> list[str]:
    out = []
    few = [len(runs) for runs in cells.values()]
    if n := sum(k < MIN_FOR_INTERVAL for k in few):
        out.append(f"Fewer than {MIN_FOR_INTERVAL} seeds in {n} of {len(few)} cells: no interval is shown there.")
    if n := sum(k < MIN_FOR_AGGREGATE for k in few):
        out.append(
            f"Fewer than {MIN_FOR_AGGREGATE} seeds in {n} of {len(few)} cells: no aggregate and no comparison there."
        )
    elif few and min(few) < SEEDS_FOR_CLOSE_CALLS:
        out.append(
            f"Some cells have only {min(few)} seeds; {SEEDS_FOR_CLOSE_CALLS} or more are advised for close calls."
        )
    return out


def _mixtures(column: Column, mine: Mapping[Task, Sequence[RunRecord]]) -> list[str]:
    """What one column mixes that it should not."""
    out = []
    runs = [r for cell in mine.values() for r in cell]
    for task, cell in mine.items():
        configs = sorted({r.config for r in cell if r.config})
        if len(configs) > 1:
            out.append(f"{column.name} on {task.name} mixes {len(configs)} configs: {', '.join(configs)}.")
        if _spread(cell):
            made = sorted({r.steps for r in cell})
            out.append(f"{column.name} on {task.name} mixes budgets from {made[0]:,} to {made[-1]:,} {task.unit}.")
        finished = [r for r in cell if r.status == "done"]  # a diverged one is warned of already
        if len(protocols := sorted({r.protocol for r in finished})) > 1:
            out.append(f"{column.name} on {task.name} mixes protocols: {'; '.join(protocols)}.")
        if len(physics := sorted({r.physics for r in cell})) > 1:
            out.append(f"{column.name} on {task.name} mixes physics: {', '.join(physics)}.")
        if len(engines := sorted({r.engine for r in cell if r.engine})) > 1:
            out.append(f"{column.name} on {task.name} mixes engines: {', '.join(engines)}.")
        if len(data := sorted({r.dataset for r in cell if r.dataset})) > 1:
            out.append(f"{column.name} on {task.name} learned from {len(data)} different sets: {', '.join(data)}.")
        if len(episodes := sorted({len(r.episodes) for r in finished})) > 1 and column.origin == "rlctl":
            out.append(f"{column.name} on {task.name} mixes {episodes[0]} to {episodes[-1]} episodes per score.")
    commits = sorted({r.commit for r in runs if r.commit != "unknown"})
    if len(commits) > 1:
        out.append(f"{column.name} mixes runs of {len(commits)} states of the code: {', '.join(commits[:6])}.")
    for package in SHAPING_PACKAGES:
        found = sorted({str(r.versions[package]) for r in runs if r.versions.get(package)})
        if len(found) > 1:
            out.append(f"{column.name} mixes versions of {package}: {', '.join(found)}.")
    return out


def _spread(cell: Sequence[RunRecord]) -> bool:
    made = [r.steps for r in cell if r.status == "done"]
    return bool(made) and max(made) - min(made) > SAME_BUDGET * max(made)


def across(by_task: Mapping[Task, Mapping[str, Sequence[RunRecord]]], alone: bool = True) -> list[str]:
    """What the columns of a task do not share; with `alone`, what each lacks by itself as well.

    What is true of several tasks is said once, in the place of the first.
    """
    said: dict[tuple[str, str], list[str]] = {}
    for task, cells in by_task.items():
        for start, rest in _across(task, cells, alone):
            said.setdefault((start, rest), []).append(task.name)
    return [f"{start}{', '.join(names)}{rest}" for (start, rest), names in said.items()]


def _across(task: Task, cells: Mapping[str, Sequence[RunRecord]], alone: bool) -> list[tuple[str, str]]:
    """What is said of one task: the words before its name, and those behind."""
    out = []
    done = {name: [r for r in cell if r.status == "done"] for name, cell in cells.items()}
    budget = {name: max(r.steps for r in cell) for name, cell in done.items() if cell}
    if budget and max(budget.values()) - min(budget.values()) > SAME_BUDGET * max(budget.values()):
        listed = ", ".join(f"{name}: {steps:,}" for name, steps in sorted(budget.items(), key=lambda x: x[1]))
        out.append(("Budgets differ on ", f" ({task.unit}): {listed}."))
    runs = [r for cell in cells.values() for r in cell]
    if len(physics := sorted({r.physics for r in runs})) > 1:
        out.append(("Physics differ on ", f": {', '.join(physics)}."))
    for what, named in (("Engines", "engine"), ("Rows of the dataset", "dataset")):
        # columns that mix them within are warned of by themselves
        each = {frozenset(str(getattr(r, named)) for r in cell) - {""} for cell in cells.values()} - {frozenset()}
        if len(each) > 1:
            out.append((f"{what} differ on ", f": {', '.join(sorted({x for some in each for x in some}))}."))
    for package in ("mujoco", "gymnasium"):
        found = sorted({str(r.versions[package]) for r in runs if r.versions.get(package)})
        if len(found) > 1:
            out.append((f"Versions of {package} differ on ", f": {', '.join(found)}."))
    if not alone:
        return out
    ours = [r for r in runs if r.origin == "rlctl"]
    short = sorted({len(r.episodes) for r in ours if r.status == "done" and len(r.episodes) < FINAL_EPISODES})
    if short:
        out.append(("Scores on ", f" rest on as few as {short[0]} episodes; {FINAL_EPISODES} are the rule."))
    if any(r.protocol != LAST_AGENT and r.status == "done" for r in ours):
        out.append(("On ", " some runs made no final evaluation: the last one in training stands in."))
    if task.family == "D4RL, then online":
        out.append(("Went on online: ", "; such normalised scores belong in no table of D4RL's offline results."))
    elif task.family not in ("online", "D4RL"):
        rest = "; such normalised scores are on D4RL's scale but belong in no table with D4RL's."
        out.append(("Not D4RL's own data: ", rest))
    return out
