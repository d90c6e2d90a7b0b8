"""The command line in this process: what it printed, and its exit code."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from rlctl.cli import main

QUICK = ["run.threads=1", "run.tensorboard=false", "run.eval_episodes=2", "run.final_episodes=2"]
PPO = ["num_envs=2", "horizon=10", "minibatch_size=20", "epochs=1", "hidden=[8, 8]"]
SAC = ["learning_starts=20", "batch_size=8", "hidden=[8, 8]", "buffer_size=1000"]


class Result(NamedTuple):
    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        """stdout, which must be exactly one JSON object on one line."""
        assert self.code == 0, self.err
        assert self.out.count("\n") == 1
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value


class Cli:
    """Call it like the command: `cli("train", "--algo", "ppo")`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capfd = monkeypatch, capfd

    def __call__(self, *args: str | Path) -> Result:
        self.monkeypatch.setattr(sys, "argv", ["rlctl", *map(str, args)])
        self.capfd.readouterr()
        code: Any = 0
        interrupt = signal.getsignal(signal.SIGINT)
        try:
            main()
        except SystemExit as e:
            code = e.code or 0
        finally:
            signal.signal(signal.SIGINT, interrupt)  # the command ignores it once its work is done; these tests go on
        out, err = self.capfd.readouterr()
        return Result(code, out, err)

    def train(self, *args: str | Path, sets: list[str]) -> Result:
        """`rlctl train` with overrides."""
        return self("train", *args, *[x for s in QUICK + sets for x in ("--set", s)])
