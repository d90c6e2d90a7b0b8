"""`rlctl resume`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def resume(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run.", metavar="RUN_DIR")],
    steps: Annotated[int | None, typer.Option(min=1, help="New total length of the run.")] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
) -> None:
    """Go on with a run that was interrupted or killed, or train a finished one for longer.

    On the CPU the result is bit for bit that of a run that never stopped: simulator, replay buffer, optimisers and
    random generators are all restored. With a new --steps, schedules that span the run (a decaying learning rate)
    stretch to the new length.
    """
    from rlctl import experiment
    from rlctl.cli.train import summarize

    folder, result = experiment.resume(run_dir, steps, quiet=quiet)
    if not quiet and folder is not None:
        summarize(folder, result is not None)
