"""The report as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
import math
from typing import Any

from rlctl.report import tables
from rlctl.report.analysis import Analysis, Family
from rlctl.report.runs import RunRecord, Task
from rlctl.report.scale import Scale
from rlctl.report.stats import Interval
from rlctl.report.tables import Entry, Table

RUN_FIELDS = (
    "family",
    "task",
    "column",
    "algo",
    "seed",
    "status",
    "return",
    "normalized_score",
    "episodes",
    "steps",
    *("unit", "wall_clock_s", "config", "commit", "physics", "origin", "protocol", "run", "note"),
)


def markdown(analysis: Analysis, title: str) -> str:
    """Everything but the figures."""
    parts = [f"# {title}", "", _counts(analysis), ""]
    parts += [text for line in tables.setting_lines(analysis) for text in (line, "")]
    parts += ["## What these runs say", "", *(f"- {x}" for x in analysis.claims + analysis.cautions), ""]
    parts += [tables.WHAT_A_SCORE_IS, ""]
    if analysis.grid.warnings:
        parts += ["## Protocol warnings", "", *(f"- {x}" for x in analysis.grid.warnings), ""]
    for f in analysis.families:
        parts += [f"## Scores: {f.name}", "", *_table(tables.results(analysis, f))]
        if (aggregate := tables.aggregates(analysis, f)) is not None:
            parts += [f"### Aggregates: {f.name}", "", *_table(aggregate)]
        if left_out := {**f.not_aggregated, **f.tasks_left_out}:
            parts += [f"- Not aggregated: {name}: {why}." for name, why in left_out.items()] + [""]
        if (matrix := tables.improvement(analysis, f)) is not None:
            parts += [f"### Probability of improvement: {f.name}", "", *_table(matrix)]
        if (budgets := tables.budgets(f)) is not None:
            parts += [f"### What choosing a policy costs: {f.name}", "", *_table(budgets)]
            parts += [*(f"- {note}" for note in tables.budget_notes(f)), ""]
    if analysis.compute:
        parts += ["## Wall-clock and compute", "", *_table(tables.compute(analysis))]
    if analysis.grid.troubles:
        parts += ["## Runs that need attention", "", *_table(tables.troubles(analysis))]
    if measured := tables.protocols(analysis):
        parts += ["## How scores were measured", "", *(f"- {line}" for line in measured), ""]
    for head, table in (
        ("What 0 and 100 mean", tables.scales(analysis)),
        ("Columns", tables.variants(analysis)),
        ("Commands", tables.commands(analysis)),
        ("Versions", tables.versions(analysis)),
    ):
        if table is not None and table.rows:
            parts += [f"## {head}", "", *_table(table)]
    return "\n".join(parts)


def _counts(analysis: Analysis) -> str:
    n, counted = (
        sum(r.status != "missing" for _, r in analysis.grid.records),
        sum(len(x) for x in analysis.grid.cells.values()),
    )
    return f"{n} run{'s' * (n != 1)} found, {counted} counted."


def _table(t: Table) -> list[str]:
    def row(entries: list[Entry]) -> str:
        return "| " + " | ".join(_cell(e) for e in entries) + " |"

    lines = [row(t.header), "|" + "---|" * len(t.header), *(row(r) for r in t.rows), ""]
    return [*lines, t.caption, ""] if t.caption else lines


def _cell(e: Entry) -> str:
    text = f"**{e.text}**" if e.strong else e.text
    small = e.small.replace("\n", "; ")
    return " ".join(x for x in (text, f"({small})" if small else "") if x).replace("|", "\\|")


# ----------------------------------------------------------------------------------------------------------------- CSV
def run_rows(analysis: Analysis) -> list[dict[str, Any]]:
    """One row per run that was found."""
    scales: dict[Task, Scale] = {t: s for f in analysis.families for t, s in f.scales.items()}
    return [_run_row(column, r, scales.get(r.task)) for column, r in analysis.grid.records]


def _run_row(column: str, r: RunRecord, scale: Scale | None) -> dict[str, Any]:
    score = r.score
    normalized = None if score is None or scale is None else 100.0 * (score - scale.low) / (scale.high - scale.low)
    values = (
        *(r.task.family, r.task.name, column, r.algo, r.seed, r.status, score, normalized, len(r.episodes), r.steps),
        r.task.unit,
        sum(r.seconds.values()),
        r.config,
        r.commit,
        r.physics,
        r.origin,
        r.protocol,
        r.where,
        r.note,
    )
    return dict(zip(RUN_FIELDS, values, strict=True))


def comma_separated(analysis: Analysis) -> str:
    """CSV of `run_rows`."""
    out = io.StringIO()
    writer = csv.DictWriter(out, RUN_FIELDS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(run_rows(analysis))
    return out.getvalue()


# ---------------------------------------------------------------------------------------------------------------- JSON
def as_json(analysis: Analysis) -> str:
    """Every number of the report."""
    value = {
        "bootstrap": {"seed": analysis.seed, "replicates": analysis.replicates},
        "claims": analysis.claims,
        "cautions": analysis.cautions,
        "warnings": analysis.grid.warnings,
        "families": [_family(f) for f in analysis.families],
        "hours": analysis.hours,
        "compute": [
            {
                "column": c.column,
                "task": c.task.name,
                "runs": c.runs,
                "hours": c.hours,
                "minutes_per_run": c.minutes,
                "shares": c.shares,
                "steps_per_second": c.speed,
                "machines": c.machines,
            }
            for c in analysis.compute
        ],
        "runs": run_rows(analysis),
        "attention": [
            {"column": c, "task": r.task.name, "seed": r.seed, "status": r.status, "run": r.where, "note": r.note}
            for c, r in analysis.grid.troubles
        ],
    }
    return json.dumps(_finite(value), indent=1) + "\n"


def _family(f: Family) -> dict[str, Any]:
    return {
        "family": f.name,
        "cells": [
            {
                "task": c.task.name,
                "column": c.column,
                "seeds": c.seeds,
                "returns": c.raw.tolist(),
                "mean": _interval(c.mean) or {"value": float(c.raw.mean())},
                "normalized_scores": None if c.normalized is None else c.normalized.tolist(),
                "normalized_mean": _interval(c.normalized_mean),
                "diverged": c.diverged,
            }
            for c in f.cells.values()
        ],
        "aggregate_tasks": [t.name for t in f.aggregate_tasks],
        "aggregates": {c: {m: _interval(i) for m, i in found.items()} for c, found in f.aggregates.items()},
        "not_aggregated": f.not_aggregated,
        "pairs": [
            {
                "a": p.a,
                "b": p.b,
                "tasks": [t.name for t in p.tasks],
                "probability_a_beats_b": _interval(p.probability),
                "p_holm": p.p,
                "verdict": p.verdict,
                "differ_in": p.unequal,
            }
            for p in f.pairs
        ],
        "curves": [
            {
                "task": t.name,
                "column": b.column,
                "x": b.x.tolist(),
                "mean": b.y.tolist(),
                "low": None if b.low is None else b.low.tolist(),
                "high": None if b.high is None else b.high.tolist(),
                "seeds": b.seeds,
                "diverged": b.diverged,
                "without_a_curve": b.without,
            }
            for t, bands in f.curves.items()
            for b in bands
        ],
        "budgets": [
            {
                "task": t.name,
                "algo": b.algo,
                "policies": b.policies,
                "configs": b.configs,
                "episodes": b.pulls.tolist(),
                "value": b.value.tolist(),
                "monte_carlo_error": b.error.tolist(),
                "expected_maximum": b.expected.tolist(),
            }
            for t, found in f.budgets.items()
            for b in found
        ],
    }


def _interval(i: Interval | None) -> dict[str, float] | None:
    return None if i is None else i._asdict()


def _finite(value: Any) -> Any:
    """JSON knows no NaN."""
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
