"""A cell as a child process: what every executor does in the end, here or on another machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

GRACE = 60.0
"""Seconds a cell has to write its checkpoint when it is asked to end; then it is killed."""
STALL = 30 * 60.0
"""Seconds without a sign of life after which a cell is taken to hang, if nothing is said."""
THREAD_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")


def _command() -> list[str]:
    from rlctl.provenance import command  # not at the top: a worker, which has no use for it, shall guard itself first

    return command()


@dataclass(frozen=True)
class Job:
    """What a worker needs to know; plain values, so that it travels."""

    id: str
    folder: str
    """The run directory, absolute, on a file system that driver and worker share."""
    config: dict[str, Any]
    """Its settings, as a layer of `rlctl.experiment.resolve`."""
    log: str
    """Where stdout and stderr of this attempt go."""
    threads: int = 1
    stall: float = STALL
    """Seconds without a new metric row, evaluation or checkpoint after which it is taken to hang; 0: never."""
    note: dict[str, Any] = field(default_factory=dict)
    """Goes into run.json."""
    command: list[str] = field(default_factory=_command)
    """That asked for it: what run.json names, since nobody types that of a worker."""
    cwd: str = field(default_factory=os.getcwd)
    """Where `package.module:Class` of a user is found."""


class CellProcess:
    """A running cell. `env` and `cores` are the slot's: variables to set, CPU cores to stay on."""

    def __init__(self, job: Job, env: dict[str, str] | None = None, cores: Sequence[int] = ()) -> None:
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        variables = {**os.environ, **dict.fromkeys(THREAD_VARIABLES, str(job.threads)), **(env or {})}
        with Path(job.log).open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlctl.bench.worker"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env=variables,
                cwd=job.cwd,
                start_new_session=True,  # Ctrl-C is the driver's, which then asks each cell once
            )
        if cores and hasattr(os, "sched_setaffinity"):
            os.sched_setaffinity(self.process.pid, cores)  # before it has imported anything that starts threads
        self._kill_at: float | None = None
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(asdict(job)).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it is dead already; its exit code will tell

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs. Kills one that has not ended when asked to."""
        code = self.process.poll()
        if code is None and self._kill_at is not None and time.monotonic() > self._kill_at:
            self.process.kill()
        return code

    def ask_to_end(self) -> None:
        """SIGTERM: checkpoint, then exit, within `GRACE` seconds. Asking again changes nothing."""
        if self._kill_at is None and self.process.poll() is None:
            self._kill_at = time.monotonic() + GRACE
            self.process.send_signal(signal.SIGTERM)

    def watch(self) -> int:
        """The exit code, once it is there; a signal handler of this process may call `ask_to_end` meanwhile."""
        while (code := self.poll()) is None:
            time.sleep(0.1)  # not process.wait(): it would hold the lock that the handler's wait needs
        return code

    def wait(self, seconds: float) -> int:
        """The exit code; after `seconds` the process is killed."""
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
            return self.process.wait()

    def close(self) -> None:
        """Let go of stdin."""
        if self.process.stdin is not None:
            self.process.stdin.close()


def run_to_end(job: Job, env: dict[str, str] | None = None) -> int:
    """Carry a job out from start to end and return its exit code.

    If this process is asked to end meanwhile (KeyboardInterrupt, SystemExit), the cell first writes its checkpoint.
    """
    cell = CellProcess(job, env)
    try:
        return cell.watch()
    finally:
        cell.ask_to_end()
        cell.wait(GRACE)
        cell.close()
