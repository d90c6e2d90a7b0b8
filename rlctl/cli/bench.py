"""`rlctl bench`."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer


def bench(
    suite: Annotated[
        str | None,
        typer.Argument(
            help="A suite that is shipped (smoke, online-mujoco, ...) or the path of a YAML file; with --status also a "
            "folder of results.",
            metavar="SUITE",
        ),
    ] = None,
    out: Annotated[
        Path | None, typer.Option(help="Folder of the results; the default is runs/SUITE.", show_default=False)
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Validate, show the cells and the cost, start nothing.")
    ] = False,
    probe: Annotated[
        bool,
        typer.Option("--probe", help="With --dry-run: measure some seconds of every cell whose speed is unknown."),
    ] = False,
    status: Annotated[
        bool,
        typer.Option(
            "--status",
            help="Show where the cells stand, and exit: of the folder or suite given, else of the newest under runs/.",
        ),
    ] = False,
    executor: Annotated[str, typer.Option(help="Where the cells run: local, ray or slurm.")] = "local",
    jobs: Annotated[
        int | None,
        typer.Option(
            "--jobs",
            "-j",
            min=1,
            help="Cells at a time; the default is what the executor has room for.",
            show_default=False,
        ),
    ] = None,
    gpus: Annotated[
        str | None, typer.Option(help="GPUs to deal to the cells of this machine, e.g. 0,1.", show_default=False)
    ] = None,
    option: Annotated[
        list[str] | None,
        typer.Option(
            "--option", metavar="KEY=VALUE", help="An option of the executor, e.g. partition=long, address=auto."
        ),
    ] = None,
    seeds: Annotated[
        str | None,
        typer.Option(
            help="Other seeds than the suite's: a number of them, or a list like 10,11,12.", show_default=False
        ),
    ] = None,
    retries: Annotated[int, typer.Option(min=0, help="Times a cell that failed or was lost is tried again.")] = 2,
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Try cells again that have used up their retries.")
    ] = False,
    retry_diverged: Annotated[
        bool,
        typer.Option(
            "--retry-diverged", help="Begin diverged cells anew, after a fix; what they made is kept in .diverged."
        ),
    ] = False,
    stall_minutes: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="End a cell, and try it again, that shows no metrics, evaluation or checkpoint for so long; 0: never. "
            "The default is the suite's, 30 if it says nothing. It must exceed the longest evaluation.",
            show_default=False,
        ),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout (plan, status or result).")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Run a grid of algorithms, tasks and seeds, and go on with it where it stands.

    The same command again skips what is finished, resumes what was interrupted from its checkpoints, and tries again
    what failed. Killing the driver or a cell at any moment loses at most the steps since a checkpoint.

    Exit codes: 0 every cell is done, 1 some failed or diverged, 2 the suite is wrong, 75 interrupted (go on with the
    same command).

    [bold]Examples[/bold]

      rlctl bench smoke

      rlctl bench online-mujoco --dry-run --probe

      rlctl bench my_suite.yaml --out runs/mine --jobs 8

      rlctl bench --status               # of the newest grid; or: --status runs/mine

      rlctl bench my_suite.yaml --executor slurm --option partition=long --option minutes=600
    """
    from rlctl.errors import UsageError

    if status:
        show_status(_results(suite, out), json_)
        return
    if suite is None:
        raise UsageError("no suite given: name one that is shipped (smoke), or a YAML file; `rlctl bench --help`")
    if probe and not dry_run:
        raise UsageError("--probe only tells what a grid will cost: give it with --dry-run")
    again = {s for s, asked in (("failed", retry_failed), ("diverged", retry_diverged)) if asked}
    _run(
        suite,
        out,
        dry_run,
        probe,
        executor,
        jobs,
        gpus,
        option or [],
        seeds,
        retries,
        again,
        stall_minutes,
        json_,
        quiet,
    )


def _run(
    suite: str,
    out: Path | None,
    dry_run: bool,
    probe: bool,
    executor: str,
    jobs: int | None,
    gpus: str | None,
    option: list[str],
    seeds: str | None,
    retries: int,
    again: set[str],
    stall_minutes: float | None,
    json_: bool,
    quiet: bool,
) -> None:
    """`again`: what to forget, of failed and diverged."""
    import dataclasses

    from rlctl.bench import cost, executors
    from rlctl.bench import suite as suites
    from rlctl.bench.driver import Driver, retry_diverged, retry_failed, to_do
    from rlctl.bench.ledger import Ledger, states
    from rlctl.bench.probe import probe as measure
    from rlctl.bench.view import View
    from rlctl.cli.output import print_json
    from rlctl.config import parse_overrides
    from rlctl.errors import RlctlError, UsageError
    from rlctl.provenance import provenance
    from rlctl_envs.engines import available_cores

    plan = suites.load(suite, seeds=None if seeds is None else _seeds(seeds))
    if stall_minutes is not None:
        plan = dataclasses.replace(plan, stall=60 * stall_minutes)
    folder = out or Path("runs") / plan.name
    found = states(folder, [c.id for c in plan.cells], live=False)
    left = [c for c in plan.cells if to_do(s := found[c.id], retries) or s.status in again]
    speeds = cost.Speeds([folder, Path("runs")])
    if probe:
        for line in measure(left, speeds, say=lambda line: None if quiet else print(line, file=sys.stderr, flush=True)):
            print(f"rlctl: {line}", file=sys.stderr)
    estimate = cost.estimate(left, speeds)
    if dry_run:
        _show_plan(plan, folder, found, left, estimate, jobs or max(available_cores() // plan.threads, 1), json_)
        if plan.missing:
            raise UsageError(f"{len(plan.missing)} datasets of the suite are not here, the first: {plan.missing[0]}")
        return
    if plan.missing:
        raise UsageError(f"{len(plan.missing)} datasets are not here (all: --dry-run), the first: {plan.missing[0]}")
    options = dict(parse_overrides(option))
    ledger = Ledger(folder)
    place = None
    try:
        # what is wrong with the folder or the executor is said before anything is written
        place = executors.make(
            executor, slots=jobs, threads=plan.threads, gpus=gpus.split(",") if gpus else None, folder=folder, **options
        )
        about = {"executor": executor, "threads": plan.threads, **provenance()}
        ledger.begin(plan, about)
        if "failed" in again:
            retry_failed(ledger, plan)
        if "diverged" in again:
            retry_diverged(ledger, plan)
        view = View(folder, plan.cells, place.slots, quiet=quiet)
        view.say(f"suite {plan.name}: {_counted(plan, found, left)}, in {folder}")
        view.say(f"on {place.describe()}")
        for line in estimate.lines(place.slots):
            view.say(line)
        summary = Driver(plan, ledger, place, view, retries=retries).run()
    finally:
        if place is not None:
            place.close()
        ledger.close()
    if json_:
        print_json({"folder": str(folder), **vars(summary)})
    elif not quiet:
        parts = [f"{summary.done} of {len(plan.cells)} cells done"]
        parts += [f"{n} {what}" for what in ("failed", "diverged") if (n := getattr(summary, what))]
        print(f"{', '.join(parts)} in {folder}   (rlctl bench --status {folder})")
    if summary.interrupted:
        stopped = RlctlError("interrupted; go on with the same command")
        stopped.exit_code = 75
        raise stopped
    if summary.done < len(plan.cells):
        raise typer.Exit(1)


def show_status(folder: Path, json_: bool) -> None:
    """The cells of a results folder, from what lies on the disk."""
    from rich.console import Console

    from rlctl.bench.ledger import holder, is_held, states
    from rlctl.bench.view import LEGEND, grid, share_done
    from rlctl.cli.output import print_json
    from rlctl.display import clock
    from rlctl.errors import UsageError
    from rlctl.experiment import read_json

    record = read_json(folder / "bench.json")
    if not record:
        raise UsageError(f"{folder} is no folder of `rlctl bench`: it has no bench.json")
    live = is_held(folder / ".lock")
    cells = record["cells"]
    found = states(folder, [c["id"] for c in cells], live=live)
    if json_:
        rows = [
            c
            | {"status": s.status, "attempts": s.attempts, "error": s.error, "log": s.log}
            | {
                "share_done": 1.0
                if s.status == "done"
                else share_done(folder / c["id"], c["steps"], c["offline_updates"])
            }
            | {"return_mean": s.score, "normalized_score": s.normalized}
            for c in cells
            if (s := found[c["id"]])
        ]
        print_json(
            {"suite": record["suite"], "folder": str(folder), "driver": holder(folder) if live else None, "cells": rows}
        )
        return
    print(
        f"suite {record['suite']}: {len(cells)} cells; {'driver: ' + holder(folder) if live else 'no driver at work'}"
    )
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(grid([(c["column"], c["source"], c["seed"], found[c["id"]]) for c in cells]))
    print(LEGEND)
    for c in cells:
        s = found[c["id"]]
        if s.status in ("running", "interrupted"):
            share = share_done(folder / c["id"], c["steps"], c["offline_updates"])
            # one that was resumed has not made all of it in this attempt
            rest = (time.time() - s.since) / share * (1 - share) if s.attempts == 1 and share > 0.02 else None
            eta = f"  ETA {clock(rest)}" if s.status == "running" and rest is not None else ""
            print(f"{s.status:<11} {c['id']}  {share:.0%}{eta}")
        elif s.status in ("failed", "diverged"):
            tries = f"{s.attempts} attempt{'s' * (s.attempts != 1)}"
            print(f"{s.status:<11} {c['id']}  {tries}: {s.error}; log {folder / s.log}")
    known = {c["id"] for c in cells}
    runs = [f.parent for f in folder.glob("*/*/s*/run.json")]
    if old := [r for r in runs if r.relative_to(folder).as_posix() not in known]:
        print(
            f"{len(old)} runs are not in the last plan (other seeds, or settings of then), e.g. {old[0]}: "
            "a report of this folder counts them too"
        )


def _results(name: str | None, out: Path | None) -> Path:
    """The folder that --status is about: one of results, that of a suite, or the newest under runs/."""
    from rlctl.errors import UsageError

    if out is not None or name is not None:
        if out is not None and name is not None and Path(name) != out and (Path(name) / "bench.json").exists():
            raise UsageError(f"--status shows one folder of results, got {name} and --out {out}")
        folder = out or Path(name or "")
        suite = Path("runs") / folder.stem
        return suite if not (folder / "bench.json").exists() and (suite / "bench.json").exists() else folder
    newest = sorted(Path("runs").glob("*/bench.json"), key=lambda f: f.stat().st_mtime)
    if not newest:
        raise UsageError("no grid under runs/: name a folder of `rlctl bench`, as in `rlctl bench --status DIR`")
    return newest[-1].parent


def _counted(plan: Any, found: Mapping[str, Any], left: list[Any]) -> str:
    """Cells, and what will not be run of them."""
    statuses = [found[c.id].status for c in plan.cells if c not in left]
    parts = [f"{len(plan.cells)} cells"]
    parts += [f"{n} {what}" for what in ("done", "diverged") if (n := statuses.count(what))]
    if n := sum(s not in ("done", "diverged") for s in statuses):
        parts.append(f"{n} failed with their retries used up (--retry-failed)")
    return ", ".join([*parts, f"{len(left)} to do"])


def _show_plan(
    plan: Any, folder: Path, found: Mapping[str, Any], left: list[Any], estimate: Any, slots: int, json_: bool
) -> None:
    from rlctl.bench import cost
    from rlctl.cli.output import print_json, print_table

    todo = {c.id for c in left}
    if json_:
        cells = [
            {"id": c.id, "steps": c.steps, "status": found[c.id].status, "to_do": c.id in todo} for c in plan.cells
        ]
        print_json(
            {
                "suite": plan.name,
                "folder": str(folder),
                "cells": cells,
                "cost": cost.as_json(estimate),
                "missing": plan.missing,
            }
        )
        return
    rows: dict[tuple[str, str], list[Any]] = {}
    for c in plan.cells:
        rows.setdefault((c.column, c.source), []).append(c)
    print(f"suite {plan.name}: {plan.description}" if plan.description else f"suite {plan.name}")
    print_table(
        ["ALGORITHM", "ON", "STEPS", "SEEDS", "DONE", "KEY"],
        [
            [
                column,
                source,
                f"{cs[0].steps:,}",
                " ".join(str(c.seed) for c in cs),
                sum(found[c.id].status == "done" for c in cs),
                cs[0].key,
            ]
            for (column, source), cs in rows.items()
        ],
    )
    print(_counted(plan, found, left))
    for line in estimate.lines(slots):
        print(line)
    for line in plan.missing:
        print(f"missing: {line}")


def _seeds(text: str) -> list[int]:
    from rlctl.errors import UsageError

    try:
        numbers = [int(x) for x in text.split(",") if x]
    except ValueError:
        numbers = [-1]
    if not numbers or min(numbers) < 0 or text == "0":
        raise UsageError(f"--seeds takes a number of seeds (5), or a list of them (10,11 or 7,), got '{text}'")
    return numbers if "," in text else list(range(numbers[0]))
