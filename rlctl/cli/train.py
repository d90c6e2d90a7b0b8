"""`rlctl train`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

Algo = Annotated[
    str | None, typer.Option(help="Algorithm: a name of `rlctl algos`, or package.module:Class for one of your own.")
]
Env = Annotated[
    str | None,
    typer.Option(
        help="Task: Hopper (means Hopper-v5), dmc:hopper-stand, probe:NAME, any Gymnasium id. See `rlctl envs`."
    ),
]
Data = Annotated[
    str | None,
    typer.Option(
        help="Dataset of an offline learner: a local Minari id, a D4RL id, or the path of an .hdf5 or .npz file."
    ),
]
Set = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Override a setting, e.g. lr=1e-3, run.keep=5, data_options.view=d4rl_compat.",
    ),
]


def train(
    algo: Algo = None,
    env: Env = None,
    data: Data = None,
    steps: Annotated[
        int | None, typer.Option(min=1, help="Length of the run: environment steps, or gradient steps offline.")
    ] = None,
    offline_updates: Annotated[
        int | None,
        typer.Option(
            min=0,
            help="Of an offline learner that goes on in an environment: gradient steps on the data alone, "
            "before --steps environment steps.",
        ),
    ] = None,
    num_envs: Annotated[int | None, typer.Option(min=1, help="Worlds simulated side by side.")] = None,
    seed: Annotated[int | None, typer.Option(min=0, help="Root of every random stream of the run.")] = None,
    device: Annotated[str | None, typer.Option(help="auto, cpu, cuda or cuda:N.")] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="YAML file of settings, e.g. the config.yaml of another run.", show_default=False),
    ] = None,
    set_: Set = None,
    out: Annotated[
        Path | None, typer.Option(help="Run directory; the default is runs/ALGO/TASK/sSEED-CONFIGHASH.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Train an agent, evaluate it, and leave everything in a run directory.

    Settings come from, weakest first: the algorithm's defaults, the tuned config shipped for the task, --config, --set,
    and the other options. `rlctl config ALGO` lists every setting with its meaning.

    Ctrl-C (or SIGTERM) writes a checkpoint and exits with 75; `rlctl resume RUN_DIR` goes on as if nothing had
    happened.

    [bold]Examples[/bold]

      rlctl train --algo ppo --env Hopper

      rlctl train --algo sac --env HalfCheetah --steps 200000 --seed 1 --set batch_size=128

      rlctl train --algo td3bc --data mujoco/hopper/medium-v0

      rlctl train --algo iql --data mujoco/hopper/medium-v0 --env Hopper --offline-updates 100000 --steps 50000

      rlctl train --algo my_pkg.my_file:MyAgent --env Pendulum-v1
    """
    from rlctl import experiment  # torch takes a second to import: --help must not wait for it
    from rlctl.config import parse_overrides

    flags: dict[str, Any] = {"algo": algo, "env": env, "data": data, "seed": seed, "device": device}
    flags = {k: v for k, v in flags.items() if v is not None}
    sizes = {"steps": steps, "num_envs": num_envs, "offline_updates": offline_updates}
    flags["agent"] = {k: v for k, v in sizes.items() if v is not None}
    layers = [experiment.load_yaml(config)] if config is not None else []
    settings = experiment.resolve(algo, [*layers, parse_overrides(set_ or []), flags])
    folder, result = experiment.train(settings, out, quiet=quiet)
    if not quiet:
        summarize(folder, result is not None)


def summarize(folder: Path, evaluated: bool) -> None:
    """What came out and where it lies."""
    from rlctl import agents
    from rlctl.data.reference import score_text

    record = json.loads((folder / "run.json").read_text())
    if evaluated:
        final = record["final"]
        score = final["normalized_score"]
        normalized = "" if score is None else f", {score_text(record['eval_env'], score)}"
        print(
            f"final evaluation: {final['return_mean']:.1f} ± {final['return_std']:.1f} "
            f"over {final['episodes']} episodes (deterministic actions{normalized})"
        )
    print(f"run directory:    {folder}")
    print(f"learning curves:  tensorboard --logdir {folder}   (numbers: metrics.jsonl, eval.jsonl)")
    print(f"evaluate again:   rlctl eval {folder}")
    if not agents.get(record["algo"]).one_length:
        print(f"train on:         rlctl resume {folder} --steps N")
