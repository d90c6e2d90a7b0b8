"""`rlctl plot`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from rlctl.cli.report import Algos, ByAlgo, Dirs, Tasks


def plot(
    dirs: Dirs,
    out: Annotated[Path, typer.Option("--out", "-o", help="File to write: .svg, or .png (which needs matplotlib).")],
    algo: Algos = None,
    task: Tasks = None,
    by_algo: ByAlgo = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Draw the learning curves of runs, one panel per task.

    Lines are means over seeds; bands are 95% t intervals, from 3 seeds on. With fewer the single runs are drawn thin.

    [bold]Examples[/bold]

      rlctl plot runs -o curves.svg

      rlctl plot runs/ppo runs/sac --task Hopper-v5 -o hopper.png
    """
    from rlctl.cli.output import busy
    from rlctl.cli.report import write
    from rlctl.errors import UsageError
    from rlctl.report import analysis, charts, grid, raster, runs, svg

    if out.suffix not in (".svg", ".png"):
        raise UsageError(f"unknown format '{out.suffix or out}': allowed are .svg and .png")
    if not out.absolute().parent.is_dir():
        raise UsageError(f"{out.parent} does not exist: create it, or choose another --out")
    with busy("reading runs", quiet):
        found = grid.select(runs.load(dirs), algo or [], task or [])
        sorted_in = grid.build(found, by="algo" if by_algo else "config")
        panels, legend = charts.plain_curves(sorted_in, analysis.curves(sorted_in))
        if not panels:
            raise UsageError("there is nothing to draw: no run has been evaluated yet")
        if out.suffix == ".svg":
            write(out, svg.sheet(panels, legend))
        else:
            raster.write_png(out, panels, legend)
    if not quiet:
        print(f"curves:    {out} (tasks: {len(panels)}, columns: {len(legend)})")
