"""`rlctl report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

FORMATS = ("html", "md", "csv", "json", "png")

Dirs = Annotated[
    list[Path], typer.Argument(help="Run directories, folders that hold them, or CSV files.", metavar="DIR...")
]
Algos = Annotated[
    list[str] | None, typer.Option("--algo", metavar="NAME", help="Only this algorithm; may be repeated.")
]
Tasks = Annotated[list[str] | None, typer.Option("--task", metavar="NAME", help="Only this task; may be repeated.")]
ByAlgo = Annotated[
    bool,
    typer.Option("--by-algo", help="One column per algorithm even where its runs have different settings (warned of)."),
]
ScaleFile = Annotated[
    Path | None,
    typer.Option(
        "--scale", metavar="FILE", help="JSON from a task to the two returns that score 0 and 100, for more tasks."
    ),
]


def report(
    dirs: Dirs,
    out: Annotated[
        Path | None,
        typer.Option("--out", "-o", help="File to write; its ending names the format. Default: report.html."),
    ] = None,
    format: Annotated[
        str | None, typer.Option("--format", help="html, md, csv, json or png; md, csv and json print without --out.")
    ] = None,
    algo: Algos = None,
    task: Tasks = None,
    by_algo: ByAlgo = False,
    scale: ScaleFile = None,
    title: Annotated[str, typer.Option(help="Heading of the page.")] = "Benchmark report",
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    replicates: Annotated[int, typer.Option(min=100, help="Bootstrap replicates of the aggregates.")] = 50_000,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Turn runs into one page that a reviewer can check: scores with intervals, curves, comparisons, what went wrong.

    Reads run directories wherever they lie below DIR, and beside them logs of RL Zoo, CleanRL, skrl and rsl_rl. Below 3
    seeds no interval is shown, below 5 no aggregate and no claim.

    [bold]Examples[/bold]

      rlctl report runs -o report.html

      rlctl report runs/ppo runs/sac zoo/logs -o report.html --task Hopper-v5

      rlctl report runs --format csv > runs.csv
    """
    from rlctl.cli.output import busy
    from rlctl.errors import UsageError
    from rlctl.report import analysis, grid, page, runs, text
    from rlctl.report.scale import read_given

    ending = out.suffix[1:] if out is not None and out.suffix[1:] in FORMATS else None
    kind = format or ending or ("html" if out is None else None)
    if kind not in FORMATS:
        raise UsageError(
            f"unknown format '{kind or out}': allowed are {', '.join(FORMATS)}, by --format or --out's ending"
        )
    given = read_given(scale)
    if out is not None and not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent} does not exist: create it, or choose another --out")
    with busy("reading runs", quiet) as say:
        found = grid.select(runs.load(dirs), algo or [], task or [])
        sorted_in = grid.build(found, by="algo" if by_algo else "config")
        if kind == "png":
            replicates = min(replicates, 2_000)  # tables are not shown
        result = analysis.analyze(sorted_in, given=given, seed=seed, replicates=replicates, progress=say)
        say("writing")
        if kind == "png":
            out = out or Path("report.png")
            _png(result, out, title)
            content = None
        else:
            writers = {
                "html": lambda: page.render(result, title),
                "md": lambda: text.markdown(result, title),
                "csv": lambda: text.comma_separated(result),
                "json": lambda: text.as_json(result),
            }
            content = writers[kind]()
    if content is not None and out is None and kind != "html":
        print(content, end="")
        return
    out = out or Path("report.html")
    if content is not None:
        write(out, content)
    if not quiet:
        counted = sum(len(x) for x in sorted_in.cells.values())
        print(f"report:    {out} ({out.stat().st_size / 1024:,.0f} KiB)")
        there = sum(r.status != "missing" for r in found)
        print(f"runs:      {there} found, {counted} counted, {len(sorted_in.troubles)} need attention")
        for line in result.claims + result.cautions:
            print(f"says:      {line}")
        for line in sorted_in.warnings:
            print(f"warning:   {line}")


def _png(result: object, out: Path, title: str) -> None:
    from rlctl.errors import UsageError
    from rlctl.report import charts, raster
    from rlctl.report.analysis import Analysis

    assert isinstance(result, Analysis)
    panels: list[charts.Panel | charts.Dots] = []
    for f in result.families:
        panels += charts.curve_panels(result, f)
        panels += [p for p in (*charts.efficiency_panels(result, f), charts.profile_panel(result, f)) if p is not None]
        panels += charts.aggregate_dots(result, f)[:1]
    if not panels:
        raise UsageError("there is nothing to draw: no run has been evaluated yet")
    raster.write_png(out, panels, list(charts.styles(result).items()), title)


def write(out: Path, content: str) -> None:
    """Write a file, whole or not at all; UsageError where that is impossible."""
    from rlctl.checkpoint import write_atomically
    from rlctl.errors import UsageError

    try:
        write_atomically(out, content)
    except OSError as e:
        raise UsageError(f"cannot write {out}: {e.strerror}; choose another --out") from e
