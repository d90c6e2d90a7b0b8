"""The datasets of D4RL: their names, where their files are, where they are kept here."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path, PurePosixPath

MIRROR = "http://rail.eecs.berkeley.edu/datasets/offline_rl"
"""The authors' own server. It publishes no hashes."""
MUJOCO_V2_MIRROR = "hf://imone/D4RL"
"""A copy of the MuJoCo v2 files that publishes their SHA-256."""


@cache
def catalogue() -> dict[str, str]:
    """D4RL id -> path of its file under `MIRROR`."""
    out: dict[str, str] = {}
    kinds = ("random", "medium", "expert", "medium-replay", "medium-expert")
    for task in ("halfcheetah", "hopper", "walker2d", "ant"):
        for kind in kinds:
            short = "walker" if (task, kind) == ("walker2d", "medium-replay") else task
            old = "mixed" if kind == "medium-replay" else kind.replace("-", "_")
            out[f"{task}-{kind}-v0"] = f"gym_mujoco/{short}_{old}.hdf5"
        for kind in (*kinds, "full-replay"):
            for v in ("v1", "v2"):
                out[f"{task}-{kind}-{v}"] = f"gym_mujoco_{v}/{task}_{kind.replace('-', '_')}-{v}.hdf5"
    for task in ("pen", "door", "hammer", "relocate"):
        out[f"{task}-human-v0"] = f"hand_dapg/{task}-v0_demos_clipped.hdf5"
        out[f"{task}-cloned-v0"] = f"hand_dapg/{task}-demos-v0-bc-combined.hdf5"
        out[f"{task}-expert-v0"] = f"hand_dapg/{task}-v0_expert_clipped.hdf5"
        for kind in ("human", "cloned", "expert"):
            out[f"{task}-{kind}-v1"] = f"hand_dapg_v1/{task}-{kind}-v1.hdf5"
    mazes = {
        "umaze": "u-maze_noisy_multistart_False_multigoal_False",
        "umaze-diverse": "u-maze_noisy_multistart_True_multigoal_True",
        "medium-play": "big-maze_noisy_multistart_True_multigoal_False",
        "medium-diverse": "big-maze_noisy_multistart_True_multigoal_True",
        "large-play": "hardest-maze_noisy_multistart_True_multigoal_False",
        "large-diverse": "hardest-maze_noisy_multistart_True_multigoal_True",
    }
    for kind, stem in mazes.items():
        out[f"antmaze-{kind}-v0"] = f"ant_maze_new/Ant_maze_{stem}_sparse.hdf5"
        out[f"antmaze-{kind}-v2"] = f"ant_maze_v2/Ant_maze_{stem}_sparse_fixed.hdf5"
    out["maze2d-open-v0"] = "maze2d/maze2d-open-sparse.hdf5"
    out["maze2d-open-dense-v0"] = "maze2d/maze2d-open-dense.hdf5"
    for size in ("umaze", "medium", "large"):
        out[f"maze2d-{size}-v1"] = f"maze2d/maze2d-{size}-sparse-v1.hdf5"
        out[f"maze2d-{size}-dense-v1"] = f"maze2d/maze2d-{size}-dense-v1.hdf5"
    out["kitchen-complete-v0"] = "kitchen/mini_kitchen_microwave_kettle_light_slider-v0.hdf5"
    out["kitchen-partial-v0"] = "kitchen/kitchen_microwave_kettle_light_slider-v0.hdf5"
    out["kitchen-mixed-v0"] = "kitchen/kitchen_microwave_kettle_bottomburner_light-v0.hdf5"
    return out


@cache
def _by_stem() -> dict[str, str]:
    return {PurePosixPath(path).stem: name for name, path in catalogue().items()}


def d4rl_id(name: str) -> str | None:
    """The D4RL id of an id or of a file name without its suffix ("hopper_medium-v2"), None where there is none."""
    dashed = name.replace("_", "-")
    return dashed if dashed in catalogue() else _by_stem().get(name)


def d4rl_root() -> Path:
    """Where D4RL files are kept: D4RL_DATASET_DIR, else ~/.d4rl/datasets (D4RL's own choices)."""
    named = os.environ.get("D4RL_DATASET_DIR")
    return Path(named).expanduser() if named else Path.home() / ".d4rl" / "datasets"


def local_file(name: str) -> Path | None:
    """The local file of a D4RL id, under its id or under the name D4RL gives it; None where there is none."""
    path = catalogue().get(name)
    names = [f"{name}.hdf5"] + ([PurePosixPath(path).name] if path else [])
    return next((f for f in (d4rl_root() / n for n in names) if f.is_file()), None)
