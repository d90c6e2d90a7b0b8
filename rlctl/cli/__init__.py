"""The command line. One module per verb; errors are one line on stderr and an exit code.

Exit codes: 0 done, 2 usage, 3 diverged, 75 interrupted and resumable (sysexits' EX_TEMPFAIL), 130 interrupted with
nothing to resume, 1 anything else.
"""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from importlib.metadata import version
from typing import Annotated

import typer

from rlctl.cli import (
    algos,
    bench,
    check,
    compare,
    config,
    data,
    doctor,
    envs,
    evaluate,
    export,
    new,
    plot,
    report,
    resume,
    train,
    tune,
    video,
)
from rlctl.errors import RlctlError


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"rlctl {version('rlctl')}")
        raise typer.Exit


app = typer.Typer(
    name="rlctl",
    help="Train and compare continuous-control reinforcement-learning agents.",
    epilog="Start with:  rlctl train --algo ppo --env Hopper",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.callback()
def rlctl(
    show_version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_print_version)
    ] = False,
) -> None:
    """Train and compare continuous-control reinforcement-learning agents."""


app.command("train")(train.train)
app.command("resume")(resume.resume)
app.command("eval")(evaluate.evaluate)
app.command("bench")(bench.bench)
app.command("report")(report.report)
app.command("compare")(compare.compare)
app.command("plot")(plot.plot)
app.command("tune")(tune.tune)
app.command("export")(export.export)
app.command("video")(video.video)
app.command("algos")(algos.algos)
app.command("envs")(envs.envs)
app.command("config")(config.config)
app.command("doctor")(doctor.doctor)
app.add_typer(data.app)
app.add_typer(check.app)
app.add_typer(new.app)


def main() -> None:
    """Entry point of the `rlctl` command."""
    try:
        code = app(prog_name="rlctl", standalone_mode=False)
        if code == 130:  # the parser caught a KeyboardInterrupt and says nothing
            fail("interrupted", 130)
    except RlctlError as e:
        fail(str(e), e.exit_code)
    except (KeyboardInterrupt, typer.Abort):
        fail("interrupted", 130)
    except MemoryError as e:
        fail(str(e) or "out of memory", 2 if str(e) else 1)
    except ValueError as e:
        # an agent or an environment refuses what it was configured with; anything deeper shows its traceback
        if not _is_refusal(e):
            raise
        fail(str(e), 2)
    except Exception as e:
        message = getattr(e, "format_message", None)  # the parser's own, whichever parser this version of typer has
        if message is None:
            raise
        context = getattr(e, "ctx", None)
        if not message():  # no command at all: the help has been printed
            sys.exit(2)
        where = context.command_path if context else "rlctl"
        fail(f"{message().rstrip('.')}; see `{where} --help`", 2)
    finally:
        # the verdict stands: an interrupt that arrives while the interpreter takes itself down would only print a
        # traceback from some library's exit handler
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def fail(message: str, code: int) -> None:
    """One line on stderr, then exit."""
    print(f"rlctl: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(code)


def _is_refusal(e: ValueError) -> bool:
    """Raised by our own argument checks, not by a library underneath, nor from within an agent at work.

    What an agent's `act` or `update` raises, through whichever of our functions, is a bug that its author has to find.
    """
    frames = [frame for frame, _ in traceback.walk_tb(e.__traceback__)]
    if not frames or any(f.f_code.co_name in ("act", "update") for f in frames):
        return False
    return frames[-1].f_globals.get("__name__", "").split(".")[0] in ("rlctl", "rlctl_envs")
