"""`rlctl envs`."""

from __future__ import annotations

from typing import Annotated

import typer


def envs(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the tasks with a native engine; any other Gymnasium id with box spaces works too."""
    import rlctl_envs
    from rlctl.cli.output import print_json, print_table

    rows = rlctl_envs.task_table()
    if json_:
        print_json({"tasks": rows})
        return
    keys = ("name", "obs_dim", "act_dim", "episode_len", "engine", "summary")
    print_table(["NAME", "OBS", "ACT", "STEPS", "ENGINE", "WHAT TO DO"], [[r[k] for k in keys] for r in rows])
    print("\nThe dmc: tasks simulate the models of the package dm_control: pip install 'rlctl[dmc]'")
    print("Any other Gymnasium id works through an adapter, e.g. --env Pendulum-v1")
