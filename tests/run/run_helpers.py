"""What the tests of runs share: small settings, interrupting a run in this process, comparing two run folders."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np

from rlctl import experiment
from rlctl.errors import Interrupted
from rlctl.experiment import Settings
from rlctl.run import Run

RUN: dict[str, Any] = {
    "threads": 1,
    "tensorboard": False,
    "eval_episodes": 2,
    "final_episodes": 3,
    "checkpoint_every": 0,
}
WALL_CLOCK = ("time/", "charts/SPS")


def settings(algo: str, env: str | None = None, data: str | Path | None = None, **layers: Any) -> Settings:
    """Settings of a short run: `run=` and `seed=` are sections, everything else belongs to the agent."""
    run = RUN | layers.pop("run", {})
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
    assert left.keys() == right.keys()
    assert [k for k in left if left[k] != right[k]] == []
    assert counters(a) == counters(b)
    assert without_clock(a / "metrics.jsonl") == without_clock(b / "metrics.jsonl")
    assert rows(a / "eval.jsonl") == rows(b / "eval.jsonl")
    for name in ("agent.safetensors", "note.json"):
        best = [f / "checkpoints" / "best" / name for f in (a, b)]
        assert best[0].exists() == best[1].exists()
        assert not best[0].exists() or best[0].read_bytes() == best[1].read_bytes()


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


def hdf5(path: Path, n: int = 400, obs_dim: int = 11, act_dim: int = 3) -> Path:
    """A D4RL-style dataset of Hopper's shapes: noise with the odd ending."""
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as f:
        f["observations"] = rng.normal(size=(n, obs_dim)).astype(np.float32)
        f["next_observations"] = rng.normal(size=(n, obs_dim)).astype(np.float32)
        f["actions"] = rng.uniform(-1, 1, (n, act_dim)).astype(np.float32)
        f["rewards"] = rng.normal(size=n).astype(np.float32)
        f["terminals"] = rng.random(n) < 0.02
        f["timeouts"] = np.arange(1, n + 1) % 100 == 0
    return path


# ------------------------------------------------------------------------------------------------ other processes
def flags(s: Settings) -> list[str]:
    """The settings as a config file would give them, for a command line."""
    plain = s.plain()
    out = ["--algo", s.algo, "--seed", str(s.seed)]
    out += ["--env", s.env] if s.env else []
    out += ["--data", s.data] if s.data else []
    for section in ("agent", "run"):
        out += [x for k, v in plain[section].items() for x in ("--set", f"{section}.{k}={json.dumps(v)}")]
    return out


def launch(*args: str | Path, cwd: Path | None = None) -> subprocess.Popen[str]:
    """`rlctl ARGS` as a process of its own."""
    code = "import sys; from rlctl.cli import main; sys.argv[0] = 'rlctl'; main()"
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=env)


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[str], seconds: float = 60.0) -> None:
    """Poll until `condition` holds; fails with the process's output if it ends or time runs out first."""
    end = time.monotonic() + seconds
    while not condition():
        if process.poll() is not None or time.monotonic() > end:
            process.kill()
            raise AssertionError(f"waited in vain: {process.communicate()}")
        time.sleep(0.005)


def stop(process: subprocess.Popen[str], signum: signal.Signals) -> tuple[int, str, str]:
    """Signal the process; its exit code, stdout and stderr."""
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err
