"""What the tests of runs share: small runs interrupted and compared (`rlctl.conformance.runs`), other processes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np

from rlctl.conformance.runs import (
    assert_same,
    final_state,
    interrupted,
    rows,
    settings,
    train_in_pieces,
    without_clock,
)
from rlctl.experiment import Settings

__all__ = [
    "assert_same",
    "final_state",
    "flags",
    "hdf5",
    "interrupted",
    "launch",
    "rows",
    "settings",
    "stop",
    "train_in_pieces",
    "wait_for",
    "without_clock",
]


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
