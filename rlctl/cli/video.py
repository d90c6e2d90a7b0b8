"""`rlctl video`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Checkpoint = Annotated[
    str, typer.Option(metavar="WHICH", help="latest, best (of the evaluations in training), or the STEP of one.")
]


def video(
    run_dir: Annotated[Path, typer.Argument(help="The directory of the run.", metavar="RUN_DIR")],
    out: Annotated[
        Path | None,
        typer.Option(help="File to write, .mp4 or .gif; the default is RUN_DIR/videos/CHECKPOINT-sSEED.mp4."),
    ] = None,
    checkpoint: Checkpoint = "latest",
    episodes: Annotated[int, typer.Option(min=1, help="Episodes to film, one after the other.")] = 1,
    steps: Annotated[int | None, typer.Option(min=1, help="Film at most so many steps of each episode.")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Seed of the first episode; the next ones count on.")] = 0,
    size: Annotated[tuple[int, int], typer.Option(metavar="W H", help="Of the picture, in pixels.")] = (480, 480),
    stochastic: Annotated[
        bool, typer.Option("--stochastic", help="Sample actions instead of taking the deterministic one.")
    ] = False,
    backend: Annotated[
        str | None, typer.Option(help="egl, osmesa or glfw. Default: MUJOCO_GL, or the first that works.")
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", help="Print nothing but errors.")] = False,
    json_: Annotated[bool, typer.Option("--json", help="One JSON object on stdout.")] = False,
) -> None:
    r"""Film a trained agent, in real time, on a machine with or without a screen.

    Which OpenGL backend works is found out by trying each in a process of its own. The pictures are looked at: if they
    are of one colour, or nothing moves, that is an error and no file is left. An .mp4 needs
    pip install 'rlctl\[video]'.

    [bold]Examples[/bold]

      rlctl video runs/sac/Hopper-v5/s0-0123abcd

      rlctl video RUN_DIR --checkpoint best --episodes 3 --out hopper.gif --size 320 240
    """
    from rlctl.cli.output import print_json
    from rlctl.errors import UsageError
    from rlctl.video import film

    if not (run_dir / "config.yaml").exists():
        raise UsageError(f"{run_dir} is not a run directory: it has no config.yaml")
    if min(size) < 16 or max(size) > 4096:
        raise UsageError(f"--size {size[0]} {size[1]}: width and height are 16 to 4096 pixels")
    target = out or run_dir / "videos" / f"{checkpoint}-s{seed}.mp4"
    result = film(
        run_dir,
        backend=backend,
        out=target,
        checkpoint=checkpoint,
        episodes=episodes,
        steps=steps,
        seed=seed,
        size=list(size),
        stochastic=stochastic,
        quiet=quiet or json_,
    )
    if json_:
        print_json(result)
    elif not quiet:
        seconds = result["pictures"] / result["fps"]
        returns = ", ".join(f"{r:.1f}" for r in result["returns"])
        print(f"video:     {result['file']} ({seconds:.1f} s, drawn by {result['backend']})")
        print(f"episodes:  return {returns} in {', '.join(map(str, result['lengths']))} steps")
