import json
import tracemalloc
from pathlib import Path
from typing import Any

import gymnasium as gym
import h5py
import minari
import numpy as np
import pytest
import torch
from dataset_files import Write, episode, hide
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlctl.data import Mix, Ring, arrays
from rlctl.data.dataset import Dataset, DatasetError, load_dataset, named_task
from rlctl.experiment import resolve
from rlctl.types import Batch

BOX = gym.spaces.Box(-np.inf, np.inf, (3,), np.float64)


def fails(source: str | Path, match: str) -> None:
    with pytest.raises(DatasetError, match=match) as caught:
        load_dataset(str(source))
    assert "\n" not in str(caught.value)


def table(n: int = 10, ends: tuple[int, ...] = (4, 10), **kw: Any) -> Dataset:
    flags = torch.zeros(n, dtype=torch.bool)
    obs = torch.arange(3.0 * n).reshape(n, 3)
    return Dataset(Batch(obs, obs[:, :2], torch.ones(n), obs + 1, flags, flags), torch.tensor(ends), id="t", **kw)


# ------------------------------------------------------------------------------------------------------------- Minari
def test_minari_exact_view(write_minari: Write) -> None:
    write_minari(
        "toy/set-v0", [episode(0, 4, "terminated"), episode(1, 3), episode(2, 1, "terminated")], env="Hopper-v5"
    )
    data = load_dataset("toy/set-v0")
    rows = data.rows
    assert (len(data), data.spec_dims, data.id, data.env_id) == (8, (3, 2), "toy/set-v0", "Hopper-v5")
    assert all(x.dtype == torch.float32 for x in rows[:4])
    assert all(x.dtype == torch.bool for x in rows[4:6])
    assert data.episode_ends.tolist() == [4, 7, 8]
    assert data.boundary.nonzero().flatten().tolist() == [3, 6, 7]
    torch.testing.assert_close(rows.next_obs, rows.obs + 1)  # never across episodes, exact at every end
    assert rows.terminated.nonzero().flatten().tolist() == [3, 7]
    assert rows.truncated.nonzero().flatten().tolist() == [6]
    assert data.episode_returns().dtype == torch.float64
    np.testing.assert_allclose(data.episode_returns(), [6.0, 3.3, 0.2])


def test_minari_agrees_with_minaris_own_reader(write_minari: Write) -> None:
    write_minari("toy/set-v0", [episode(k, 2 + k) for k in range(12)])  # episode_10 sorts before episode_2 as text
    data = load_dataset("toy/set-v0")
    theirs = list(minari.load_dataset("toy/set-v0").iterate_episodes())
    start = 0
    for e, end in zip(theirs, data.episode_ends.tolist(), strict=True):
        part = data.rows.map(lambda x, a=start, b=end: x[a:b])  # type: ignore[misc]
        np.testing.assert_array_equal(part.obs, e.observations[:-1])
        np.testing.assert_array_equal(part.next_obs, e.observations[1:])
        np.testing.assert_array_equal(part.action, e.actions)
        np.testing.assert_array_equal(part.reward, e.rewards.astype(np.float32))
        start = end


def test_minari_unfinished_episode_is_truncated(write_minari: Write) -> None:
    write_minari("toy/set-v0", [episode(0, 3, "open"), episode(1, 2, "terminated")])
    rows = load_dataset("toy/set-v0").rows
    assert rows.truncated.tolist() == [False, False, True, False, False]
    assert rows.terminated.tolist() == [False, False, False, False, True]


def test_minari_flag_inside_a_stored_episode_ends_one(write_minari: Write) -> None:
    e = episode(0, 5)
    e["terminations"] = np.arange(5) == 2
    write_minari("toy/set-v0", [e])
    data = load_dataset("toy/set-v0")
    assert data.episode_ends.tolist() == [3, 5]
    assert data.episode_returns().tolist() == [3.0, 7.0]


def test_minari_both_flags_are_kept(write_minari: Write) -> None:
    e = episode(0, 3, "terminated")
    write_minari("toy/set-v0", [e | {"truncations": e["terminations"]}])
    rows = load_dataset("toy/set-v0").rows
    assert rows.terminated[-1]
    assert rows.truncated[-1]


def test_minari_dict_observations_in_sorted_key_order(write_minari: Write) -> None:
    space = gym.spaces.Dict(
        {"z": gym.spaces.Box(-9, 9, (1,)), "b": gym.spaces.Dict({"y": BOX, "x": BOX}), "a": gym.spaces.Box(-9, 9, (2,))}
    )
    obs = {"z": np.full((5, 1), 4), "b": {"y": np.full((5, 3), 3), "x": np.full((5, 3), 2)}, "a": np.full((5, 2), 1)}
    write_minari("toy/set-v0", [episode(0, 4) | {"observations": obs}], observation=space)
    data = load_dataset("toy/set-v0")
    assert data.spec_dims == (9, 2)
    assert data.rows.obs[0].tolist() == [1, 1, 2, 2, 2, 3, 3, 3, 4]
    sample = minari.load_dataset("toy/set-v0")[0].observations
    one = {"z": sample["z"][0], "b": {k: sample["b"][k][0] for k in "yx"}, "a": sample["a"][0]}
    np.testing.assert_allclose(data.rows.obs[0], gym.spaces.flatten(space, one))  # the order of FlattenObservation


def test_minari_arrays_may_change_their_type_between_episodes(write_minari: Write) -> None:
    """Types are compared, not only looked up by name: the leaves of a Dict share names too."""
    episodes = [episode(k, 3) for k in range(4)]
    for k, kind in ((0, np.int64), (1, np.float64), (2, ">f4"), (3, np.bool_)):
        episodes[k]["rewards"] = np.array([0.0, 1.0, 1.5]).astype(kind)
    write_minari("toy/set-v0", episodes)
    data = load_dataset("toy/set-v0")
    assert data.rows.reward.reshape(4, 3).tolist() == [[0, 1, 1], [0, 1, 1.5], [0, 1, 1.5], [0, 1, 1]]


def test_minari_actions_are_mapped_to_the_unit_box(write_minari: Write) -> None:
    space = gym.spaces.Box(np.float32([-0.4, 0]), np.float32([0.4, 2]))
    stored = np.float32([[-0.4, 0], [0, 1], [0.4, 2], [0.2, 0.5]])
    write_minari("toy/set-v0", [episode(0, 4) | {"actions": stored}], action=space)
    data = load_dataset("toy/set-v0")
    torch.testing.assert_close(data.rows.action, torch.tensor([[-1.0, -1], [0, 0], [1, 1], [0.5, -0.5]]))
    assert data.action_box is not None
    torch.testing.assert_close(data.action_box[1], torch.tensor([0.4, 2.0]))


@pytest.mark.parametrize("bound", [1.0, np.inf])
def test_minari_other_actions_are_left_alone(write_minari: Write, bound: float) -> None:
    write_minari("toy/set-v0", [episode(7, 4)], action=gym.spaces.Box(-bound, bound, (2,)))
    data = load_dataset("toy/set-v0")
    assert data.action_box is None
    assert data.rows.action[0].tolist() == pytest.approx([0.07, -0.07])


def test_sources_id_folder_and_file_are_one(write_minari: Write) -> None:
    folder = write_minari("toy/set-v0", [episode(0, 4)])
    loaded = [load_dataset(str(s)) for s in ("toy/set-v0", folder, folder / "data", folder / "data" / "main_data.hdf5")]
    assert {d.id for d in loaded} == {"toy/set-v0"}
    assert len({d.sha256 for d in loaded}) == 1


def test_the_config_shipped_for_the_task_a_dataset_names(write_minari: Write, write_d4rl: Write) -> None:
    """Also where the task is not given: HalfCheetah's alpha of PRDC is 40. What is asked for wins."""
    write_minari("toy/cheetah-v0", [episode(0, 4)], env="HalfCheetah-v4")
    write_minari("toy/hopper-v0", [episode(0, 4)], env="Hopper-v5")
    flat = str(write_d4rl("flat.hdf5", [episode(0, 4)]))
    assert [named_task(d) for d in ("toy/cheetah-v0", "toy/hopper-v0", flat)] == ["HalfCheetah-v4", "Hopper-v5", None]
    found = {d: resolve("prdc", [{"data": d}]).agent.alpha for d in ("toy/cheetah-v0", "toy/hopper-v0", flat, "gone")}
    assert found == {"toy/cheetah-v0": 40, "toy/hopper-v0": 2.5, flat: 2.5, "gone": 2.5}
    assert resolve("prdc", [{"data": flat, "env": "HalfCheetah"}]).agent.alpha == 40
    assert resolve("prdc", [{"data": "toy/cheetah-v0", "env": "Hopper"}]).agent.alpha == 2.5
    assert resolve("prdc", [{"data": "toy/cheetah-v0", "alpha": 1}]).agent.alpha == 1


def test_missing_id_names_the_nearest(write_minari: Write, root: Path) -> None:
    fails("hopper/medium-v0", "there is none; MINARI_DATASETS_PATH")
    fails("hopper-meduim-v2", r"\(D4RL has hopper-medium-v2, .*`rlctl data download hopper-medium-v2`")
    fails("nosuch", r"`rlctl data list --remote` names the public ones")  # no id that could be downloaded
    write_minari("hopper/medium-v0", [episode(0, 2)])
    write_minari("door/human-v2", [episode(0, 2)])
    fails("hopper/medum-v0", r"nearest there: hopper/medium-v0.*rlctl data download")
    fails("zzz/qqq-v0", r"none of the 2 there has a name like it: rlctl data list\); `rlctl data download zzz/qqq-v0`")
    fails("hopper-meduim-v2", r"nearest there: hopper/medium-v0; D4RL has hopper-medium-v2, ")
    (root / "hopper/medium-v0/data/main_data.hdf5").unlink()
    fails("hopper/medium-v0", "main_data.hdf5: the dataset is incomplete")
    (root / "door/human-v2/data/metadata.json").unlink()
    fails("door/human-v2", "door/human-v2/data has episodes but no metadata.json")


def test_minari_damage(write_minari: Write) -> None:
    folder = write_minari("toy/set-v0", [episode(0, 4), episode(1, 4)])
    main, meta = folder / "data/main_data.hdf5", folder / "data/metadata.json"
    whole, info = main.read_bytes(), meta.read_text()

    def edit(change: Any) -> None:
        main.write_bytes(whole)
        with h5py.File(main, "a") as file:
            change(file["episode_1"])

    edit(lambda g: g["actions"].resize(3, 0))
    fails("toy/set-v0", r"episode_1: actions has shape \(3, 2\), expected 4 rows")
    edit(lambda g: g["observations"].resize(4, 0))
    fails("toy/set-v0", "episode_1: observations has shape .*, expected 5 rows")
    edit(lambda g: g.__delitem__("truncations"))
    fails("toy/set-v0", "no 'truncations' in /episode_1")
    edit(lambda g: (g.pop("truncations"), g.create_dataset("truncations", data=[0, 0, 0, 0.5])))
    fails("toy/set-v0", "episode_1: truncations holds values other than 0 and 1 in 1 rows, first 0.5 in row 3")
    edit(lambda g: g["observations"].__setitem__((2, 1), np.nan))
    fails("toy/set-v0", r"obs of transition 6 \(episode 1\) is NaN")
    main.write_bytes(whole[: len(whole) // 2])
    fails("toy/set-v0", "main_data.hdf5 is not a whole HDF5 file")
    main.write_bytes(whole)
    for text, message in [
        ("{", "metadata.json cannot be read"),
        ("[]", "not a JSON object"),
        (json.dumps(json.loads(info) | {"data_format": "csv"}), "stored as csv; known are hdf5, arrow and parquet"),
    ]:
        meta.write_text(text)
        fails("toy/set-v0", message)
    meta.write_text(info)
    edit(lambda g: g.file.move("episode_1", "episode_x"))
    fails("toy/set-v0", "'episode_x' has no number, as in episode_0")
    edit(lambda g: g.file.__delitem__("episode_1"))
    with h5py.File(main, "a") as file:
        file["episode_1"] = np.zeros(4)
    fails("toy/set-v0", "no 'rewards' in /episode_1|no 'observations' in /episode_1")


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("action_space", '{"type":', r"the action space is damaged \(Expecting value"),
        ("action_space", '{"shape": [2]}', r"the action space is damaged \(it has no 'type'\)"),
        ("action_space", '{"type": "Box", "shape": [2], "high": [1, 1]}', r"the action space is .*no 'low'\)"),
        ("action_space", '{"type": "Box", "shape": ["a"], "low": 0, "high": 1}', "the action space is damaged"),
        ("observation_space", "[1]", "the observation space is damaged"),
        ("observation_space", '{"type": "Dict", "subspaces": {"a": {"type": "Box"}}}', "observation.*no 'shape'"),
        ("observation_space", 3, "the observation space is damaged"),
        (
            "env_spec",
            '{"max_episode_steps": "many"}',
            "max_episode_steps of its env_spec is 'many', not a whole number",
        ),
        ("env_spec", '{"max_episode_steps": 2.5}', "max_episode_steps of its env_spec is 2.5"),
        ("env_spec", '{"kwargs": [1]}', r"kwargs of its env_spec is \[1\], not a JSON object"),
    ],
)
def test_minari_damaged_metadata(write_minari: Write, key: str, value: Any, message: str) -> None:
    meta = write_minari("toy/set-v0", [episode(0, 4)]) / "data/metadata.json"
    meta.write_text(json.dumps(json.loads(meta.read_text()) | {key: value}))
    fails("toy/set-v0", rf"metadata.json: .*{message}")
    if key != "env_spec":
        with pytest.raises(DatasetError, match=message):
            load_dataset("toy/set-v0", view="d4rl_compat")


def test_minari_limit_that_is_none(write_minari: Write) -> None:
    meta = write_minari("toy/set-v0", [episode(0, 4)]) / "data/metadata.json"
    for said, limit in ((-1, None), (None, None), (7.0, 7)):
        meta.write_text(
            json.dumps(json.loads(meta.read_text()) | {"env_spec": json.dumps({"max_episode_steps": said})})
        )
        assert load_dataset("toy/set-v0").origin.episode_len == limit


def test_minari_without_spaces_or_env_in_its_metadata(write_minari: Write) -> None:
    meta = write_minari("toy/set-v0", [episode(0, 4)]) / "data/metadata.json"
    meta.write_text('{"env_spec": "nonsense"}')
    data = load_dataset("toy/set-v0")
    assert (len(data), data.env_id, data.id) == (4, None, "set-v0")


@pytest.mark.parametrize(
    ("change", "spaces", "message"),
    [
        ({"observations": np.zeros(5, int)}, {"observation": gym.spaces.Discrete(4)}, "observation space is Discrete"),
        ({"actions": np.zeros(4, int)}, {"action": gym.spaces.Discrete(4)}, "action space is Discrete"),
        (
            {"observations": {"goal": np.zeros(5, int), "state": np.zeros((5, 3))}},
            {"observation": gym.spaces.Dict(goal=gym.spaces.Discrete(2), state=BOX)},
            "observation 'goal' space is Discrete",
        ),
        (
            {"observations": np.zeros((5, 4, 4))},
            {"observation": gym.spaces.Box(0, 1, (4, 4))},
            r"Box of shape \(4, 4\)",
        ),
    ],
)
def test_spaces_that_are_not_vectors(
    write_minari: Write, change: dict[str, Any], spaces: dict[str, Any], message: str
) -> None:
    write_minari("toy/set-v0", [episode(0, 4) | change], **spaces)
    fails("toy/set-v0", message)


def test_no_h5py(write_d4rl: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_d4rl("x.hdf5", [episode(0, 4)])
    hide(monkeypatch, "h5py")
    fails(path, r"h5py: pip install 'minari\[hdf5\]'")


# --------------------------------------------------------------------------------------------------------------- D4RL
THREE = [episode(0, 4, "terminated"), episode(1, 3), episode(2, 5, "open")]


def test_d4rl_with_successors_keeps_every_row(write_d4rl: Write) -> None:
    data = load_dataset(str(write_d4rl("hopper_medium-v2.hdf5", THREE)))
    assert (data.id, data.env_id, len(data)) == ("hopper_medium-v2", None, 12)
    assert data.episode_ends.tolist() == [4, 7, 12]
    torch.testing.assert_close(data.rows.next_obs, data.rows.obs + 1)
    assert data.rows.terminated.nonzero().flatten().tolist() == [3]
    assert data.rows.truncated.nonzero().flatten().tolist() == [6, 11]
    np.testing.assert_allclose(data.episode_returns(), [6.0, 3.3, 11.0], rtol=1e-6)


def test_d4rl_without_successors_drops_only_unknown_ones(write_d4rl: Write) -> None:
    data = load_dataset(str(write_d4rl("x.hdf5", THREE, drop=("next_observations",))))
    assert data.episode_ends.tolist() == [4, 6, 10]
    rows = data.rows
    masked = rows.terminated
    torch.testing.assert_close(rows.next_obs[~masked], rows.obs[~masked] + 1)
    torch.testing.assert_close(rows.next_obs[masked], rows.obs[masked])
    assert masked.nonzero().flatten().tolist() == [3]
    assert rows.truncated.nonzero().flatten().tolist() == [5, 9]
    np.testing.assert_allclose(data.episode_returns(), [6.0, 3.3, 11.0], rtol=1e-6)  # the dropped rewards count


def test_d4rl_episode_of_one_unknown_successor_leaves_nothing(write_d4rl: Write) -> None:
    path = write_d4rl("x.hdf5", [episode(0, 3), episode(1, 1), episode(2, 3)], drop=("next_observations",))
    data = load_dataset(str(path))
    assert data.episode_ends.tolist() == [2, 4]
    np.testing.assert_allclose(data.episode_returns(), [3.0, 3.6], rtol=1e-6)
    path = write_d4rl("y.hdf5", [episode(0, 1), episode(1, 1)], drop=("next_observations",))
    fails(path, "no transition whose successor is known")


def test_d4rl_without_timeouts_finds_the_jumps(write_d4rl: Write) -> None:
    data = load_dataset(str(write_d4rl("x.hdf5", THREE, drop=("timeouts",))))
    assert data.episode_ends.tolist() == [4, 7, 12]
    assert data.rows.truncated.nonzero().flatten().tolist() == [6, 11]


def test_d4rl_timeouts_that_miss_ends(write_d4rl: Write) -> None:
    """The exact view ends episodes at the jumps too; D4RL's pairs go by the flags."""
    path = write_d4rl("x.hdf5", THREE, timeouts=np.zeros(12, bool))
    data = load_dataset(str(path))
    assert data.episode_ends.tolist() == [4, 7, 12]
    assert data.rows.truncated.nonzero().flatten().tolist() == [6, 11]
    assert data.origin.unflagged_ends == 1
    assert load_dataset(str(path), view="d4rl_compat").episode_ends.tolist() == [4, 11]


@pytest.mark.parametrize("drop", [(), ("timeouts",)])
def test_d4rl_successors_that_differ_by_rounding_are_no_jumps(write_d4rl: Write, drop: tuple[str, ...]) -> None:
    following = np.concatenate([e["observations"][1:] for e in THREE])
    following[[1, 5]] *= 1 + 4e-7
    data = load_dataset(str(write_d4rl("x.hdf5", THREE, next_observations=following, drop=drop)))
    assert data.episode_ends.tolist() == [4, 7, 12]
    assert data.origin.unflagged_ends == 0


def test_d4rl_without_either_needs_the_step_limit(write_d4rl: Write) -> None:
    episodes = [episode(0, 2, "terminated"), episode(1, 3), episode(2, 3), episode(3, 1, "open")]
    path = write_d4rl("x.hdf5", episodes, drop=("timeouts", "next_observations"))
    fails(path, "pass episode_len")
    data = load_dataset(str(path), episode_len=3)
    assert data.episode_ends.tolist() == [2, 4, 6]
    live = ~data.rows.terminated
    torch.testing.assert_close(data.rows.next_obs[live], data.rows.obs[live] + 1)
    for wrong in (0, "abc", 2.5):
        for source in (path, write_d4rl("flagged.hdf5", episodes)):  # also where it is not needed
            with pytest.raises(DatasetError, match=rf"at least one step.*got episode_len={wrong!r}"):
                load_dataset(str(source), episode_len=wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("chunks", [(7, 2), (100, 3), None])
def test_d4rl_arrays_are_read_in_whole_chunks(
    chunks: tuple[int, int] | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(arrays, "BLOCK", 16)
    obs = np.random.default_rng(0).normal(size=(101, 3)).astype(np.float32)
    flat = {"actions": obs[:, :1] / 9, "rewards": obs[:, 0], "terminals": np.arange(101) % 10 == 9}
    with h5py.File(tmp_path / "x.hdf5", "w") as file:
        file.create_dataset("observations", data=obs, chunks=chunks, compression="gzip" if chunks else None)
        for name, x in (flat | {"timeouts": np.zeros(101, bool)}).items():
            file.create_dataset(name, data=x)
    torch.testing.assert_close(load_dataset(str(tmp_path / "x.hdf5")).rows.obs, torch.from_numpy(obs[:-1]))


def test_actions_of_no_number_are_refused(tmp_path: Path) -> None:
    none = {"rewards": np.zeros(4), "terminals": np.array([0, 0, 0, 1]), "timeouts": np.zeros(4)}
    np.savez(tmp_path / "a.npz", observations=np.zeros((4, 3)), actions=np.zeros((4, 0)), **none)  # type: ignore[arg-type]
    fails(tmp_path / "a.npz", "observations of 3 and actions of 0 numbers: both need one")


def test_d4rl_columns_of_width_one(write_d4rl: Write) -> None:
    flat = load_dataset(str(write_d4rl("x.hdf5", THREE)))
    terminals = np.concatenate([e["terminations"] for e in THREE])[:, None].astype(np.uint8)
    rewards = np.concatenate([e["rewards"] for e in THREE])[:, None].astype(np.float32)
    assert load_dataset(str(write_d4rl("y.hdf5", THREE, terminals=terminals, rewards=rewards))).sha256 == flat.sha256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"drop": ("rewards",)}, "no 'rewards' in / .*present: actions"),
        ({"actions": np.zeros((11, 2))}, r"actions has shape \(11, 2\), expected 12 rows"),
        ({"rewards": np.zeros((12, 2))}, r"rewards has shape \(12, 2\), expected \[N\]"),
        ({"observations": np.zeros(12)}, r"observations has shape \(12,\), expected \[N, D\]"),
        ({"next_observations": np.zeros((12, 2))}, "next_observations has shape"),
        ({"rewards": np.full(12, np.inf)}, r"reward of transition 0 \(episode 0\) is NaN or infinite"),
        ({"next_observations": np.full((12, 3), np.nan)}, "next_obs of transition 0"),
        ({"actions": np.full((12, 2), b"x")}, "actions holds .*, not numbers"),
        (
            {"terminals": np.eye(12)[3] * np.nan},
            "terminals holds values other than 0 and 1 in 12 rows, first nan in row 0",
        ),
        ({"timeouts": np.eye(12)[3] / 2}, "timeouts holds values other than 0 and 1 in 1 rows, first 0.5 in row 3"),
        ({"timeouts": np.eye(12, dtype=int)[3] * -1}, "first -1 in row 3"),
    ],
)
def test_d4rl_damage(write_d4rl: Write, change: dict[str, Any], message: str) -> None:
    fails(write_d4rl("x.hdf5", THREE, **change), message)


def test_d4rl_missing_empty_and_cut_files(write_d4rl: Write, tmp_path: Path) -> None:
    fails(tmp_path / "hopper.hdf5", "no HDF5 file is in that folder")
    path = write_d4rl("hopper_medium-v2.hdf5", THREE)
    fails(tmp_path / "hoper_medium-v2.hdf5", r"nearest there: hopper_medium-v2.hdf5")
    fails(tmp_path / "q.npz", r"nothing there has a name like it; the first of 1: hopper_medium-v2.hdf5")
    path.write_bytes(path.read_bytes()[:-100])
    fails(path, "not a whole HDF5 file .*truncated")
    path.write_text("hello")
    fails(path, "not a whole HDF5 file")
    shapes = {"observations": (0, 3), "next_observations": (0, 3), "actions": (0, 2)}
    empty = {k: np.zeros(shapes.get(k, 0)) for k in (*shapes, "rewards", "terminals", "timeouts")}
    fails(write_d4rl("x.hdf5", THREE, **empty), "holds no transitions")


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    shape=st.lists(st.tuples(st.integers(1, 6), st.sampled_from(["terminated", "truncated"])), min_size=1, max_size=8),
    block=st.integers(1, 7),
    successors=st.booleans(),
)
def test_d4rl_reader_against_a_slow_reference(
    write_d4rl: Write, shape: list[tuple[int, str]], block: int, successors: bool
) -> None:
    episodes = [episode(k, steps, end) for k, (steps, end) in enumerate(shape)]
    expected = []
    for e in episodes:
        steps = len(e["rewards"])
        for t in range(steps):
            last, term = t == steps - 1, bool(e["terminations"][t])
            if last and not term and not successors:
                continue
            following = e["observations"][t if term and not successors else t + 1]
            cut = not bool(e["terminations"][-1]) and t == steps - (1 if successors else 2)
            expected.append((e["observations"][t], e["rewards"][t], following, term, cut))
    path = write_d4rl("x.hdf5", episodes, drop=() if successors else ("next_observations",))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("rlctl.data.arrays.BLOCK", block)  # every way a block can fall across an episode
        if not expected:
            fails(path, "no transition")
            return
        rows = load_dataset(str(path)).rows
    for got, want in zip(
        (rows.obs, rows.reward, rows.next_obs, rows.terminated, rows.truncated),
        zip(*expected, strict=True),
        strict=True,
    ):
        np.testing.assert_array_equal(got, np.asarray(want, got.numpy().dtype))


@pytest.mark.parametrize("kind", ["minari", "d4rl", "d4rl without successors"])
def test_memory_stays_near_the_arrays(write_minari: Write, write_d4rl: Write, root: Path, kind: str) -> None:
    episodes = [episode(0, 1000)] * 40
    if kind == "minari":
        write_minari("toy/set-v0", episodes)
        source = "toy/set-v0"
    else:
        source = str(write_d4rl("x.hdf5", episodes, drop=("next_observations",) if "without" in kind else ()))
    tracemalloc.start()
    data = load_dataset(source)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    # Narrow rows of 47 bytes: what the float64 rewards add weighs most here.
    assert peak < 1.3 * sum(x.nbytes for x in data.rows[:6]) + 2**20


# ------------------------------------------------------------------------------------------------------------ Dataset
def test_sampling_is_uniform_reproducible_and_whole_rows() -> None:
    a, b, c = table(seed=3), table(seed=3), table(seed=4)
    x, y, z = a.sample(2000), b.sample(2000), c.sample(2000)
    torch.testing.assert_close(x.obs, y.obs)
    assert not torch.equal(x.obs, z.obs)
    torch.testing.assert_close(x.next_obs, x.obs + 1)
    counts = torch.bincount((x.obs[:, 0] / 3).long(), minlength=10)
    assert counts.min() > 140
    assert a.whole() is a.rows


def test_stats_against_numpy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlctl.data.arrays.BLOCK", 3)
    data = table()
    s = data.stats()
    assert (s.transitions, s.episodes) == (10, 2)
    assert (s.return_mean, s.return_std, s.return_min, s.return_max) == (5.0, 1.0, 4.0, 6.0)
    np.testing.assert_allclose(s.obs_mean, data.rows.obs.numpy().mean(0))
    np.testing.assert_allclose(s.obs_std, data.rows.obs.numpy().std(0))
    assert data.stats() is s


@pytest.mark.parametrize("ends", [(), (4,), (4, 4, 10), (10, 4), (4, 12)])
def test_episode_ends_must_fit(ends: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="ascend"):
        table(ends=ends)


def test_fingerprint_depends_on_every_column_and_on_the_episodes() -> None:
    seen = {table().sha256, table(ends=(5, 10)).sha256}
    for k in range(6):
        columns = list(table().rows[:6])
        columns[k] = columns[k].clone()
        columns[k][0] = 1 - columns[k][0].float()  # type: ignore[assignment]
        seen.add(Dataset(Batch(*columns), torch.tensor([4, 10]), id="t").sha256)  # type: ignore[arg-type]
    assert len(seen) == 8
    assert table(seed=5).sha256 == table().sha256


def test_checkpoint_resumes_the_sampling_and_refuses_other_data(tmp_path: Path) -> None:
    data = table()
    data.sample(5)
    data.save(tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["dataset.safetensors"]
    ahead = data.sample(7).obs
    fresh = table(seed=9)
    fresh.load(tmp_path)
    torch.testing.assert_close(fresh.sample(7).obs, ahead)
    with pytest.raises(DatasetError, match="resume with the data the run was started with"):
        table(ends=(5, 10)).load(tmp_path)


def test_mix_checkpoints_the_generator_of_a_dataset(tmp_path: Path) -> None:
    def build(seed: int) -> Mix:
        ring = Ring(4, seed=seed)
        ring.add(table(4, (4,)).rows.map(lambda x: -x if x.dtype != torch.bool else x))
        return Mix(table(seed=seed), ring, 0.5)

    mix = build(0)
    mix.sample(6)
    mix.save(tmp_path)
    ahead = mix.sample(8)
    fresh = build(1)
    fresh.load(tmp_path)
    torch.testing.assert_close(fresh.sample(8).obs, ahead.obs)
    assert (ahead.obs[:4] >= 0).all()
    assert (ahead.obs[4:] <= 0).all()


@pytest.mark.gpu
def test_on_a_cuda_device(write_d4rl: Write) -> None:
    path = str(write_d4rl("x.hdf5", THREE))
    data = load_dataset(path, device="cuda")
    assert data.sample(4).obs.is_cuda
    assert data.sha256 == load_dataset(path).sha256
    assert data.stats().return_max == pytest.approx(11.0)


# -------------------------------------------------------------------------------------------------------- best episodes
def numbered(returns: list[float]) -> Dataset:
    """Episode k has k % 3 + 1 rows, each showing k, and the given return in its last reward."""
    lengths = torch.tensor([k % 3 + 1 for k in range(len(returns))])
    ends, episode = lengths.cumsum(0), torch.arange(len(returns)).repeat_interleave(lengths)
    reward = torch.zeros(len(episode))
    reward[ends - 1] = torch.tensor(returns)
    flag = torch.zeros(len(episode), dtype=torch.bool)
    obs = episode[:, None].float()
    extra = {"t": obs[:, 0].clone()}
    return Dataset(Batch(obs, obs.clone(), reward, obs.clone(), flag, flag, extra), ends, id="numbered", seed=3)


@pytest.mark.parametrize(
    ("num", "share", "kept"), [(10, 0.1, 1), (11, 0.1, 2), (30, 0.1, 3), (4, 0.01, 1), (7, 1.0, 7)]
)
def test_best_episodes_are_whole_and_counted_upwards(num: int, share: float, kept: int) -> None:
    data = numbered(torch.randperm(num, generator=torch.Generator().manual_seed(num)).float().tolist())
    best = data.best_episodes(share)
    assert len(best.episode_ends) == kept
    assert sorted(best.episode_returns().tolist()) == list(range(num - kept, num))
    chosen = data.episode_returns().argsort(descending=True)[:kept].sort().values
    expected = torch.cat([torch.full((int(k) % 3 + 1,), float(k)) for k in chosen])
    for column in (best.rows.obs[:, 0], best.rows.action[:, 0], best.rows.extra["t"]):
        assert torch.equal(column, expected)
    assert best.share == share
    assert (best.id, data.share) == ("numbered", 1.0)


def test_best_episodes_of_equal_returns_are_the_earlier_ones() -> None:
    best = numbered([5.0, 7.0, 5.0, 5.0]).best_episodes(0.75)
    assert best.rows.obs[:, 0].unique().tolist() == [0.0, 1.0, 2.0]
    assert best.best_episodes(0.5).share == 0.375


@pytest.mark.parametrize("share", [0.0, -0.1, 1.1])
def test_best_episodes_of_no_share(share: float) -> None:
    with pytest.raises(ValueError, match="share"):
        numbered([1.0]).best_episodes(share)
