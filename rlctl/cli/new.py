"""`rlctl new`: algo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    name="new",
    help="Write a package of your own to start from.",
    no_args_is_help=True,
    rich_markup_mode="rich",
)


@app.callback()
def new() -> None:
    """Write a package of your own to start from."""


@app.command("algo")
def algo(
    name: Annotated[str, typer.Argument(metavar="NAME", help="Lower-case letters, digits and dashes, e.g. my-algo.")],
    regime: Annotated[
        str, typer.Option(help="What it learns from: on_policy (rollouts), off_policy (replay) or offline (a dataset).")
    ] = "off_policy",
    out: Annotated[Path, typer.Option(help="Folder to write the package's folder into.")] = Path(),
) -> None:
    """Write an installable package with one algorithm: its file, a config, a test and the entry point.

    What is written works: it passes `rlctl check algo`, trains, and is found by name once installed. Make it yours.

    [bold]Examples[/bold]

      rlctl new algo my-algo

      rlctl new algo my-offline-algo --regime offline --out ~/src
    """
    from typing import cast

    from rlctl.templates import TUNED, write_algo
    from rlctl.types import Regime

    folder = write_algo(name, cast(Regime, regime.replace("-", "_")), out)
    print(f"written:   {folder}")
    for file in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"           {file.relative_to(folder)}")
    print(f"install:   pip install -e {folder}")
    print(f"check:     rlctl check algo {name}")
    how = TUNED[cast(Regime, regime.replace("-", "_"))][1].replace("configs/", f"{folder}/configs/")
    print(f"train:     {how}")
