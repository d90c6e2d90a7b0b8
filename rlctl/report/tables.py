"""The tables of a report, as entries that the page and the text formats print alike."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from os.path import commonpath
from pathlib import Path
from typing import NamedTuple

from rlctl.report.analysis import (
    CLONING,
    DRAWN,
    METRICS,
    MIN_POLICIES,
    PULLS,
    Analysis,
    Cell,
    Family,
    Pair,
    p_value,
)
from rlctl.report.grid import SAME_BUDGET
from rlctl.report.runs import RunRecord, Task
from rlctl.report.stats import MIN_FOR_AGGREGATE, Interval

WHAT_A_SCORE_IS = (
    "Scores are mean returns of the last agent of each run (settings fixed beforehand as far as the runs can tell), "
    "one number per seed. No checkpoint was chosen by its score."
)
WIDE = 4
"""Columns from which a table with few tasks is turned, so that it grows downwards."""


class Entry(NamedTuple):
    """What stands in a cell."""

    text: str
    small: str = ""
    """Below it, in one or several lines."""
    strong: bool = False
    shade: float | None = None
    """-1 to 1, for a background: bad to good."""
    title: str = ""
    style: int | None = None
    """Of the column it names, for a swatch."""


@dataclass(frozen=True)
class Table:
    """Header, rows, and the sentence below."""

    header: list[Entry]
    rows: list[list[Entry]]
    caption: str = ""

    def split(self, rows: int) -> tuple[Table, Table]:
        """Its first rows, and the rest."""
        return Table(self.header, self.rows[:rows], self.caption), Table(self.header, self.rows[rows:])

    def turned(self, corner: str) -> Table:
        """Rows as columns, under a first column named `corner`."""
        whole = [self.header, *self.rows]
        flipped = [list(x) for x in zip(*whole, strict=True)]
        return Table([Entry(corner), *flipped[0][1:]], flipped[1:], self.caption)


def number(x: float) -> str:
    """As many digits as a reader can use."""
    digits = 0 if abs(x) >= 100 else 1 if abs(x) >= 10 else 2
    return f"{x:,.{digits}f}".replace("-", "−")


def estimate(values: Sequence[float], interval: Interval | None, digits: int | None = None) -> str:
    """`mean ± half width` of a t interval, or the mean alone; `digits` as of `number` if none are given."""
    mean = sum(values) / len(values)
    if digits is None:
        digits = 0 if abs(mean) >= 100 else 1 if abs(mean) >= 10 else 2
    half = "" if interval is None else f" ± {(interval.high - interval.low) / 2:,.{digits}f}"
    return f"{mean:,.{digits}f}{half}".replace("-", "−")


def bounds(i: Interval, digits: int = 1) -> str:
    """`[low, high]`."""
    return f"[{i.low:,.{digits}f}, {i.high:,.{digits}f}]".replace("-", "−")


def results(analysis: Analysis, family: Family) -> Table:
    """Scores by task and column."""
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    made, lost = unlike_budgets(analysis, family), _lost(analysis, family)
    # one that never came to a score is no less a result
    columns = [c for c in style if c in family.columns or any((c, t) in lost for t in family.tasks)]
    header = [Entry("task"), *(Entry(c, made.get(c, ""), style=style[c]) for c in columns)]
    rows = [
        [Entry(t.name), *(_result(family, family.cells.get((c, t)), lost.get((c, t), "")) for c in columns)]
        for t in family.tasks
    ]
    cells = list(family.cells.values())
    caption = "Mean over seeds of the raw return"
    if family.name != "online" and family.scales:
        caption = "Mean over seeds of the normalised score (raw return below)"
    elif family.scales:
        caption += " (normalised score below)"
    caption += "; ± is half of a 95% t interval, left out below 3 seeds."
    if any(c.among_best for c in cells):
        caption += (
            " Bold: no permutation test (5%, Holm over all pairs of the task) separates it from the highest mean of "
            "its task; nothing is bold where budgets, physics or protocols differ, or where all or too few would be."
        )
    if any(c.diverged for c in cells):
        caption += " †: diverged runs among the seeds, counted with the last evaluation they reached."
    table = Table(header, rows, caption)
    return table.turned("column") if len(columns) > WIDE and len(columns) > len(family.tasks) else table


def _lost(analysis: Analysis, family: Family) -> dict[tuple[str, Task], str]:
    """By cell how many seeds were to be there and have no score, and why: `2 failed, 1 missing`."""
    count: dict[tuple[str, Task], Counter[str]] = defaultdict(Counter)
    for column, r in analysis.grid.troubles:
        cell = family.cells.get((column, r.task))
        planned = r.where and r.task in family.tasks  # a gap that was only noticed has no place of its own
        if planned and r.score is None and (cell is None or r.seed not in cell.seeds):
            count[column, r.task]["no score" if r.status == "done" else r.status] += 1
    return {cell: ", ".join(f"{n} {status}" for status, n in found.items()) for cell, found in count.items()}


def unlike_budgets(analysis: Analysis, family: Family) -> dict[str, str]:
    """By column how long its finished runs are; empty where all columns of the family were given the same."""
    steps = {c: [r.steps for t in family.tasks for r in _done(analysis, c, t)] for c in family.columns}
    spans = {c: (min(made), max(made)) for c, made in steps.items() if made}
    alike = all(
        max(span[k] for span in spans.values()) * (1 - SAME_BUDGET) <= min(span[k] for span in spans.values())
        for k in ((0, 1) if spans else ())
    )
    unit = "updates" if all(t.unit == "updates" for t in family.tasks) else "steps"
    return {} if alike else {c: f"{'–'.join(f'{x:,}' for x in dict.fromkeys(s))} {unit}" for c, s in spans.items()}


def _done(analysis: Analysis, column: str, task: Task) -> list[RunRecord]:
    return [r for r in analysis.grid.cells.get((column, task), []) if r.status == "done"]


def _result(family: Family, cell: Cell | None, lost: str) -> Entry:
    if cell is None:
        return Entry("–", lost, title="no run with a score")
    raw = estimate(cell.raw.tolist(), cell.mean)
    scaled = None if cell.normalized is None else estimate(cell.normalized.tolist(), cell.normalized_mean, 1)
    n = len(cell.raw)
    seeds = f"{n} seed{'s' * (n != 1)}" + (f", {cell.diverged} diverged †" if cell.diverged else "")
    seeds += f", {lost}" if lost else ""
    first, second = (raw, scaled) if family.name == "online" or scaled is None else (scaled, raw)
    kind = "score" if first is raw else "return"
    small = f"{kind} {second}\n{seeds}" if second is not None else seeds
    each = ", ".join(f"{number(float(x))}" for x in cell.raw)
    return Entry(first, small, cell.among_best, title=f"{cell.column} on {cell.task.name}, by seed: {each}")


def aggregates(analysis: Analysis, family: Family) -> Table | None:
    """Over tasks, with the bootstrap's intervals."""
    if not family.aggregates:
        return None
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    header = [Entry("column"), Entry("seeds"), *(Entry(m) for m in METRICS)]
    made = unlike_budgets(analysis, family)
    rows = [
        [
            Entry(c, made.get(c, ""), style=style[c]),
            Entry(str(family.aggregate_seeds[c])),
            *(Entry(f"{found[m].value:.1f}", bounds(found[m])) for m in METRICS),
        ]
        for c, found in family.aggregates.items()
    ]
    n = len(family.aggregate_tasks)
    names = ", ".join(t.name for t in family.aggregate_tasks)
    caption = (
        f"Normalised scores (what 0 and 100 mean: see the scale) over {n} task{'s' * (n != 1)} that all these columns "
        f"have with at least {MIN_FOR_AGGREGATE} seeds: {names}. 95% intervals from a bootstrap stratified by task "
        f"({analysis.replicates:,} replicates), widened by √(n/(n−1)) for few seeds. The IQM leaves out the lowest and "
        "the highest quarter of all runs, with few tasks perhaps a whole task: read it beside the table by task. "
        "Optimality gap: smaller is better."
    )
    apart = [p for p in family.pairs if p.unequal and {p.a, p.b} <= family.aggregates.keys()]
    if apart:
        what = " and ".join(x for x in ("budgets", "physics") if any(x in p.unequal for p in apart))
        unlike = [c for c in family.aggregates if any(c in (p.a, p.b) for p in apart)]
        caption += f" Not one comparison: {what} differ among {', '.join(unlike)}."
    return Table(header, rows, caption)


def improvement(analysis: Analysis, family: Family) -> Table | None:
    """P(row beats column)."""
    if not family.pairs:
        return None
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    names = [c for c in family.columns if any(c in (p.a, p.b) for p in family.pairs)]
    found = {(p.a, p.b): p for p in family.pairs}
    rows = []
    for a in names:
        row = [Entry(a, style=style[a])]
        for b in names:
            pair, turned = (found.get((a, b)), False) if (a, b) in found else (found.get((b, a)), True)
            row.append(Entry("") if pair is None else _pair(pair, turned))
        rows.append(row)
    caption = (
        "Probability that a run of the row scores higher than a run of the column on the same task, averaged over the "
        "tasks both have, with its 95% interval (a score interval, made for few seeds; where tasks have unequal "
        "numbers of seeds, as many of each as the poorest has). Bold: the interval excludes one half and the "
        "Holm-corrected permutation test gives p < 0.05; only then is one called better."
    )
    if any(p.unequal for p in family.pairs):
        caption += (
            " Where budgets or physics differ, the numbers are no evidence about the algorithms: no shade, no verdict."
        )
    return Table([Entry("row beats column"), *(Entry(n) for n in names)], rows, caption)


def _pair(p: Pair, turned: bool) -> Entry:
    i = p.probability
    if turned:
        i = Interval(1 - i.value, 1 - i.high, 1 - i.low)
    strong = p.verdict in ("better", "worse")  # so never where protocols, budgets or physics differ
    note = (
        "protocols differ"
        if not p.comparable
        else f"p = {p_value(p.p)}" + (f"\n{p.unequal} differ" if p.unequal else "")
    )
    title = f"{len(p.tasks)} tasks: {', '.join(t.name for t in p.tasks)}; {note}"
    shade = 2 * i.value - 1 if p.comparable and not p.unequal else None
    return Entry(f"{i.value:.2f}", f"[{i.low:.2f}, {i.high:.2f}]\n{note}", strong, shade, title)


def compute(analysis: Analysis) -> Table:
    """Wall-clock, speed, and the episodes that selecting the best checkpoint would have cost."""
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    names = (
        "column",
        "task",
        "runs",
        "minutes per run",
        "collect / learn / evaluate",
        "steps per second",
        "best in training",
    )
    rows = []
    for r in analysis.compute:
        best = [x.selection[0] for x in analysis.grid.cells[r.column, r.task] if x.selection]
        shares = " / ".join(f"{r.shares[k]:.0%}" for k in ("collect", "learn", "eval")) if "learn" in r.shares else "–"
        rows.append(
            [
                Entry(r.column, style=style[r.column]),
                Entry(r.task.name),
                Entry(str(r.runs)),
                Entry(number(r.minutes)),
                Entry(shares),
                Entry(f"{r.speed:,.0f}", "" if r.task.unit == "environment steps" else r.task.unit),
                Entry(
                    number(sum(best) / len(best)) if best else "–",
                    f"picked with {r.eval_episodes:.0f} episodes" if best else "",
                ),
            ]
        )
    machines = sorted({m for r in analysis.compute for m in r.machines})
    counted = sum(r.hours for r in analysis.compute)
    caption = f"{_hours(analysis.hours)} hours of wall-clock in all, on: {'; '.join(machines)}." if rows else ""
    if rows and analysis.hours > 1.001 * counted:
        caption += f" Of them {_hours(analysis.hours - counted)} in runs that do not count and have no row here."
    if len(machines) > 1:
        caption += " Speeds of different machines are not comparable."
    if rows:
        caption += (
            " Wall-clock counts whatever else ran there. Best in training: mean return of the best evaluation, "
            "with the online episodes it took to pick it; all other scores are the last agent's, which need none."
        )
    return Table([Entry(n) for n in names], rows, caption)


def _hours(hours: float) -> str:
    return f"{hours:,.{1 if hours >= 1 else 2}f}"


def budgets(family: Family) -> Table | None:
    """What choosing a policy costs, in numbers."""
    if not family.budgets:
        return None
    at = (1, 10, 50, PULLS)
    names = ("dataset", "algorithm", "policies", *(f"{n} episode{'s' * (n > 1)}" for n in at), "best of k known")
    rows = [
        [
            Entry(task.name),
            Entry(b.algo),
            Entry(str(b.policies), f"{b.configs} config{'s' * (b.configs != 1)}"),
            *(Entry(number(float(b.value[n - 1]))) for n in at),
            Entry(number(float(b.expected[min(b.policies, DRAWN) - 1])), f"k = {min(b.policies, DRAWN)}"),
        ]
        for task, found in family.budgets.items()
        for b in found
    ]
    caption = (
        "An offline learner leaves a pool of policies (all settings and seeds that finished here), of which one must "
        f"be chosen by trying them online. A bandit (UCB, α = 2) draws up to {DRAWN} of them and plays one stored "
        "episode per pull; counted is the true score of the policy that then looks best, a mean over 1,000 repeats. "
        "Best of k: what k different ones give whose true scores are known, in closed form. No interval: another "
        "pool (other seeds) might give another curve, and that cannot be told from this one. "
        f"Pools of fewer than {MIN_POLICIES} policies are left out."
    )
    return Table([Entry(n) for n in names], rows, caption)


def budget_notes(family: Family) -> list[str]:
    """What to know about the pools."""
    notes = []
    if any(b.configs == 1 for found in family.budgets.values() for b in found):
        notes.append("A pool of one config holds nothing but luck of the seed to choose from.")
    for task, found in family.budgets.items():
        if not any(b.algo == CLONING for b in found):
            notes.append(
                f"{task.name}: no pool of cloned policies ({CLONING}). With few episodes to choose by, cloning is "
                "often the best choice, so run it before choosing among the others."
            )
        elif len(found) > 1:
            notes.append(
                f"{task.name}: {CLONING} is a pool of its own and in no other. Where its curve lies above another, "
                "cloning is the better choice at that number of episodes."
            )
    return notes


_OF_DATA = ("offline_updates", "data_share", "updates_per_step")
"""Settings that a comparison of learning from data and then online has to name."""


def setting_lines(analysis: Analysis) -> list[str]:
    """The suites these runs belong to, and per family who was given how much."""
    lines = [f"Suite {s}" for s in dict.fromkeys(r.suite for _, r in analysis.grid.records if r.suite)]
    for f in analysis.families:
        runs = [(c, r) for (c, t), cell in analysis.grid.cells.items() if t.family == f.name for r in cell]
        if not runs:
            continue
        made: dict[str, dict[str, None]] = defaultdict(dict)
        for c, r in runs:
            if r.status == "done":
                made[f"{r.steps:,} {r.task.unit}"][c] = None
        alike = len(made) == 1
        parts = ["; ".join(what if alike else f"{what} ({', '.join(names)})" for what, names in made.items())]
        seeds = sorted({len(cell) for (_, t), cell in analysis.grid.cells.items() if t.family == f.name and cell})
        parts.append(f"{seeds[0]} to {seeds[-1]} seeds" if len(seeds) > 1 else _plural(seeds[0], "seed"))
        episodes = sorted({len(r.episodes) for _, r in runs if r.status == "done"})
        if episodes:
            parts.append(f"scores of {'–'.join(map(str, dict.fromkeys((episodes[0], episodes[-1]))))} episodes")
        for key in _OF_DATA:
            values: dict[str, dict[str, None]] = defaultdict(dict)
            for c, r in runs:
                if r.settings.get(key) is not None and f.name != "online" and r.task.unit != "updates":
                    values[str(r.settings[key])][c] = None
            every = len(values) == 1 and all(len(names) == len({c for c, _ in runs}) for names in values.values())
            said = "; ".join(v if every else f"{v} ({', '.join(names)})" for v, names in values.items())
            parts += [f"{key} {said}"] if said else []
        name = f" ({f.name})" if len(analysis.families) > 1 else ""
        lines.append(f"Settings{name}: {', '.join(x for x in parts if x)}.")
    return lines


def _plural(n: int, what: str) -> str:
    return f"{n} {what}{'s' * (n != 1)}"


def troubles(analysis: Analysis) -> Table:
    """Runs that failed, diverged, are unfinished, missing or unreadable."""
    paths = short_paths([r for _, r in analysis.grid.records])
    absent: dict[tuple[str, Task, str], list[RunRecord]] = defaultdict(list)
    for column, r in analysis.grid.troubles:
        if r.status == "missing":
            absent[column, r.task, r.note].append(r)
    rows = []
    for column, r in analysis.grid.troubles:
        seed = "" if r.seed is None else str(r.seed)
        if r.status == "missing":  # the seeds of a cell are told once: there is nothing else to tell them apart
            if (same := absent[column, r.task, r.note])[0] is not r:
                continue
            seed = ranges([x.seed for x in same if x.seed is not None])
        made = f"{r.steps:,}" + (f" of {r.planned:,}" if r.planned else "") if r.steps else ""
        state: str = r.status
        if r.status == "done":
            state = "no score" if r.score is None else "duplicate"
        rows.append(
            [
                Entry(state),
                Entry(column),
                Entry(r.task.name),
                Entry(seed),
                Entry(made),
                Entry(r.note, "" if r.status == "missing" else paths.get(r.where, "")),
            ]
        )
    return Table([Entry(n) for n in ("state", "column", "task", "seed", "steps", "what happened")], rows)


def commands(analysis: Analysis) -> Table:
    """How each cell was made."""
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    groups: dict[tuple[str, str, str, str, str, str], list[RunRecord]] = defaultdict(list)
    for column, r in analysis.grid.records:
        if r.command or r.config:
            physics = "" if r.physics == "published" else f"{r.physics} physics"
            line = command_line(r.command) if r.command else "not recorded"
            groups[column, r.task.name, r.config, r.commit, physics, line].append(r)
    rows = []
    for (column, task, config, commit, physics, line), runs in groups.items():
        seeds = ranges([r.seed for r in runs if r.seed is not None])
        rows.append(
            [
                Entry(column, style=style.get(column)),
                Entry(task, physics),
                Entry(seeds),
                Entry(config),
                Entry(commit),
                Entry(line),
            ]
        )
    return Table([Entry(n) for n in ("column", "task", "seeds", "config", "commit", "command")], rows)


def versions(analysis: Analysis) -> Table:
    """Packages, and how many runs used which version."""
    count: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
    for _, r in analysis.grid.records:
        for package, version in r.versions.items():
            count[package][str(version)] += 1
    rows = []
    for package, found in count.items():
        several = ", ".join(f"{v} ({n} runs)" for v, n in found.items()) if len(found) > 1 else next(iter(found))
        rows.append([Entry(package), Entry(several)])
    return Table([Entry("package"), Entry("version")], rows)


def variants(analysis: Analysis) -> Table | None:
    """What tells columns of one algorithm apart, where the name cannot say it all."""
    found = [c for c in analysis.grid.columns if len(c.differs) > 0]
    if not found:
        return None
    style = {c.name: i for i, c in enumerate(analysis.grid.columns)}
    rows = [
        [Entry(c.name, style=style[c.name]), Entry(", ".join(f"{k}={v}" for k, v in c.differs.items()))] for c in found
    ]
    return Table([Entry("column"), Entry("settings in which the columns of its algorithm differ")], rows)


def scales(analysis: Analysis) -> Table | None:
    """What 0 and 100 mean."""
    rows = [
        [Entry(t.name), Entry(number(s.low)), Entry(number(s.high)), Entry(s.source)]
        for f in analysis.families
        for t, s in f.scales.items()
    ]
    return (
        Table([Entry(n) for n in ("task", "return of score 0", "return of score 100", "source")], rows)
        if rows
        else None
    )


def runs(analysis: Analysis) -> Table:
    """Every run that was found."""
    paths = short_paths([r for _, r in analysis.grid.records])
    rows = []
    for column, r in sorted(analysis.grid.records, key=lambda x: (x[1].task, x[0], x[1].seed or 0)):
        if r.status == "missing":
            continue
        score = "–" if r.score is None else number(r.score)
        seed = "" if r.seed is None else str(r.seed)
        rows.append(
            [
                Entry(r.task.name),
                Entry(column),
                Entry(seed),
                Entry(r.status),
                Entry(score),
                Entry(str(len(r.episodes))),
                Entry(f"{r.steps:,}"),
                Entry(paths[r.where]),
            ]
        )
    return Table([Entry(n) for n in ("task", "column", "seed", "status", "return", "episodes", "steps", "run")], rows)


def protocols(analysis: Analysis) -> list[str]:
    """Who measured how, by column."""
    found: dict[str, list[str]] = {}
    for c in analysis.grid.columns:
        runs = [r for (name, _), cell in analysis.grid.cells.items() if name == c.name for r in cell]
        for r in runs:
            counts = [len(x.episodes) for x in runs if x.protocol == r.protocol]
            names = found.setdefault(f"{r.protocol} ({_episodes(counts)})", [])
            if c.name not in names:
                names.append(c.name)
    return [f"{', '.join(names)}: {what}" for what, names in found.items()]


def _episodes(counts: Sequence[int]) -> str:
    low, high = min(counts), max(counts)
    return f"{low} episodes" if low == high else f"{low} to {high} episodes"


# --------------------------------------------------------------------------------------------------------------- parts
def command_line(words: Sequence[str]) -> str:
    """The command without the seed, which the table names, and without paths of its output."""
    text = " ".join(w if re.fullmatch(r"[\w@%+=:,./\[\]-]+", w) else f"'{w}'" for w in words)
    text = re.sub(r" --out[ =]\S+", "", text)
    return re.sub(r" --seed[ =]\d+", " --seed SEED", text)


def ranges(seeds: Sequence[int]) -> str:
    """`0-4, 7`."""
    spans: list[list[int]] = []
    for s in sorted(set(seeds)):
        if spans and s == spans[-1][1] + 1:
            spans[-1][1] = s
        else:
            spans.append([s, s])
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in spans)


def short_paths(records: Sequence[RunRecord]) -> dict[str, str]:
    """Paths relative to the folder that holds all of them."""
    found = sorted({r.where for r in records if r.where})
    absolute = {w: str(Path(w).absolute()) for w in found}
    if not found:
        return {}
    root = commonpath([str(Path(w).parent) for w in absolute.values()])
    return {w: str(Path(a).relative_to(root)) for w, a in absolute.items()}
