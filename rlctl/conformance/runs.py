"""Interrupting a run within this process, and comparing two run folders bit for bit."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlctl import experiment
from rlctl.conformance.results import expect
from rlctl.errors import Interrupted
from rlctl.experiment import Settings
from rlctl.run import Run

QUICK_RUN: dict[str, Any] = {
    "threads": 1,
    "tensorboard": False,
    "eval_episodes": 2,
    "final_episodes": 3,
    "checkpoint_every": 0,
}
WALL_CLOCK = ("time/", "charts/SPS")


def settings(algo: str, env: str | None = None, data: str | Path | None = None, **layers: Any) -> Settings:
    """Settings of a short run: `run=` and `seed=` are sections, everything else belongs to the agent."""
    run = QUICK_RUN | layers.pop("run", {})
    layer = {"env": env, "data": None if data is None else str(data), "run": run, "seed": layers.pop("seed", 3)}
    return experiment.resolve(algo, [{k: v for k, v in layer.items() if v is not None}, {"agent": layers}])


def rows(file: Path) -> list[dict[str, Any]]:
    """A JSONL file."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def without_clock(file: Path) -> list[dict[str, Any]]:
    """Its rows less what measures wall-clock time."""
    return [{k: v for k, v in row.items() if not k.startswith(WALL_CLOCK)} for row in rows(file)]


def final_state(folder: Path) -> dict[str, str]:
    """Digest of every file of the newest checkpoint, manifest aside."""
    root = folder / "checkpoints"
    newest = root / (root / "latest").read_text().strip()
    files = [p for p in newest.rglob("*") if p.is_file() and p.name != "manifest.json"]
    return {p.relative_to(newest).as_posix(): hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def counters(folder: Path) -> dict[str, Any]:
    """What the newest manifest says, less wall-clock times, file sizes and hashes."""
    root = folder / "checkpoints"
    manifest = json.loads((root / (root / "latest").read_text().strip() / "manifest.json").read_text())
    state = {k: v for k, v in manifest["state"].items() if k not in ("spent", "interval", "offsets")}
    state["marks"].pop("checkpoint")  # how often one was written makes no difference
    return {"state": state, "counters": manifest["counters"], "optim": manifest["optim"]}


def assert_same(a: Path, b: Path) -> None:
    """Two finished runs are one: parameters, optimisers, buffers, simulator, logs, evaluations."""
    left, right = final_state(a), final_state(b)
    expect(left.keys() == right.keys(), f"the checkpoints hold other files: {sorted(left.keys() ^ right.keys())}")
    differ = [k for k in left if left[k] != right[k]]
    expect(not differ, f"files of the last checkpoint differ: {', '.join(differ)}")
    expect(counters(a) == counters(b), "counters or optimiser settings of the last checkpoint differ")
    expect(without_clock(a / "metrics.jsonl") == without_clock(b / "metrics.jsonl"), "rows of metrics.jsonl differ")
    expect(rows(a / "eval.jsonl") == rows(b / "eval.jsonl"), "rows of eval.jsonl differ")
    for name in ("agent.safetensors", "note.json"):
        best = [f / "checkpoints" / "best" / name for f in (a, b)]
        same = best[0].exists() == best[1].exists()
        expect(same and (not best[0].exists() or best[0].read_bytes() == best[1].read_bytes()), f"best/{name} differs")


@contextmanager
def stop_after(calls: int, method: str = "tick") -> Iterator[None]:
    """Within the block every run meets a stop request just before the `calls`-th call of `method`, once."""
    original = getattr(Run, method)
    count = 0

    def wrapped(self: Run, *args: Any, **kwargs: Any) -> Any:
        nonlocal count
        count += 1
        if count == calls:
            self._stop = True
        return original(self, *args, **kwargs)

    setattr(Run, method, wrapped)
    try:
        yield
    finally:
        setattr(Run, method, original)


def interrupted(start: Callable[[], Any], ticks: int, method: str = "tick") -> bool:
    """Run `start` with a stop request after `ticks` calls; whether it came in time."""
    with stop_after(ticks, method):
        try:
            start()
        except Interrupted:
            return True
    return False


def train_in_pieces(s: Settings, folder: Path, pieces: Sequence[int]) -> int:
    """Train, stopping after each number of ticks and resuming; returns how often it was interrupted."""
    n = int(interrupted(lambda: experiment.train(s, folder, quiet=True), pieces[0]))
    for ticks in pieces[1:]:
        n += interrupted(lambda: experiment.resume(folder, quiet=True), ticks)
    if experiment.read_json(folder / "run.json")["status"] != "done":
        experiment.resume(folder, quiet=True)
    return n
