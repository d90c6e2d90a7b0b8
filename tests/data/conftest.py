"""Small datasets on disk, written through Minari's own API or by hand."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
from dataset_files import ACT_DIM, OBS_DIM, Episode, Write
from minari.data_collector import EpisodeBuffer


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    return tmp_path / "minari"


@pytest.fixture
def write_minari(root: Path) -> Write:
    def write(
        name: str, episodes: list[Episode], env: str | None = None, storage: str = "hdf5", **spaces: gym.Space[Any]
    ) -> Path:
        obs_type: Any = np.float64 if storage == "hdf5" else np.float32  # Arrow insists on the type of the space
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)
            minari.create_dataset_from_buffers(
                name,
                [EpisodeBuffer(**e) for e in episodes],
                env=None if env is None else gym.spec(env),
                observation_space=spaces.get("observation", gym.spaces.Box(-np.inf, np.inf, (OBS_DIM,), obs_type)),
                action_space=spaces.get("action", gym.spaces.Box(-1, 1, (ACT_DIM,), np.float32)),
                data_format=storage,
            )
        return root / name

    return write


@pytest.fixture
def write_d4rl(tmp_path: Path) -> Write:
    """Flat file of whole episodes; `drop` removes keys, `change` replaces or adds them."""
    import h5py

    def write(name: str, episodes: list[Episode], drop: tuple[str, ...] = (), **change: Any) -> Path:
        columns = {
            "observations": np.concatenate([e["observations"][:-1] for e in episodes]),
            "next_observations": np.concatenate([e["observations"][1:] for e in episodes]),
            "actions": np.concatenate([e["actions"] for e in episodes]),
            "rewards": np.concatenate([e["rewards"] for e in episodes]).astype(np.float32),
            "terminals": np.concatenate([e["terminations"] for e in episodes]),
            "timeouts": np.concatenate([e["truncations"] for e in episodes]),
        }
        with h5py.File(tmp_path / name, "w") as file:
            for key, value in (columns | change).items():
                if key not in drop:
                    file.create_dataset(key, data=value)
            file["metadata/algorithm"] = b"SAC"
            file["metadata/policy/fc0/weight"] = np.zeros((7, 5), np.float32)
            file["infos/qpos"] = np.zeros((4, 2))
        return tmp_path / name

    return write
