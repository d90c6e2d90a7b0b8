"""The two views, every format: what a learner is given for the same episodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import minari
import numpy as np
import pytest
import torch
from dataset_files import Episode, Write, episode
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlctl.data import arrays
from rlctl.data.dataset import Dataset, DatasetError, load_dataset

EPISODES = [episode(0, 4, "terminated"), episode(1, 3), episode(2, 5, "terminated"), episode(3, 2)]


def fails(source: str | Path, match: str, **kw: Any) -> None:
    with pytest.raises(DatasetError, match=match) as caught:
        load_dataset(str(source), **kw)
    assert "\n" not in str(caught.value)


def flat(episodes: list[Episode]) -> dict[str, np.ndarray]:
    return {
        "observations": np.concatenate([e["observations"][:-1] for e in episodes]),
        "actions": np.concatenate([e["actions"] for e in episodes]),
        "rewards": np.concatenate([e["rewards"] for e in episodes]),
        "terminals": np.concatenate([e["terminations"] for e in episodes]),
        "timeouts": np.concatenate([e["truncations"] for e in episodes]),
    }


def d4rl_pairs(d: dict[str, np.ndarray], max_steps: int | None = None) -> list[tuple[Any, ...]]:
    """D4RL's loop as its documentation and the sheet describe it: one row at a time, with its step counter."""
    out, step = [], 0
    for i in range(len(d["rewards"]) - 1):
        cut = step == max_steps - 1 if max_steps is not None else bool(d["timeouts"][i])
        if cut:
            step = 0
            continue
        if d["terminals"][i]:
            step = 0
        step += 1
        row = d["observations"][i], d["actions"][i], d["rewards"][i], d["observations"][i + 1], bool(d["terminals"][i])
        out.append(row)
    return out


def same(data: Dataset, pairs: list[tuple[Any, ...]]) -> None:
    rows = data.rows
    got = (rows.obs, rows.action, rows.reward, rows.next_obs, rows.terminated)
    for column, want in zip(got, zip(*pairs, strict=True), strict=True):
        np.testing.assert_array_equal(column, np.asarray(want, column.numpy().dtype))


# --------------------------------------------------------------------------------------------------------------- views
def test_d4rl_compat_gives_d4rls_pairs(write_d4rl: Write) -> None:
    path = write_d4rl("x.hdf5", EPISODES)
    data = load_dataset(str(path), view="d4rl_compat")
    same(data, d4rl_pairs(flat(EPISODES)))
    rows = data.rows
    # exact = sum of T, compat = N - timeouts - the last row (which timed out here)
    assert (len(load_dataset(str(path))), len(data)) == (14, 14 - 2)
    # (a) the successor of a terminal row is the next episode's first observation, and so wrong
    assert rows.next_obs[3].tolist() == rows.obs[4].tolist()
    assert data.view == "d4rl_compat"
    # episodes stay apart all the same, and (b) one of T steps that timed out has T - 1 rows
    assert data.episode_ends.tolist() == [4, 6, 11, 12]
    assert rows.truncated.nonzero().flatten().tolist() == [5, 11]
    np.testing.assert_allclose(data.episode_returns(), [6.0, 3.3, 11.0, 1.6], rtol=1e-6)


def test_d4rl_compat_ignores_stored_successors_and_drops_a_terminal_last_row(write_d4rl: Write) -> None:
    wrong = np.full((9, 3), 7.0)
    episodes = EPISODES[:1] + EPISODES[2:3]
    a = load_dataset(str(write_d4rl("a.hdf5", episodes, next_observations=wrong)), view="d4rl_compat")
    b = load_dataset(str(write_d4rl("b.hdf5", episodes, drop=("next_observations",))), view="d4rl_compat")
    assert a.sha256 == b.sha256
    assert len(a) == 8
    assert a.rows.truncated.nonzero().flatten().tolist() == [7]  # its last row is gone: the episode is cut there


def test_counts_of_a_set_where_every_episode_times_out(write_d4rl: Write) -> None:
    """N - E transitions, the sheet's 202000 rows of 202 episodes -> 201798 at one hundredth of the size."""
    path = write_d4rl("x.hdf5", [episode(k, 10) for k in range(202)])
    assert (len(load_dataset(str(path))), len(load_dataset(str(path), view="d4rl_compat"))) == (2020, 2020 - 202)


def test_d4rl_compat_without_timeouts_counts_as_d4rl_does(write_d4rl: Write) -> None:
    episodes = [episode(0, 2, "terminated"), episode(1, 3), episode(2, 3), episode(3, 3, "open")]
    path = write_d4rl("x.hdf5", episodes, drop=("timeouts",))
    fails(path, "no timeouts.*episode_len", view="d4rl_compat")
    data = load_dataset(str(path), view="d4rl_compat", episode_len=3)
    same(data, d4rl_pairs(flat(episodes), 3))
    # its counter starts at 1 after a terminal: the episode after it loses its second of three rows, not its last
    assert 1002.0 in data.rows.obs[:, 0]
    assert 1001.0 not in data.rows.obs[:, 0]


@settings(max_examples=60, deadline=None)
@given(terminal=st.lists(st.booleans(), min_size=1, max_size=40), limit=st.integers(1, 7))
def test_d4rl_step_counter_against_its_loop(terminal: list[bool], limit: int) -> None:
    step, want = 0, []
    for done in terminal:
        cut = step == limit - 1
        want.append(cut)
        step = 0 if cut else (0 if done else step) + 1
    np.testing.assert_array_equal(arrays.d4rl_step_limit(np.array(terminal), limit), want)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["terminated", "truncated"])), min_size=2, max_size=8),
    block=st.integers(1, 7),
)
def test_compat_is_the_same_from_minari_and_from_d4rl(
    write_d4rl: Write, shape: list[tuple[int, str]], block: int
) -> None:
    episodes = [episode(k, steps, end) for k, (steps, end) in enumerate(shape)]
    pairs = d4rl_pairs(flat(episodes))
    path = write_d4rl("x.hdf5", episodes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlctl.data.arrays.BLOCK", block)
        if not pairs:
            fails(path, "no transition", view="d4rl_compat")
            return
        same(load_dataset(str(path), view="d4rl_compat"), pairs)


def test_compat_of_a_minari_set(write_minari: Write, write_d4rl: Write) -> None:
    write_minari("toy/set-v0", [*EPISODES, episode(4, 3, "open")])
    data = load_dataset("toy/set-v0", view="d4rl_compat")
    same(data, d4rl_pairs(flat([*EPISODES, episode(4, 3)])))  # unfinished: cut by the recorder


def test_unknown_view(write_d4rl: Write) -> None:
    fails(write_d4rl("x.hdf5", EPISODES), "no view 'd4rl': allowed are exact and d4rl_compat", view="d4rl")


# ----------------------------------------------------------------------------------------------------------------- npz
@pytest.fixture
def write_npz(tmp_path: Path) -> Callable[..., Path]:
    def write(name: str, columns: dict[str, Any], compress: bool = False) -> Path:
        (np.savez_compressed if compress else np.savez)(tmp_path / name, **columns)
        return tmp_path / name

    return write


@pytest.mark.parametrize("compress", [False, True])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_npz_is_the_hdf5_file(write_npz: Write, write_d4rl: Write, compress: bool, dtype: Any) -> None:
    columns = {k: x if x.dtype == bool else x.astype(dtype) for k, x in flat(EPISODES).items()}
    path = write_npz("x.npz", columns | {"infos": np.zeros(3)}, compress)
    for view in ("exact", "d4rl_compat"):
        want = load_dataset(str(write_d4rl("y.hdf5", EPISODES, drop=("next_observations",))), view=view)  # type: ignore[arg-type]
        assert load_dataset(str(path), view=view).sha256 == want.sha256  # type: ignore[arg-type]
    assert load_dataset(str(path)).origin.format == "npz"


def test_npz_under_our_names_and_in_columns_order(write_npz: Write) -> None:
    d = flat(EPISODES)
    ours = {
        "obs": np.asfortranarray(d["observations"]),
        "action": d["actions"],
        "reward": d["rewards"][:, None],
        "terminated": d["terminals"].astype(np.uint8),
        "truncated": d["timeouts"],
        "next_obs": np.concatenate([e["observations"][1:] for e in EPISODES]),
    }
    data = load_dataset(str(write_npz("x.npz", ours)))
    torch.testing.assert_close(data.rows.next_obs, data.rows.obs + 1)
    assert data.episode_ends.tolist() == [4, 7, 12, 14]


def test_npz_read_in_small_blocks(write_npz: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_npz("x.npz", flat(EPISODES))
    want = load_dataset(str(path)).sha256
    monkeypatch.setattr("rlctl.data.arrays.BLOCK", 3)
    assert load_dataset(str(path)).sha256 == want


def test_npz_damage(write_npz: Write, tmp_path: Path) -> None:
    d = flat(EPISODES)
    fails(tmp_path / "x.npz", "no npz file is in that folder")
    path = write_npz("x.npz", d)
    fails(tmp_path / "xx.npz", "nearest there: x.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    fails(path, "not a whole .npz file")
    path.write_bytes(whole[:300] + bytes(20) + whole[320:])
    fails(path, "not a whole .npz file .*CRC")
    fails(write_npz("x.npz", d | {"actions": np.array([None] * 14)}), "actions holds object, not numbers")
    fails(write_npz("x.npz", {k: v for k, v in d.items() if k != "terminals"}), "no 'terminals'")
    dones = {k: v for k, v in d.items() if k != "terminals"} | {"dones": d["terminals"]}
    fails(write_npz("x.npz", dones), "'dones' does not tell a true end from a time limit")
    fails(write_npz("x.npz", d | {"rewards": d["rewards"][:-1]}), r"observations has shape \(14, 3\), expected 13 rows")


# ------------------------------------------------------------------------------------------------- Arrow and Parquet
@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_arrow_and_parquet_are_the_hdf5_dataset(write_minari: Write, storage: str) -> None:
    pytest.importorskip("pyarrow")
    episodes = [episode(k, 2 + k, "terminated" if k % 2 else "truncated") for k in range(12)]  # "10" sorts before "2"
    write_minari("toy/a-v0", episodes, env="Hopper-v5")
    write_minari("toy/b-v0", episodes, env="Hopper-v5", storage=storage)
    a, b = load_dataset("toy/a-v0"), load_dataset("toy/b-v0")
    assert a.sha256 == b.sha256
    assert (b.origin.format, b.env_id) == (f"minari-{storage}", "Hopper-v5")
    a, b = (load_dataset(f"toy/{x}-v0", view="d4rl_compat") for x in "ab")
    assert a.sha256 == b.sha256


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_arrow_with_dict_observations(write_minari: Write, storage: str) -> None:
    pytest.importorskip("pyarrow")
    box = gym.spaces.Box(-9, 9, (2,), np.float64)
    space = gym.spaces.Dict(z=gym.spaces.Box(-9, 9, (1,)), b=gym.spaces.Dict(y=box, x=box))
    obs = {"z": np.full((5, 1), 4.0, np.float32), "b": {"y": np.full((5, 2), 3.0), "x": np.full((5, 2), 2.0)}}
    write_minari("toy/set-v0", [episode(0, 4) | {"observations": obs}], observation=space, storage=storage)
    assert load_dataset("toy/set-v0").rows.obs[0].tolist() == [2, 2, 3, 3, 4]
    assert load_dataset("toy/set-v0", obs_keys=["z", "b"]).rows.obs[0].tolist() == [4, 2, 2, 3, 3]


@pytest.mark.parametrize("storage", ["arrow", "parquet"])
def test_arrow_damage(write_minari: Write, storage: str) -> None:
    pytest.importorskip("pyarrow")
    folder = write_minari("toy/set-v0", [episode(0, 4), episode(1, 3)], storage=storage) / "data"
    part = folder / "1" / f"part-0.{storage}"
    whole = part.read_bytes()
    part.write_bytes(whole[: len(whole) // 2])
    fails("toy/set-v0", "episode 1 cannot be read")
    part.unlink()
    fails("toy/set-v0", f"episode 1 has no file part-0.{storage}")


def test_no_pyarrow(write_minari: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    meta = write_minari("toy/set-v0", [episode(0, 4)]) / "data/metadata.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"data_format": "parquet"}))
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    fails("toy/set-v0", r"stored as parquet, which needs the package pyarrow: pip install 'rlctl\[arrow\]'")


# ----------------------------------------------------------------------------------------------- Dict, missing packages
def goal_set(write_minari: Write, name: str, env: str) -> None:
    parts = {"observation": 3, "achieved_goal": 2, "desired_goal": 2}
    space = gym.spaces.Dict({k: gym.spaces.Box(-99, 99, (n,), np.float64) for k, n in parts.items()})
    obs = {k: np.full((5, n), i + 1.0) for i, (k, n) in enumerate(parts.items())}
    folder = write_minari(name, [episode(0, 4) | {"observations": obs}], observation=space)
    meta = folder / "data/metadata.json"
    spec = gym.envs.registration.EnvSpec(
        env,
        entry_point="no_such_package.envs:Env",
        kwargs={"continuing_task": False, "render_mode": None},
        max_episode_steps=700,
    )
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {"env_spec": spec.to_json()}))


def test_env_that_is_not_installed_and_the_goal_rule(write_minari: Write) -> None:
    goal_set(write_minari, "D4RL/antmaze/umaze-v1", "AntMaze_UMaze-v4")
    with pytest.raises(ModuleNotFoundError):
        minari.load_dataset("D4RL/antmaze/umaze-v1").recover_environment()
    data = load_dataset("D4RL/antmaze/umaze-v1")
    assert data.rows.obs[0].tolist() == [2, 2, 3, 3, 1, 1, 1]  # sorted keys
    assert (data.env_id, data.origin.env_options, data.origin.episode_len) == (
        "AntMaze_UMaze-v4",
        {"continuing_task": False},
        700,
    )
    # D4RL's vector has the position and the rest of the state, not the goal
    compat = load_dataset("D4RL/antmaze/umaze-v1", view="d4rl_compat")
    assert compat.rows.obs[0].tolist() == [2, 2, 1, 1, 1]
    goal_set(write_minari, "D4RL/pointmaze/open-v2", "PointMaze_Open-v3")
    assert load_dataset("D4RL/pointmaze/open-v2", view="d4rl_compat").rows.obs[0].tolist() == [1, 1, 1]


def test_wrong_obs_keys(write_minari: Write, write_d4rl: Write) -> None:
    goal_set(write_minari, "toy/goal-v0", "X-v0")
    write_minari("toy/plain-v0", EPISODES)
    fails("toy/goal-v0", "no key 'goal'; it has achieved_goal, desired_goal, observation", obs_keys=["goal"])
    fails("toy/goal-v0", "no key 'goal'", obs_keys="goal")
    for wrong in (3, [], [3], {}):
        fails("toy/goal-v0", "obs_keys names keys of a Dict observation, one or a list, got", obs_keys=wrong)
    fails("toy/plain-v0", "is Box, not Dict: leave obs_keys out", obs_keys=["observation"])
    fails(write_d4rl("x.hdf5", EPISODES), "leave obs_keys out", obs_keys=["observation"])


def test_one_obs_key_is_a_list_of_one(write_minari: Write) -> None:
    goal_set(write_minari, "toy/goal-v0", "X-v0")
    one, listed = (load_dataset("toy/goal-v0", obs_keys=k) for k in ("observation", ["observation"]))
    assert one.rows.obs[0].tolist() == [1, 1, 1]
    assert one.sha256 == listed.sha256


def test_metadata_that_lies_about_the_size(write_minari: Write) -> None:
    meta = write_minari("toy/set-v0", EPISODES) / "data/metadata.json"
    want, info = load_dataset("toy/set-v0").sha256, json.loads(meta.read_text())
    for said in (3, 1000, 10**15, "many", None):
        meta.write_text(json.dumps(info | {"total_steps": said}))
        assert load_dataset("toy/set-v0").sha256 == want


def test_d4rl_id_of_a_downloaded_file(write_d4rl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path / "minari"))
    fails("hopper-medium-v2", "rlctl data download hopper-medium-v2")
    write_d4rl("hopper_medium-v2.hdf5", EPISODES)  # the name D4RL itself gives it
    assert load_dataset("hopper-medium-v2").record()["dataset"] == "hopper-medium-v2"


@pytest.mark.parametrize("kind", ["npz", "compat", "arrow"])
def test_memory_stays_near_the_arrays(write_npz: Write, write_d4rl: Write, write_minari: Write, kind: str) -> None:
    import tracemalloc

    episodes = [episode(0, 1000)] * 40
    view: Any = "exact"
    if kind == "npz":
        source = str(write_npz("x.npz", flat(episodes)))
    elif kind == "compat":
        source, view = str(write_d4rl("x.hdf5", episodes)), "d4rl_compat"
    else:
        pytest.importorskip("pyarrow.parquet")
        write_minari(source := "toy/set-v0", episodes, storage="arrow")
    tracemalloc.start()
    data = load_dataset(source, view=view)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.3 * sum(x.nbytes for x in data.rows[:6]) + 2**20
