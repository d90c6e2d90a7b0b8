"""What a converted file says of itself: its label is its source's, not its name's."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from dataset_files import Write, episode, hide

from rlctl.data.arrays import DatasetError
from rlctl.data.convert import convert
from rlctl.data.dataset import load_dataset, read
from rlctl.data.flat_files import MARK
from rlctl.data.inspect import summarize

EPISODES = [episode(0, 4, "terminated"), episode(1, 3)]


def benchmark(path: Path) -> tuple[str, str]:
    """Dataset and benchmark, the same in a run's record and in `rlctl data info`."""
    labels = load_dataset(str(path)).labels()
    assert labels.items() <= summarize(*read(str(path))).items()
    assert labels.items() <= load_dataset(str(path)).record().items()
    return labels["dataset"], labels["benchmark"]


def test_a_name_makes_no_benchmark_of_own_data(write_d4rl: Write, tmp_path: Path) -> None:
    own = write_d4rl("own.hdf5", EPISODES)
    first = convert(str(own), out=tmp_path / "own.npz")
    for name in ("hopper-medium-replay-v2.hdf5", "hopper_medium-v2.h5"):
        assert benchmark(convert(str(first), out=tmp_path / name)) == (Path(name).stem, "own")
    again = convert(str(tmp_path / "hopper_medium-v2.h5"), out=tmp_path / "walker2d-medium-v2.hdf5")
    assert benchmark(again) == ("walker2d-medium-v2", "own")


def test_d4rl_data_stay_d4rl_s(write_d4rl: Write, tmp_path: Path) -> None:
    theirs = write_d4rl("hopper_medium-v2.hdf5", EPISODES)
    assert benchmark(theirs) == ("hopper-medium-v2", "D4RL")
    npz = convert(str(theirs), out=tmp_path / "h.npz")
    assert benchmark(npz) == ("hopper-medium-v2", "D4RL")
    assert benchmark(convert(str(npz), out=tmp_path / "g.hdf5")) == ("hopper-medium-v2", "D4RL")
    assert load_dataset(str(tmp_path / "g.hdf5")).sha256 == load_dataset(str(theirs)).sha256


def test_minari_data_stay_minari_s(write_minari: Write, tmp_path: Path) -> None:
    write_minari("mujoco/hopper/medium-v0", EPISODES)
    flat = convert("mujoco/hopper/medium-v0", out=tmp_path / "hopper-medium-v2.hdf5")
    assert benchmark(flat) == ("mujoco/hopper/medium-v0", "Minari")


def test_a_mark_that_cannot_be_read(write_d4rl: Write, tmp_path: Path) -> None:
    own = write_d4rl("own.hdf5", EPISODES)
    arrays = dict(np.load(convert(str(own), out=tmp_path / "own.npz")))
    np.savez(tmp_path / "bad.npz", **(arrays | {MARK: np.array("own")}))
    with pytest.raises(DatasetError, match="not what rlctl data convert writes"):
        load_dataset(str(tmp_path / "bad.npz"))


def test_writing_hdf5_without_h5py(write_d4rl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    npz = convert(str(write_d4rl("own.hdf5", EPISODES)), out=tmp_path / "own.npz")
    hide(monkeypatch, "h5py")
    with pytest.raises(DatasetError, match=r"writing a dataset needs the package h5py: pip install 'minari\[hdf5\]'"):
        convert(str(npz), out=tmp_path / "b.hdf5")
    assert not (tmp_path / "b.hdf5").exists()


def test_after_a_terminal_row_minari_gets_the_last_observation_again(
    write_d4rl: Write, root: Path, tmp_path: Path
) -> None:
    """Where the file has no successors: Minari keeps T + 1 observations, and nobody knows the last."""
    import minari

    source = write_d4rl("own.hdf5", EPISODES, drop=("next_observations",))
    convert(str(source), id="mine/own-v0")
    ended, cut = minari.load_dataset("mine/own-v0").iterate_episodes()
    np.testing.assert_array_equal(ended.observations, EPISODES[0]["observations"][[0, 1, 2, 3, 3]])
    np.testing.assert_array_equal(cut.observations, EPISODES[1]["observations"][:3])  # its last row is lost
