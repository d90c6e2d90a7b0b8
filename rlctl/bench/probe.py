"""Measure what a cell costs by running its beginning: `python -m rlctl.bench.probe`, one process per cell.

The process reads {"config", "seconds"} from stdin, trains without evaluations in a folder that it throws away, stops
when it has learned for that long, and prints {"steps_per_second"}.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rlctl.bench.cost import Speed, Speeds
from rlctl.bench.suite import Cell
from rlctl.config import merge

SECONDS = 6.0
"""Of learning, per cell."""
PATIENCE = 120.0
"""Seconds until a probe that has not come to learning is given up."""
QUIET = {"eval_every": 0, "final_episodes": 0, "checkpoint_every": 0, "tensorboard": False, "log_every": 20}


def probe(
    cells: Sequence[Cell], speeds: Speeds, *, seconds: float = SECONDS, say: Callable[[str], None] = lambda line: None
) -> list[str]:
    """Measure one cell for each pair of column and source that `speeds` knows nothing of, and tell it.

    Returns a line for each that could not be measured. Evaluations are left out of these speeds.
    """
    failed = []
    todo: dict[str, Cell] = {}
    for c in cells:
        if speeds.of(c, elsewhere=False) is None:
            todo.setdefault(c.settings.key(), c)
    for k, (key, cell) in enumerate(todo.items(), 1):
        say(f"measuring {k} of {len(todo)}: {cell.column} on {cell.source}")
        job = json.dumps({"config": _config(cell), "seconds": seconds})
        done = subprocess.run(
            [sys.executable, "-m", "rlctl.bench.probe"], input=job, capture_output=True, text=True, check=False
        )
        if done.returncode:
            why = (done.stderr.strip().splitlines() or ["no word"])[-1]
            failed.append(f"{cell.column} on {cell.source} could not be measured: {why}")
        else:
            speeds.add(key, Speed(json.loads(done.stdout)["steps_per_second"], 0, True))
    return failed


def _config(cell: Cell) -> dict[str, Any]:
    """The cell's settings, less what does not belong to learning; random warm-up is cut to a few batches."""
    config = merge(cell.settings.plain(), {"run": QUIET})
    agent = config["agent"]
    if agent.get("learning_starts") and agent.get("batch_size"):
        agent["learning_starts"] = min(agent["learning_starts"], 4 * agent["batch_size"])
    return config


def measure(config: dict[str, Any], seconds: float) -> float:
    """Steps per second of the run `config`, after its first log rows, while it learns for `seconds`."""
    from rlctl import experiment
    from rlctl.errors import Interrupted

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "run"
        watch = threading.Thread(target=_stop_after, args=(folder / "metrics.jsonl", seconds), daemon=True)
        watch.start()
        with contextlib.suppress(Interrupted):
            experiment.train(experiment.resolve(None, [config]), folder, quiet=True)
        rows = _rows(folder / "metrics.jsonl")
    made = [(max(r["env_steps"], r["updates"]), r["time/collect_s"] + r["time/learn_s"]) for r in rows if r["updates"]]
    if not made:
        raise SystemExit(f"no update within {PATIENCE:.0f} s")
    # the first updates allocate, compile and warm up: from the second row on, if there is more than one
    start = made[0] if len(made) > 1 else (0, 0.0)
    return (made[-1][0] - start[0]) / max(made[-1][1] - start[1], 1e-9)


def _rows(file: Path) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]


def _stop_after(file: Path, seconds: float) -> None:
    """SIGTERM to this process when it has been learning for `seconds`, or after PATIENCE without an update."""
    begun = time.monotonic()
    learning: float | None = None
    while True:
        time.sleep(0.1)
        now = time.monotonic()
        if learning is None and any(r["updates"] for r in _rows(file)):
            learning = now
        if (now - learning > seconds) if learning is not None else (now - begun > PATIENCE):
            os.kill(os.getpid(), signal.SIGTERM)
            return


if __name__ == "__main__":
    asked = json.loads(sys.stdin.read())
    print(json.dumps({"steps_per_second": measure(asked["config"], asked["seconds"])}))
