"""One cell in a process of its own: `python -m rlctl.bench.worker`, started by `rlctl.bench.process`.

The first line of stdin is the job; then stdin stays open for as long as somebody wants the result. When it closes (the
driver was killed, the node's daemon is gone) the cell writes a checkpoint and ends, like after SIGTERM: no orphan goes
on computing beside its successor. Exit codes are those of the command line.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

WAIT_FOR_LOCK = 120.0
"""Seconds to wait for a run that a predecessor, now ending, still holds."""
PATIENCE = 60.0
"""Seconds after the driver's end that a cell may take to be able to write a checkpoint."""


def main() -> None:
    """Read the job, carry it out, exit."""
    job = json.loads(_line())
    threading.Thread(target=_end_with_the_driver, daemon=True).start()
    sys.exit(_run(job))


def _run(job: dict[str, Any]) -> int:
    from rlctl import experiment
    from rlctl.errors import RlctlError

    folder = Path(job["folder"])
    try:
        if (folder / "config.yaml").exists():
            _wait_for_lock(folder)
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


def _end_with_the_driver() -> None:
    while os.read(0, 4096):
        pass
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end:
        # a run that has begun listens; one that has been asked already does not, and a second signal would kill it
        if callable(signal.getsignal(signal.SIGTERM)):
            os.kill(os.getpid(), signal.SIGTERM)
            return
        time.sleep(0.05)
    os._exit(75)


def _wait_for_lock(folder: Path) -> None:
    """Until nobody holds the run; the run itself then says so if somebody still does."""
    import fcntl

    end = time.monotonic() + WAIT_FOR_LOCK
    with (folder / ".lock").open("w") as f:
        while time.monotonic() < end:
            try:
                fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return  # closing the file gives it free again
            except OSError:
                time.sleep(0.2)


if __name__ == "__main__":
    main()
