"""`rlctl check`: algo, env, dataset."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from rlctl.conformance import Result

app = typer.Typer(
    name="check",
    help="Check that an algorithm, an environment or a dataset keeps what the rest of rlctl builds on.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)

Only = Annotated[list[str] | None, typer.Option("--only", metavar="CHECK", help="Just this check; may be repeated.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")]
Set = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Keyword argument of the environment.")
]


@app.command("algo")
def algo(
    name: Annotated[
        str,
        typer.Argument(metavar="NAME", help="A name of `rlctl algos`, or package.module:Class for one of your own."),
    ],
    only: Only = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Setting with which it solves the probe environments."),
    ] = None,
    json_: Json = False,
) -> None:
    """Check an algorithm: one line per check, exit code 1 if one fails.

    It must solve the probe environments, whose values are known, resume a run bit for bit, read no tensor on the host
    in its update, be saved and loaded, act reproducibly, keep truncations apart from terminations, and refuse bad
    settings. Takes some ten seconds to a minute. The project's own algorithms are tested by the same checks.

    An algorithm that needs other settings than the usual ones to solve the probes says so on its class:
    conformance = rlctl.conformance.Traits(solve={"steps": 3000}).

    [bold]Examples[/bold]

      rlctl check algo sac

      rlctl check algo my_pkg.my_file:MyAgent --set critic_lr=1e-3

      rlctl check algo my_pkg.my_file:MyAgent --only save-load --only exact-resume
    """
    from rlctl import agents
    from rlctl.config import parse_overrides
    from rlctl.conformance import check_algo
    from rlctl.errors import UsageError

    if name in agents.BASELINES:
        raise UsageError(
            f"{name} is a learner of another library behind our interface: the checks look into what ours are made of "
            "(losses, optimisers, random streams) and say nothing about it; `rlctl algos` lists those they are for"
        )
    agents.get(name)  # no such algorithm: a usage error, not a failed check
    _report("algo", name, check_algo(name, only or [], solve=parse_overrides(set_ or [])), json_)


@app.command("env")
def env(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Anything `rlctl train --env` takes.")],
    only: Only = None,
    set_: Set = None,
    json_: Json = False,
) -> None:
    """Check an environment: one line per check, exit code 1 if one fails.

    Spaces and shapes, same-step autoreset, true final observations, time limits, determinism by the seed, state() and
    set_state(), actions that are out of range or broken.

    [bold]Examples[/bold]

      rlctl check env Hopper

      rlctl check env Pendulum-v1

      rlctl check env my_env --set difficulty=2
    """
    import rlctl_envs
    from rlctl.config import parse_overrides
    from rlctl.conformance import check_env

    rlctl_envs.canonical(name)
    _report("env", name, check_env(name, only or [], options=parse_overrides(set_ or [])), json_)


@app.command("dataset")
def dataset(
    name: Annotated[
        str, typer.Argument(metavar="DATASET", help="A local Minari id or folder, a D4RL id, or an .hdf5 or .npz file.")
    ],
    only: Only = None,
    episode_len: Annotated[
        int | None, typer.Option(min=1, help="Step limit of the task, for a flat file that does not tell.")
    ] = None,
    reward_range: Annotated[
        tuple[float, float] | None, typer.Option(metavar="LOW HIGH", help="Bounds every reward must keep.")
    ] = None,
    json_: Json = False,
) -> None:
    """Check a dataset: one line per check, exit code 1 if one fails. What `rlctl data verify` looks for, and sampling.

    [bold]Examples[/bold]

      rlctl check dataset mujoco/hopper/medium-v0

      rlctl check dataset my_robot.npz --episode-len 500
    """
    from rlctl.conformance import check_dataset

    results = check_dataset(name, only or [], episode_len=episode_len, reward_range=reward_range)
    _report("dataset", name, results, json_)


def _report(kind: str, name: str, results: Iterable[Result], json_: bool) -> None:
    """Print each result as it comes, then how many; exit code 1 if one failed."""
    from dataclasses import asdict

    from rich.console import Console
    from rich.text import Text

    from rlctl.cli.output import print_json

    console = Console(highlight=False, soft_wrap=True)
    found = []
    with console.status("", spinner="dots") as status:
        for result in results:
            found.append(result)
            status.update(f"{len(found)} checked")
            if not json_:
                color = {"pass": "green", "fail": "bold red", "skip": "yellow"}[result.status]
                line = Text(result.line())
                line.stylize(color, 0, 4)
                console.print(line)
    count = {s: sum(r.status == s for r in found) for s in ("pass", "fail", "skip")}
    if json_:
        print_json({kind: name, "ok": not count["fail"], **count, "checks": [asdict(r) for r in found]})
    else:
        failed = ", ".join(r.check for r in found if not r.ok)
        print(f"\n{name}: {count['pass']} passed, {count['fail']} failed, {count['skip']} not applicable", end="")
        print(f" ({failed})" if failed else "")
    if count["fail"]:
        raise typer.Exit(1)
