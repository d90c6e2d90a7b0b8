"""One cell in a process of its own: `python -m rlctl.bench.worker`, started by `rlctl.bench.process`.

The first line of stdin is the job; then stdin stays open for as long as somebody wants the result. When it closes (the
driver was killed, the node's daemon is gone) the cell writes a checkpoint and ends, like after SIGTERM: no orphan goes
on computing beside its successor. Exit codes are those of the command line.

A cell that hangs ends itself: where metrics, evaluations and checkpoints stay as they are for `stall` seconds, Python's
faulthandler, which needs no cooperation of the hanging code, writes every thread's stack to the log and exits with 1.
"""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from rlctl.bench.process import GRACE
from rlctl.errors import Interrupted

WAIT_FOR_LOCK = 120.0
"""Seconds to wait for a run that a predecessor, now ending, still holds."""
PATIENCE = 60.0
"""Seconds after the driver's end that a cell may take to be able to write a checkpoint."""


def main() -> None:
    """Read the job, carry it out, exit."""
    job = json.loads(_line())
    sys.argv = job["command"]  # provenance is that of whoever asked
    guard = Guard(Path(job["folder"]), job["stall"])
    threading.Thread(target=_end_with_the_driver, args=(guard,), daemon=True).start()
    threading.Thread(target=guard.watch, daemon=True).start()
    sys.exit(_run(job))


class Guard:
    """Ends this process, its stacks in the log, when the run in `folder` shows no sign of life for `stall` seconds.

    The clock is faulthandler's own thread, which runs while others hold the interpreter; only putting it off needs
    Python to be alive. `stall` 0 leaves it off.
    """

    def __init__(self, folder: Path, stall: float) -> None:
        self.folder, self.stall = folder, stall
        self._ending = False
        self._lock = threading.Lock()
        self._arm(stall)

    def watch(self) -> None:
        """Put the end off whenever something has changed; for a thread of its own."""
        seen: object = None
        while self.stall > 0 and not self._ending:
            time.sleep(min(self.stall / 10, 5.0))
            if (now := self._signs()) != seen:
                seen = now
                with self._lock:
                    if not self._ending:
                        self._arm(self.stall)

    def last_chance(self, seconds: float) -> None:
        """The run was asked to end: it has so long, whatever it does."""
        with self._lock:
            self._ending = True
            self._arm(seconds)

    def _arm(self, seconds: float) -> None:
        if seconds > 0:
            faulthandler.dump_traceback_later(seconds, exit=True)

    def _signs(self) -> list[tuple[str, int, int]]:
        """Name, size and time of what a run adds to as it goes."""
        out = []
        checkpoints = self.folder / "checkpoints"
        for file in [self.folder / "metrics.jsonl", self.folder / "eval.jsonl", checkpoints, checkpoints / "latest"]:
            try:
                found = file.stat()
            except OSError:
                continue
            out.append((file.name, found.st_size, found.st_mtime_ns))
        return out


def _run(job: dict[str, Any]) -> int:
    from rlctl import experiment
    from rlctl.errors import RlctlError

    folder = Path(job["folder"])
    try:
        if (folder / "config.yaml").exists():
            if not _wait_for_lock(folder):
                print(f"rlctl: {folder} is still held by another process: to be tried again later", file=sys.stderr)
                return Interrupted.exit_code
            if experiment.read_json(folder / "run.json").get("status") == "done":
                return 0  # the predecessor came to its end after all
            experiment.resume(folder, note=job["note"])
        else:
            experiment.train(experiment.resolve(None, [job["config"]]), folder, note=job["note"])
    except RlctlError as e:
        print(f"rlctl: {e}", file=sys.stderr)
        return e.exit_code
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def _line() -> bytes:
    """The first line of stdin, and not a byte more."""
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(0, 1)
        if not byte:
            sys.exit(75)  # the driver has gone before it said what to do
        line += byte
    return bytes(line)


def _end_with_the_driver(guard: Guard) -> None:
    while os.read(0, 4096):
        pass
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        # a run that has begun listens; one that has been asked already does not, and a second signal would kill it
        if callable(signal.getsignal(signal.SIGTERM)):
            guard.last_chance(GRACE)
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.05)
    os._exit(75)


def _wait_for_lock(folder: Path) -> bool:
    """Until nobody holds the run, `WAIT_FOR_LOCK` seconds at most; whether it is free."""
    import fcntl

    end = time.monotonic() + WAIT_FOR_LOCK
    with (folder / ".lock").open("w") as f:
        while time.monotonic() < end:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return True  # closing the file gives it free again
            except OSError:
                time.sleep(0.2)
    return False


if __name__ == "__main__":
    main()
