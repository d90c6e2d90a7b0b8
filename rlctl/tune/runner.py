"""Where the runs of a study happen. `Runner` is all that a study knows of it; `LocalRunner` starts processes here."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Protocol

GRACE = 60.0
"""Seconds a run has to write its checkpoint when it is asked to end."""


@dataclass(frozen=True)
class Cell:
    """One run of `rlctl train`."""

    folder: Path
    """Its run directory. A run that was interrupted there is resumed."""
    args: tuple[str, ...]
    """What `rlctl train` is given, less --out."""
    log: Path
    """Where its output goes."""

    def command(self) -> list[str]:
        """The `rlctl` command that begins the run, or goes on with it."""
        if (self.folder / "config.yaml").exists():
            return ["resume", str(self.folder), "--quiet"]
        return ["train", *self.args, "--out", str(self.folder), "--quiet"]


class Handle(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """Its exit code, None while it runs; returns at once."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; `poll` then gives 75."""


class Runner(Protocol):
    """Starts runs."""

    slots: int
    """Runs it carries out at a time."""

    def submit(self, cell: Cell) -> Handle:
        """Begin a run, or go on with it; called with fewer than `slots` under way."""

    def close(self) -> None:
        """Ask what still runs to end, and kill what does not."""


class LocalRunner:
    """One process per run on this machine, with one thread each."""

    def __init__(self, slots: int = 1) -> None:
        self.slots = slots
        self._running: list[_Process] = []

    def submit(self, cell: Cell) -> Handle:
        """Start the process."""
        self._running = [p for p in self._running if p.poll() is None]
        process = _Process(cell)
        self._running.append(process)
        return process

    def close(self) -> None:
        """SIGTERM to all, SIGKILL to those who have not ended after `GRACE` seconds."""
        for p in self._running:
            p.stop()
        for p in self._running:
            p.wait()


# A run must not outlive its study: another one would find its directory locked. (Linux; elsewhere it goes on and the
# next study is told so by the lock.)
_CHILD = """
import ctypes, os, signal, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if os.getppid() != int(sys.argv[1]):
        sys.exit(75)
sys.argv = ["rlctl", *sys.argv[2:]]
from rlctl.cli import main
main()
"""


class _Process:
    def __init__(self, cell: Cell) -> None:
        cell.log.parent.mkdir(parents=True, exist_ok=True)
        with cell.log.open("ab") as log:
            self.process = _start(cell.command(), log)

    def poll(self) -> int | None:
        return self.process.poll()

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)

    def wait(self) -> None:
        try:
            self.process.wait(GRACE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _start(command: Sequence[str], log: IO[bytes]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [sys.executable, "-c", _CHILD, str(os.getpid()), *command],
        stdin=subprocess.DEVNULL,
        stdout=log,
        stderr=log,
        env={**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
        start_new_session=True,  # Ctrl-C is the study's, which then asks each run once
    )
