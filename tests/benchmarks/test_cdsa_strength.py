"""The sweep over strengths of CDSA's correction, on two tiny runs."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from rlctl import experiment

SCRIPT = "cdsa_strength"


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    """A TD3+BC of two updates on noise, and a CDSA of two updates on it."""
    rng, n = np.random.default_rng(0), 64
    ends = np.arange(1, n + 1) % 16 == 0
    rows = {
        "observations": rng.normal(size=(n, 11)).astype(np.float32),
        "actions": rng.uniform(-1, 1, size=(n, 3)).astype(np.float32),
        "rewards": rng.normal(size=n).astype(np.float32),
        "next_observations": rng.normal(size=(n, 11)).astype(np.float32),
        "terminals": ends,
        "timeouts": np.zeros(n, bool),
    }
    np.savez(tmp_path / "rows.npz", **rows)
    run = {"evaluations": 1, "eval_episodes": 1, "final_episodes": 1, "tensorboard": False}
    layer = {"data": str(tmp_path / "rows.npz"), "env": "Hopper", "seed": 3, "run": run}
    for algo, agent in (
        ("td3bc", {"hidden": [8, 8]}),
        ("cdsa", {"hidden": [8], "inverse_hidden": [8], "base": str(tmp_path / "td3bc")}),
    ):
        settings = experiment.resolve(algo, [layer, {"agent": {"steps": 2, "batch_size": 8, **agent}}])
        experiment.train(settings, tmp_path / algo, quiet=True)
    return tmp_path / "td3bc", tmp_path / "cdsa"


def test_every_strength_of_every_base(
    script: ModuleType, runs: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, score = runs
    out = tmp_path / "strength.json"
    given = ["--score", str(score), "--env", "Hopper", "--episodes", "2", "--out", str(out), str(base)]
    monkeypatch.setattr("sys.argv", ["cdsa_strength.py", *given])
    script.main()
    found = json.loads(out.read_text())
    (row,) = found["rows"]
    assert (row["base"], row["seed"], found["env"]) == ("td3bc", 3, "Hopper")
    assert [s["score_steps"] for s in row["scores"]] == [s.score_steps for s in script.STRENGTHS]
    none, *moved = (s["return"] for s in row["scores"])
    assert any(score != none for score in moved)  # an untrained score moves actions too, if to nowhere


def test_the_score_has_to_be_a_cdsa(
    script: ModuleType, runs: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["x", "--score", str(runs[0]), "--env", "Hopper", str(runs[0])])
    with pytest.raises(SystemExit):
        script.main()
    assert "holds no CDSA: train one with" in capsys.readouterr().err
