"""`rlctl tune`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def tune(
    study: Annotated[
        Path | None,
        typer.Argument(metavar="[FILE]", help="YAML file with the keys of a study (algo, tasks, params, ...)."),
    ] = None,
    algo: Annotated[str | None, typer.Option(help="Algorithm, as for `rlctl train`.")] = None,
    env: Annotated[list[str] | None, typer.Option(help="Task; may be repeated.")] = None,
    data: Annotated[list[str] | None, typer.Option(help="Dataset of an offline learner; may be repeated.")] = None,
    param: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=KIND:LOW:HIGH",
            help="What to search: lr=log:1e-5:1e-2, gamma=float:0.9:0.999, epochs=int:3:20, "
            "batch_size=logint:32:1024, hidden=choice:[[64, 64], [256, 256]].",
        ),
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Length of each run.")] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="Configurations to try. [default: 30]")] = None,
    seeds: Annotated[int | None, typer.Option(min=1, help="Seeds per task of every trial. [default: 2]")] = None,
    top: Annotated[int | None, typer.Option(min=1, help="The best ones to run again. [default: 3]")] = None,
    confirm_seeds: Annotated[
        int | None, typer.Option(min=1, help="Fresh seeds per task for those and for the default. [default: 5]")
    ] = None,
    evaluations: Annotated[int | None, typer.Option(min=1, help="Per run: what pruning goes by. [default: 20]")] = None,
    no_prune: Annotated[bool, typer.Option("--no-prune", help="See every trial through.")] = False,
    seed: Annotated[int | None, typer.Option(min=0, help="Of the proposals. [default: 0]")] = None,
    scale: Annotated[
        list[str] | None,
        typer.Option(metavar="TASK=LOW:HIGH", help="Returns that score 0 and 100, where D4RL has none for the task."),
    ] = None,
    set_: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A setting that is the same in all runs.")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Runs side by side, one process and one thread each.")] = 1,
    executor: Annotated[
        str, typer.Option(help="Where the runs happen, as for `rlctl bench`: local, ray or slurm.")
    ] = "local",
    option: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the executor, e.g. partition=long."),
    ] = None,
    out: Annotated[Path, typer.Option(help="Folder of the study; given again, the study goes on.")] = Path(
        "studies/study"
    ),
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Search settings: several seeds and tasks per trial, early stopping, and a second look at the best.

    A search finds the settings that were best, and those that were luckiest. So the best ones are run again on fresh
    seeds, beside the default settings; "better" is said only of what a permutation test (Holm-corrected) separates from
    the default there.

    Ctrl-C (or a kill) loses nothing but the steps since the last checkpoints: the same command goes on.

    [bold]Examples[/bold]

      rlctl tune --algo ppo --env Hopper --param lr=log:1e-5:1e-2 --param epochs=int:3:20 --steps 200000 --slots 2

      rlctl tune --algo sac --env Hopper --env Walker2d --param tau=log:1e-3:0.05 --seeds 3 --out studies/sac

      rlctl tune my_study.yaml --out studies/mine

      rlctl tune my_study.yaml --executor slurm --slots 32 --option minutes=240 --out studies/cluster

      rlctl tune --out studies/mine      # go on
    """
    import importlib.util

    from rich.console import Console

    from rlctl.bench import executors
    from rlctl.cli.output import print_json, print_table
    from rlctl.config import parse_overrides
    from rlctl.errors import UsageError
    from rlctl.tune import ExecutorRunner, Plan, Tuner, parse_param
    from rlctl.tune.study import LEVEL

    if importlib.util.find_spec("optuna") is None:
        raise UsageError("a search needs the package optuna: pip install 'rlctl[tune]'")
    values: dict[str, Any] = _file(study) if study is not None else {}
    flags = {
        "algo": algo,
        "tasks": [*(env or []), *(data or [])] or None,
        "params": {p.key: p.plain() for p in map(parse_param, param or [])} or None,
        "steps": steps,
        "trials": trials,
        "seeds": seeds,
        "top": top,
        "confirm_seeds": confirm_seeds,
        "evaluations": evaluations,
        "prune": False if no_prune else None,
        "seed": seed,
        "scale": dict(map(_scale, scale or [])) or None,
        "settings": set_ or None,
    }
    values |= {k: v for k, v in flags.items() if v is not None}
    plan = Plan.read(values) if values else None
    console = Console(stderr=True, highlight=False, soft_wrap=True)

    def say(line: str) -> None:
        if not quiet:
            console.print(line, markup=False)

    # a machine on which one searches is seldom alone: no pinning, unless asked for
    options = ({"pin": False} if executor == "local" else {}) | dict(parse_overrides(option or []))

    def runner() -> ExecutorRunner:
        return ExecutorRunner(executors.make(executor, slots=slots, threads=1, folder=out, **options))

    tuner = Tuner(out, plan, runner, say=say)
    p = tuner.plan
    runs = len(p.tasks) * (p.trials * p.seeds + (p.top + 1) * p.confirm_seeds)
    say(f"{p.trials} trials of {p.algo} on {', '.join(p.tasks)}, {p.seeds} seeds each: {runs} runs at most, in {out}")
    if p.least_p() >= LEVEL:
        say(f"note: {p.confirm_seeds} fresh seeds cannot separate anything from the default; take more --confirm-seeds")
    result = tuner.run()
    if json_:
        print_json(result)
        return
    if quiet:
        return
    rows = []
    for r in result["configurations"]:
        interval = "" if r["fresh_low"] is None else f"{r['fresh_low']:.4g} to {r['fresh_high']:.4g}"
        rows.append(
            [
                r["name"],
                _number(r["search_score"]),
                _number(r["fresh_mean"]),
                interval,
                "" if r["p_against_default"] is None else f"{r['p_against_default']:.3f}",
                r["verdict"],
                ", ".join(f"{k}={_short(v)}" for k, v in r["settings"].items()),
            ]
        )
    print_table(["CONFIGURATION", "IN THE SEARCH", "FRESH SEEDS", "95% INTERVAL", "P", "VERDICT", "SETTINGS"], rows)
    print(f"\nscore:     {result['score']}, mean over tasks; that of the search is the luckiest's: do not report it")
    print(f"trials:    {', '.join(f'{n} {state}' for state, n in result['trials'].items())}")
    better = ", ".join(result["better"]) or f"none, on {p.confirm_seeds} fresh seeds"
    print(f"better:    {better}")
    print(f"configs:   {out}/rank1.yaml ...   (rlctl train --config {out}/rank1.yaml --env ...)")


def _file(study: Path) -> dict[str, Any]:
    import yaml

    from rlctl.errors import UsageError

    try:
        values = yaml.safe_load(study.read_text())
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as e:
        raise UsageError(f"cannot read the study {study}: {' '.join(str(e).split())}") from e
    if not isinstance(values, dict):
        raise UsageError(f"{study} does not hold a mapping with the keys of a study")
    return values


def _scale(text: str) -> tuple[str, list[float]]:
    from rlctl.errors import UsageError

    task, _, bounds = text.rpartition("=")
    try:
        low, high = map(float, bounds.split(":"))
    except ValueError:
        low = high = 0.0
    if not task or not low < high:
        raise UsageError(f"--scale takes TASK=LOW:HIGH, the returns that score 0 and 100; got '{text}'")
    return task, [low, high]


def _number(x: float | None) -> str:
    return "" if x is None else f"{x:.4g}"


def _short(v: object) -> str:
    return f"{v:.4g}" if isinstance(v, float) else str(v)
