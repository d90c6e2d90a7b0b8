"""What run.json says of a run on data: the last evaluations, and what the run began with."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

import h5py
import pytest
from run_helpers import hdf5, interrupted, rows, settings, train_in_pieces

from rlctl import experiment

SMALL: dict[str, Any] = {"hidden": [8, 8], "batch_size": 8}
EVALS = {"eval_episodes": 1, "final_episodes": 2, "checkpoint_every": 1}


def means(folder: Path) -> list[float]:
    """Of the evaluations in training, in order."""
    during = [r for r in rows(folder / "eval.jsonl") if not r["final"]]
    return [fmean(r["return"] for r in during if r["updates"] == k) for k in sorted({r["updates"] for r in during})]


def test_the_last_the_last_ten_and_the_best_are_apart(tmp_path: Path) -> None:
    """12 evaluations, of which the mean takes 10; stopped twice on the way it is the same to the last bit."""
    s = settings("td3bc", "Hopper", hdf5(tmp_path / "d.hdf5"), steps=24, **SMALL, run=EVALS | {"eval_every": 2})
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert train_in_pieces(s, tmp_path / "pieces", [9, 8]) == 2
    final, again = (experiment.read_json(tmp_path / n / "run.json")["final"] for n in ("whole", "pieces"))
    found = means(tmp_path / "whole")
    assert len(found) == 12
    assert final["last10_eval_mean"] == pytest.approx(fmean(found[-10:]), rel=1e-12)
    assert final["last10_eval_mean"] != pytest.approx(fmean(found), rel=1e-6)
    assert (final["last10_evals"], final["best_eval_mean"]) == (10, max(found))
    assert final["return_mean"] == fmean(r["return"] for r in rows(tmp_path / "whole" / "eval.jsonl") if r["final"])
    assert again == final


def test_fewer_than_ten_evaluations_say_so(tmp_path: Path) -> None:
    data = hdf5(tmp_path / "d.hdf5")
    for every, n in ((5, 2), (0, 0)):
        s = settings("td3bc", "Hopper", data, steps=10, **SMALL, run=EVALS | {"eval_every": every})
        folder, _ = experiment.train(s, tmp_path / f"every{every}", quiet=True)
        assert folder is not None
        final = experiment.read_json(folder / "run.json")["final"]
        assert final["last10_evals"] == n
        assert final["last10_eval_mean"] == (pytest.approx(fmean(means(folder)), rel=1e-12) if n else None)


def test_a_run_that_was_stopped_knows_its_reward_transform(tmp_path: Path) -> None:
    s = settings("td3bc", "Hopper", hdf5(tmp_path / "d.hdf5"), steps=10, reward="standardise", **SMALL)
    assert interrupted(lambda: experiment.train(s, tmp_path / "run", quiet=True), 3)
    record = experiment.read_json(tmp_path / "run" / "run.json")
    assert record["status"] == "preempted"
    said = record["reward_transform"]["reward"]
    assert said.startswith("standardise: ")
    experiment.resume(tmp_path / "run", quiet=True)
    assert experiment.read_json(tmp_path / "run" / "run.json")["reward_transform"] == {"reward": said}


def test_successors_that_are_copies_are_warned_of(tmp_path: Path) -> None:
    for name in ("sound", "copies"):
        data = hdf5(tmp_path / f"{name}.hdf5")
        if name == "copies":
            with h5py.File(data, "r+") as f:
                f["next_observations"][:] = f["observations"][:]
        s = settings("td3bc", "Hopper", data, steps=2, **SMALL, run={"eval_every": 0, "final_episodes": 0})
        experiment.train(s, tmp_path / name)
        log = (tmp_path / name / "console.log").read_text()
        assert ("warning: next_obs is a copy of obs in most rows" in log) == (name == "copies")


def test_actions_outside_the_box_are_warned_of(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = hdf5(tmp_path / "d.hdf5")
    for largest in (1.0, -2.5):
        with h5py.File(data, "r+") as f:
            f["actions"][7, 1] = largest
        s = settings("td3bc", "Hopper", data, steps=2, **SMALL, run={"eval_every": 0, "final_episodes": 0})
        experiment.train(s, tmp_path / f"run{largest}")
        log = (tmp_path / f"run{largest}" / "console.log").read_text()
        assert ("actions outside [-1, 1], up to 2.5 in size" in log) == (largest < -1)
