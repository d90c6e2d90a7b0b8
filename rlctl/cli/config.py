"""`rlctl config`."""

from __future__ import annotations

from typing import Annotated, Any

import typer


def config(
    algo: Annotated[str, typer.Argument(help="A name of `rlctl algos`, or package.module:Class.", metavar="ALGO")],
    env: Annotated[
        str | None, typer.Option(help="Show the values of the packaged config for this task, if there is one.")
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Show every setting of an algorithm: its value and its meaning."""
    from dataclasses import fields

    import rlctl_envs
    from rlctl import agents, experiment
    from rlctl.cli.output import print_json, print_table
    from rlctl.config import as_plain, build, field_docs
    from rlctl.run import RunConfig

    cls = agents.get(algo)
    tuned = experiment.packaged(algo, rlctl_envs.canonical(env)) if env else {}
    sections: list[tuple[str, type[Any], Any]] = [
        ("", cls.Config, build(cls.Config, tuned.get("agent", {}), f"the config of {algo}")),
        ("run.", RunConfig, build(RunConfig, tuned.get("run", {}), "the section run")),
    ]
    rows = []
    for prefix, config_cls, cfg in sections:
        docs, values = field_docs(config_cls), as_plain(cfg)
        default = as_plain(config_cls())
        rows += [
            {
                "key": prefix + f.name,
                "value": values[f.name],
                "default": default[f.name],
                "meaning": docs.get(f.name, ""),
            }
            for f in fields(config_cls)
        ]
    if json_:
        print_json({"algo": algo, "env": env, "packaged": bool(tuned), "settings": rows})
        return
    shown = [[r["key"], _short(r["value"]) + (" *" if r["value"] != r["default"] else ""), r["meaning"]] for r in rows]
    print_table(["SETTING", "VALUE", "MEANING"], shown)
    print("\nChange one: rlctl train --algo", algo, "... --set KEY=VALUE")
    if any(r["value"] != r["default"] for r in rows):
        print(f"* differs from the default: set by the packaged config for {env}")
    elif tuned:
        print(f"The packaged config for {env} takes the defaults.")
    elif env:
        print(
            f"There is no packaged config of {algo} for {env}: these are the defaults, which `rlctl train` takes too."
        )


def _short(value: object) -> str:
    return "none" if value is None else str(value)
