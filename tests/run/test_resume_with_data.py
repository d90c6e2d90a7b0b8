"""Online learners beside a dataset: what a batch is made of, and exact resume in every phase of such a run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import h5py
import pytest
import torch
from run_helpers import assert_same, hdf5, interrupted, rows, settings, train_in_pieces

from rlctl import agents, experiment
from rlctl.agents.expo import EXPO
from rlctl.agents.sac import SAC
from rlctl.data import ring
from rlctl.errors import UsageError
from rlctl.types import Agent, Batch, Metrics

SMALL: dict[str, Any] = {
    "hidden": [16, 16],
    "num_critics": 3,
    "buffer_size": 100,
    "learning_starts": 30,
    "batch_size": 16,
    "updates_per_step": 2,
    "policy_every": 2,
}
EXPO_NETS: dict[str, Any] = {
    "base_net": "mlp",
    "base_hidden": [16, 16],
    "base_steps": 3,
    "num_actions": 3,
    "num_edits": 2,
    "beta": 0.3,
}


def both(s: experiment.Settings, tmp_path: Path, pieces: list[int]) -> None:
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert train_in_pieces(s, tmp_path / "pieces", pieces) == len(pieces)
    assert_same(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("data", [True, False])
def test_expo_resumes_anywhere(data: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Within the base's training on data, at its very end, before and after the wrap-around of the replay."""
    monkeypatch.setattr(ring, "SEGMENT", 16)
    source = hdf5(tmp_path / "d.hdf5") if data else None
    extra = {"offline_updates": 20} if data else {}
    run = {"log_every": 7, "eval_every": 60}
    s = settings("expo", "Hopper", source, steps=130, **(SMALL | EXPO_NETS | extra), run=run)
    both(s, tmp_path, [11, 9, 75] if data else [75])


def test_rlpd_resumes_anywhere(tmp_path: Path) -> None:
    s = settings(
        "rlpd", "Hopper", hdf5(tmp_path / "d.hdf5"), steps=100, **SMALL, run={"log_every": 7, "eval_every": 60}
    )
    both(s, tmp_path, [35])


@pytest.mark.parametrize("algo", ["expo", "rlpd"])
@pytest.mark.parametrize("share", [0.25, 1.0, None])
def test_the_share_of_a_batch_that_comes_from_the_dataset(
    algo: str, share: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hdf5(tmp_path / "d.hdf5")
    with h5py.File(data, "r+") as f:
        f["rewards"][...] = 1e6
    shares: list[float] = []

    def note(self: Agent, batch: Batch) -> Metrics:
        shares.append(float((batch.reward == 1e6).float().mean()))
        return {"losses/none": torch.zeros(())}

    monkeypatch.setattr(EXPO, "update", note)
    monkeypatch.setattr(SAC, "update", note)
    monkeypatch.setattr(agents.get(algo), "update", note)
    extra = {} if share is None else {"data_share": share}
    nets = EXPO_NETS if algo == "expo" else {}
    experiment.train(settings(algo, "Hopper", data, steps=40, **(SMALL | nets | extra)), tmp_path / "run", quiet=True)
    assert len(shares) == 20
    assert set(shares) == {0.5 if share is None else share}


def test_pretraining_needs_a_dataset(tmp_path: Path) -> None:
    s = settings("expo", "Hopper", steps=40, offline_updates=10, **(SMALL | EXPO_NETS))
    with pytest.raises(UsageError, match="offline_updates=10 train on a dataset"):
        experiment.train(s, tmp_path / "run", quiet=True)
    assert not (tmp_path / "run").exists()


def test_a_pretrained_base_acts_from_the_first_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No random actions after offline_updates, and the clock of the whole run counts both parts."""
    monkeypatch.setattr(EXPO, "random_act", lambda self, obs: pytest.fail("a random action"))
    s = settings(
        "expo",
        "Hopper",
        hdf5(tmp_path / "d.hdf5"),
        steps=20,
        offline_updates=15,
        **(SMALL | EXPO_NETS),
        run={"log_every": 5, "eval_every": 0},
    )
    experiment.train(s, tmp_path / "run", quiet=True)
    record = experiment.read_json(tmp_path / "run" / "run.json")
    assert record["progress"] == 35
    assert [r["env_steps"] for r in rows(tmp_path / "run" / "metrics.jsonl")] == [0, 0, 0, 5, 10, 15, 20]


def test_sac_reads_no_dataset(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="reads no dataset"):
        settings("sac", "Hopper", hdf5(tmp_path / "d.hdf5"), steps=40)


def test_a_gorl_run_keeps_its_length(tmp_path: Path) -> None:
    small = {"num_envs": 2, "horizon": 8, "minibatch_size": 8, "hidden": [8], "decoder_hidden": [8]}
    phases = {"stage_weights": [1, 1], "rollout_steps": 100, "decoder_updates": 5, "decoder_batch_size": 16}
    s = settings("gorl", "probe:both", steps=64, **small, **phases)
    folder = tmp_path / "run"
    assert interrupted(lambda: experiment.train(s, folder, quiet=True), 3)
    with pytest.raises(UsageError, match="keeps its length: its stages share the steps"):
        experiment.resume(folder, 128, quiet=True)
    experiment.resume(folder, 64, quiet=True)  # as it was begun
    assert experiment.read_json(folder / "run.json")["progress"] == 64 + 100 + 5
    for steps in (None, 128):
        with pytest.raises(UsageError, match="is finished and keeps its length"):
            experiment.resume(folder, steps, quiet=True)
