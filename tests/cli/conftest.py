"""The `cli` fixture, and finished runs to look at."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
from cli_helpers import PPO, QUICK, SAC, Cli

from rlctl import experiment
from rlctl.config import parse_overrides


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests read back through the same kernel: no need to wait for the disk."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


@pytest.fixture
def cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Cli:
    """The command, standing in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    return Cli(monkeypatch, capfd)


def _run(folder: Path, algo: str, steps: int, sets: list[str]) -> Path:
    layer = parse_overrides([*QUICK, *sets, f"steps={steps}"])
    experiment.train(experiment.resolve(algo, [layer, {"env": "Hopper", "seed": 5}]), folder, quiet=True)
    return folder


@pytest.fixture(scope="session")
def ppo_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished PPO run on Hopper, with TensorBoard events. Do not write into it."""
    sets = [*PPO, "run.eval_every=40", "run.log_every=40", "run.tensorboard=true", "run.eval_stochastic=true"]
    return _run(tmp_path_factory.mktemp("runs") / "ppo", "ppo", 200, sets)


@pytest.fixture(scope="session")
def sac_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished SAC run on Hopper. Do not write into it."""
    return _run(tmp_path_factory.mktemp("runs") / "sac", "sac", 120, [*SAC, "run.eval_every=40"])
