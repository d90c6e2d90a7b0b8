"""`rlctl algos`."""

from __future__ import annotations

from typing import Annotated

import typer


def algos(
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """List the algorithms, what they learn from, and their papers."""
    from rlctl import agents
    from rlctl.cli.output import print_json, print_table

    rows = []
    for name in [*agents.names(), *agents.BASELINES]:
        entry = agents.ENTRIES.get(name) or agents.BASELINES.get(name)
        cls = agents.get(name)
        summary = entry.summary if entry else (cls.__doc__ or "").strip().partition("\n")[0]
        rows.append({"name": name, "regime": cls.regime, "summary": summary, "paper": entry.paper if entry else None})
    if json_:
        print_json({"algorithms": rows})
        return
    print_table(["NAME", "LEARNS", "WHAT IT IS", "PAPER"], [list(r.values()) for r in rows])
    print("\nSettings of one: rlctl config NAME.   One of your own: rlctl train --algo package.module:Class")
