"""The report as one HTML file: no script, no network, light and dark, readable on a phone, printable."""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from importlib.metadata import version
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup

from rlctl.report import charts, svg, tables
from rlctl.report.analysis import BAND_REPLICATES, Analysis, Band, Family

ROWS_SHOWN = 15
"""Of the runs that need attention; the rest is folded away."""


def render(analysis: Analysis, title: str) -> str:
    """The whole page."""
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    template = environment.from_string(files("rlctl.report").joinpath("page.html").read_text())
    troubles, more_troubles = tables.troubles(analysis).split(ROWS_SHOWN)
    families = [_family(analysis, f) for f in analysis.families]
    return template.render(
        title=title,
        facts=_facts(analysis),
        settings=tables.setting_lines(analysis),
        band_replicates=BAND_REPLICATES,
        chart_style=Markup(svg.style_sheet()),
        swatch=lambda style: Markup(svg.swatch(style)),
        what_a_score_is=tables.WHAT_A_SCORE_IS,
        claims=analysis.claims,
        cautions=analysis.cautions,
        warnings=analysis.grid.warnings,
        imported=any(c.origin != "rlctl" for c in analysis.grid.columns),
        contents=_contents(families),
        families=families,
        compute=tables.compute(analysis),
        troubles=troubles,
        more_troubles=more_troubles,
        variants=tables.variants(analysis),
        commands=tables.commands(analysis),
        versions=tables.versions(analysis),
        scales=tables.scales(analysis),
        protocols=tables.protocols(analysis),
        runs=tables.runs(analysis),
        made=_made(analysis),
    )


def _facts(analysis: Analysis) -> str:
    records = [r for _, r in analysis.grid.records if r.status != "missing"]
    diverged = sum(r.status == "diverged" for r in records)
    parts = [
        _count(len(records), "run"),
        f"{sum(r.status == 'done' for r in records)} finished",
        *([f"{diverged} diverged"] if diverged else []),
        _count(len(analysis.grid.columns), "column"),
        _count(len(analysis.grid.tasks), "task"),
    ]
    return ", ".join(parts) + "."


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}{'s' * (n != 1)}"


def _made(analysis: Analysis) -> str:
    today = datetime.datetime.now(datetime.UTC).date().isoformat()
    return (
        f"Made by rlctl {version('rlctl')} on {today}; bootstrap seed {analysis.seed}, {analysis.replicates:,} "
        "replicates. "
        "The seed of a run is the unit of all statistics; episodes of one seed are never pooled as if they were runs."
    )


def _family(analysis: Analysis, f: Family) -> dict[str, Any]:
    style = charts.styles(analysis)
    profiles = [*charts.efficiency_panels(analysis, f), charts.profile_panel(analysis, f)]
    absent = [c for c in f.aggregates if c not in {b.column for b in f.efficiency}]
    note = ""
    if f.efficiency:
        note = "A curve of the IQM goes as far as all runs of its column on all these tasks."
    if absent:
        note += f" Without a curve: {', '.join(absent)}."
    if told := _carried(f.efficiency):
        note += f" {told}"
    budget_algos = sorted({b.algo for found in f.budgets.values() for b in found})
    return {
        "name": f.name,
        "results": tables.results(analysis, f),
        "aggregates": tables.aggregates(analysis, f),
        "not_aggregated": {**f.not_aggregated, **f.tasks_left_out},
        "dots": _drawn([svg.dots(d) for d in charts.aggregate_dots(analysis, f)]),
        "carried": _carried([b for bands in f.curves.values() for b in bands]),
        "curves": _drawn([svg.panel(p) for p in charts.curve_panels(analysis, f)]),
        "legend": [(c, style[c]) for c in f.columns],
        "aggregate_legend": [(c, style[c]) for c in f.aggregates],
        "profiles": _drawn([svg.panel(p) for p in profiles if p is not None]),
        "efficiency_note": note,
        "improvement": tables.improvement(analysis, f),
        "budgets": _drawn([svg.panel(p) for p in charts.budget_panels(analysis, f)]),
        "budget_legend": [(a, i) for i, a in enumerate(budget_algos)],
        "budget_table": tables.budgets(f),
        "budget_notes": tables.budget_notes(f),
    }


def _carried(bands: Sequence[Band]) -> str:
    """What the caption of curves says about runs that diverged or were never evaluated in training."""
    diverged, without = sum(b.diverged for b in bands), sum(b.without for b in bands)
    parts = []
    if diverged:
        parts.append(f"{_count(diverged, 'diverged run')} among them, each with its last value carried on to the end.")
    if without:
        parts.append(f"{_count(without, 'counted run')} without a curve, not in any mean here.")
    return " ".join(parts)


def _drawn(texts: Sequence[str]) -> list[Markup]:
    return [Markup(x) for x in texts]


def _contents(families: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    several = len(families) > 1
    out = []
    parts = (
        ("results", "scores", "Scores"),
        ("aggregates", "aggregates", "Aggregates"),
        ("curves", "curves", "Curves"),
        ("profiles", "profiles", "Profiles"),
        ("improvement", "improvement", "Improvement"),
        ("budgets", "budgets", "Budgets"),
    )
    for i, f in enumerate(families, 1):
        for key, id, name in parts:
            if f[key]:
                out.append((f"{id}-{i}", f"{name} ({f['name']})" if several else name))
    return [*out, ("compute", "Compute"), ("attention", "Attention"), ("provenance", "Provenance")]
