"""`rlctl compare`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer


def compare(
    a: Annotated[Path, typer.Argument(help="A run directory, or a folder of runs of one algorithm.", metavar="RUN_A")],
    b: Annotated[Path, typer.Argument(help="The same for what may be better.", metavar="RUN_B")],
    seed: Annotated[int, typer.Option(min=0, help="Seed of the bootstrap.")] = 0,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    """Say whether B is better than A, and on which tasks.

    "Better" takes 5 seeds of either on a task, a probability of improvement whose 95% interval excludes one half, and a
    permutation test with p < 0.05 (Holm-corrected over the tasks). With fewer seeds the numbers are shown without a
    verdict.

    [bold]Examples[/bold]

      rlctl compare runs/ppo/Hopper-v5 runs/trpo/Hopper-v5

      rlctl compare runs/baseline runs/mine --json
    """
    from rlctl.cli.output import busy, print_json
    from rlctl.report.comparison import compare as answer

    with busy("comparing"):
        found = answer(a, b, seed=seed)
    if json_:
        print_json(found)
        return
    _show(found)


def _show(found: dict[str, Any]) -> None:
    from rlctl.cli.output import print_table
    from rlctl.report.tables import number

    a, b = found["a"], found["b"]
    for letter, x in (("A", a), ("B", b)):
        print(f"{letter}: {x['column']}, {x['runs']} run{'s' * (x['runs'] != 1)} in {x['path']}")
    if found["settings"]:
        print(
            "settings that differ, A -> B: " + ", ".join(f"{k}={x} -> {y}" for k, (x, y) in found["settings"].items())
        )
    print()

    def side(x: dict[str, Any] | None) -> str:
        if x is None:
            return "no score"
        interval = "" if x["low"] is None else f" [{number(x['low'])}, {number(x['high'])}]"
        return f"{number(x['mean'])}{interval} ({x['seeds']} seed{'s' * (x['seeds'] != 1)})"

    rows = []
    for t in found["tasks"]:
        both = t["a"] is not None and t["b"] is not None
        change = number(t["b"]["mean"] - t["a"]["mean"]) if both else ""
        change = f"+{change}" if both and t["b"]["mean"] > t["a"]["mean"] else change
        chance = t["probability_b_beats_a"]
        rows.append(
            [
                t["task"],
                side(t["a"]),
                side(t["b"]),
                change,
                "" if chance is None else f"{chance['value']:.2f} [{chance['low']:.2f}, {chance['high']:.2f}]",
                "" if t["p_holm"] is None else f"{t['p_holm']:.2g}",
                t["verdict"],
            ]
        )
    print_table(["TASK", "A: RETURN", "B: RETURN", "B − A", "P(B BEATS A)", "P-VALUE", "IS B BETTER?"], rows)
    print(f"\n{found['answer']}")
    for line in found["warnings"]:
        print(f"warning: {line}")
