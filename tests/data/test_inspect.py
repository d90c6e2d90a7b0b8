"""`verify` finds what breaks training, `summarize` says what there is."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from dataset_files import Episode, Write, episode

from rlctl.data import inspect
from rlctl.data.arrays import DatasetError
from rlctl.data.dataset import read
from rlctl.data.reference import dataset_labels, score_table

EPISODES = [episode(0, 4, "terminated"), episode(1, 3), episode(2, 5, "terminated"), episode(3, 6)]
ACTIONS = np.linspace(-1, 1, 36).reshape(18, 2).astype(np.float32)
N = 18


def errors(path: Path | str, **kw: Any) -> list[str]:
    return [f"{f.about}: {f.message}" for f in inspect.verify(str(path), **kw) if f.level == "error"]


def one(path: Path | str, *words: str, **kw: Any) -> None:
    found = errors(path, **kw)
    assert len(found) == 1, found
    assert "\n" not in found[0]
    assert [w for w in words if w not in found[0]] == []


def test_a_sound_set_has_no_findings(write_d4rl: Write, write_minari: Write) -> None:
    assert inspect.verify(str(write_d4rl("x.hdf5", EPISODES, actions=ACTIONS))) == []
    write_minari("toy/set-v0", [e | {"actions": ACTIONS[: len(e["rewards"])]} for e in EPISODES], env="Hopper-v5")
    assert inspect.verify("toy/set-v0") == []


def test_next_obs_that_is_a_copy(write_d4rl: Write) -> None:
    obs = np.concatenate([e["observations"][:-1] for e in EPISODES])
    one(write_d4rl("x.hdf5", EPISODES, next_observations=obs), "next_obs: is a copy of obs in 100%")


def test_next_obs_that_does_not_follow(write_d4rl: Write) -> None:
    following = np.concatenate([e["observations"][1:] for e in EPISODES])
    path = write_d4rl("x.hdf5", EPISODES, next_observations=following + 0.5)
    one(path, "next_obs: is not the observation of the row that follows", "in 14 of 14 rows", "first in row 0")


def test_next_obs_of_a_file_that_does_not_tell_its_episodes(write_d4rl: Write) -> None:
    """Without timeouts every row that does not go on is an end: successors that never do would hide behind that."""
    obs = np.concatenate([e["observations"][:-1] for e in EPISODES])
    garbage = np.random.default_rng(0).normal(size=obs.shape).astype(np.float32)
    for name, bad in (("copy.hdf5", obs), ("garbage.hdf5", garbage)):
        path = write_d4rl(name, EPISODES, drop=("timeouts",), next_observations=bad)
        found = errors(path)
        assert "in only 0% of the rows, so episodes cannot be told" in found[0]
        assert "--episode-len 1000" in found[0]
        assert "data_options.episode_len=1000" in found[0]
        assert len(found) == (2 if bad is obs else 1)
        with pytest.raises(DatasetError, match="episodes cannot be told"):
            read(str(path))
    one(path, "next_obs: is not the observation of the row that follows", episode_len=6)
    one(write_d4rl("x.hdf5", EPISODES, drop=("timeouts",), next_observations=obs), "is a copy of obs", episode_len=6)
    # a copy in rows that were cut is one too, whatever the flags
    short = [episode(k, 1) for k in range(3)]
    where = np.concatenate([e["observations"][:-1] for e in short])
    one(write_d4rl("y.hdf5", short, next_observations=where), "is a copy of obs in 100%")


def test_timeouts_that_miss_ends(write_d4rl: Write) -> None:
    episodes = [episode(k % 9, 40) for k in range(20)]
    timeouts = np.concatenate([e["truncations"] for e in episodes])
    one(
        write_d4rl("x.hdf5", episodes, timeouts=np.zeros(800, bool)),
        "timeouts: not set in 19 rows whose next_obs is not the observation of the row that follows",
        "20 in all",
    )
    timeouts[79] = False
    [seam] = inspect.verify(str(write_d4rl("y.hdf5", episodes, timeouts=timeouts)))
    assert (seam.level, seam.about, seam.message[:17]) == ("note", "timeouts", "not set in 1 rows")


def test_next_obs_of_a_reset(write_d4rl: Write) -> None:
    """An environment that resets by itself gives the next episode's first observation in the place of the last one."""
    episodes = [episode(k, 20) for k in range(6)]
    obs = np.concatenate([e["observations"][:-1] for e in episodes])
    following = np.concatenate([obs[1:], episodes[-1]["observations"][-1:]])
    one(
        write_d4rl("x.hdf5", episodes, next_observations=following),
        "next_obs: is the first observation of the next episode in 5 of 5 truncated rows",
    )
    # the successor of a terminal row is masked
    ended = [episode(k, 20 + k, "terminated") for k in range(6)]
    obs = np.concatenate([e["observations"][:-1] for e in ended])
    assert errors(write_d4rl("y.hdf5", ended, next_observations=np.concatenate([obs[1:], obs[-1:]]))) == []
    # no reset, only a new goal: the next episode begins where this one ended
    walk = np.random.default_rng(0).normal(size=(121, 3)).cumsum(0)
    walk[:, 2] = np.arange(121) // 20
    assert errors(write_d4rl("z.hdf5", episodes, observations=walk[:-1], next_observations=walk[1:])) == []


def test_files_without_timeouts_that_do_tell(write_d4rl: Write) -> None:
    drop = ("timeouts",)
    assert inspect.verify(str(write_d4rl("x.hdf5", EPISODES, actions=ACTIONS, drop=drop))) == []
    bandit = [episode(k, 1, "terminated") for k in range(18)]
    assert inspect.verify(str(write_d4rl("bandit.hdf5", bandit, actions=ACTIONS, drop=drop))) == []
    # rows in no order: each is an episode of its own if the user says so
    order = np.random.default_rng(0).permutation(N)
    rows = {
        "observations": np.concatenate([e["observations"][:-1] for e in EPISODES])[order],
        "next_observations": np.concatenate([e["observations"][1:] for e in EPISODES])[order],
        "terminals": np.zeros(N, bool),
    }
    path = write_d4rl("shuffled.hdf5", EPISODES, actions=ACTIONS, drop=drop, **rows)
    assert [f.about for f in inspect.verify(str(path))] == ["data"]
    assert inspect.verify(str(path), episode_len=1) == []
    assert len(read(str(path), episode_len=1)[0].ends) == N


def test_terminals_at_the_time_limit(write_d4rl: Write, write_minari: Write) -> None:
    cut = [episode(k, 6, "terminated") for k in range(3)] + [episode(3, 2, "terminated")]
    path = write_d4rl("x.hdf5", cut)
    one(path, "terminated: set on the last row of 3 episodes of exactly 6 steps, the greatest length")
    one(path, "the time limit", episode_len=6)
    assert errors(path, episode_len=7) == []
    # a single one that fell at its greatest length is no sign of it, nor is one among others that were cut
    assert errors(write_d4rl("y.hdf5", cut[:1])) == []
    assert errors(write_d4rl("z.hdf5", [*cut[:2], episode(4, 6)])) == []
    # the limit of the environment it was recorded in
    write_minari("toy/set-v0", [episode(0, 1000, "terminated"), episode(1, 3, "terminated")], env="Hopper-v5")
    one("toy/set-v0", "1 episodes of exactly 1000 steps, the time limit")
    # episodes of one step are those of a bandit, which ends by itself
    assert errors(write_d4rl("bandit.hdf5", [episode(k, 1, "terminated") for k in range(4)])) == []


def test_terminals_at_the_time_limit_that_carry_both_flags(write_d4rl: Write, write_minari: Write) -> None:
    def both(number: int, steps: int) -> Episode:
        e = episode(number, steps)
        return e | {"terminations": e["truncations"]}

    ended = episode(9, 2, "terminated")
    path = write_d4rl("x.hdf5", [*(both(k, 6) for k in range(3)), ended])
    one(path, "terminated: set beside truncated on the last row of 3 episodes of exactly 6 steps, the greatest length")
    one(path, "3 episodes of exactly 6 steps, the time limit", episode_len=6)
    write_minari("toy/set-v0", [both(0, 1000), both(1, 1000)], env="Hopper-v5")
    one("toy/set-v0", "beside truncated on the last row of 2 episodes of exactly 1000 steps, the time limit")
    # an end that fell on the limit is a note, among others that were cut or by itself
    for drop in ((), ("next_observations",)):
        mixed = write_d4rl("y.hdf5", [both(0, 6), both(1, 6), *(episode(k, 6) for k in range(2, 5)), ended], drop=drop)
        alone = write_d4rl("z.hdf5", [both(0, 6), ended], drop=drop)
        assert errors(mixed, episode_len=6) == errors(mixed) == errors(alone, episode_len=6) == errors(alone) == []


def test_a_tie_at_the_greatest_length_is_not_a_time_limit(write_d4rl: Write) -> None:
    """A random policy's episodes end anywhere: two or three of the longest may be equal by chance."""

    def found(lengths: list[int]) -> list[str]:
        return errors(write_d4rl("x.hdf5", [episode(k % 9, n, "terminated") for k, n in enumerate(lengths)]))

    assert found([5, 9, 14, 11, 28, 19, 23, 28]) == []
    assert found([28, 28, 28, 27, 25, 22, 19]) == []  # close to others
    assert found([40] * 3 + [2, 3] * 149) == []  # 1 % of the episodes at least
    assert len(found([40] * 4 + [2, 3] * 149)) == 1
    assert found(np.random.default_rng(1).integers(3, 30, 200).tolist()) == []


def test_episodes_longer_than_the_limit(write_d4rl: Write) -> None:
    one(write_d4rl("x.hdf5", EPISODES[1:]), "length: 2 episodes are longer than the limit of 4", episode_len=4)


def test_unequal_lengths_are_all_named(write_d4rl: Write) -> None:
    path = write_d4rl("x.hdf5", EPISODES, actions=np.zeros((17, 2)), rewards=np.zeros(16))
    found = errors(path)
    assert len(found) == 2
    assert "actions has shape (17, 2), expected 18 rows" in found[0]
    assert "rewards has shape (16,), expected 18 rows" in found[1]


def test_every_damaged_episode_is_named(write_minari: Write) -> None:
    main = write_minari("toy/set-v0", EPISODES) / "data/main_data.hdf5"
    with h5py.File(main, "a") as file:
        file["episode_1/actions"].resize(1, 0)
        file["episode_3/truncations"].resize(2, 0)
    found = errors("toy/set-v0")
    assert "episode_1: actions has shape (1, 2), expected 3 rows" in found[0]
    assert "episode_3: truncations has shape (2,), expected 6 rows" in found[1]
    assert "metadata: total_steps is 18, the data holds 9" in found[2]


def test_the_one_array_that_is_damaged_is_named(write_minari: Write) -> None:
    main = write_minari("toy/set-v0", EPISODES) / "data/main_data.hdf5"
    with h5py.File(main, "a") as file:
        file["episode_3/rewards"].resize(4, 0)
    found = errors("toy/set-v0")
    assert "episode_3: rewards has shape (4,), expected 6 rows" in found[0]
    assert len([f for f in found if "episode_3" in f]) == 1


def test_a_fault_of_every_episode_is_counted(write_minari: Write) -> None:
    main = write_minari("toy/set-v0", [episode(k, 4) for k in range(12)]) / "data/main_data.hdf5"
    with h5py.File(main, "a") as file:
        for k in range(1, 12):
            file[f"episode_{k}/observations"].resize(4, 0)
    found = [f for f in errors("toy/set-v0") if "observations has shape (4, 3), expected 5 rows" in f]
    assert [f.split(": episode_")[1][0] for f in found] == ["1", "2", "3", "4", "5"]
    assert [f.endswith("; 6 more like it") for f in found] == [False, False, False, False, True]


def test_an_end_in_the_middle_of_an_episode(write_minari: Write) -> None:
    main = write_minari("toy/set-v0", [e | {"actions": ACTIONS[: len(e["rewards"])]} for e in EPISODES])
    with h5py.File(main / "data/main_data.hdf5", "a") as file:
        file["episode_3/terminations"][2] = True
    one(
        "toy/set-v0",
        "episode_3: terminations or truncations are set before its last step, first in step 2 of 6",
        "read as the end of an episode",
    )


def test_metadata_that_is_damaged_or_untrue(write_minari: Write) -> None:
    meta = write_minari("toy/set-v0", [e | {"actions": ACTIONS[: len(e["rewards"])]} for e in EPISODES])
    meta = meta / "data/metadata.json"
    info = json.loads(meta.read_text())

    def box(n: int) -> dict[str, Any]:
        return {"type": "Box", "shape": [n], "low": [-1] * n, "high": [1] * n}

    parts = {"type": "Dict", "subspaces": {"a": box(3), "b": {"type": "Box", "shape": [], "low": 0, "high": 1}}}
    for change, *words in (
        ({"action_space": '{"type":'}, "file: ", "the action space is damaged"),
        ({"env_spec": '{"max_episode_steps": "many"}'}, "file: ", "max_episode_steps of its env_spec is 'many'"),
        ({"total_steps": "nine"}, "metadata: total_steps is 'nine', the data holds 18"),
        ({"total_episodes": 77}, "metadata: total_episodes is 77, the data holds 4"),
        (
            {"observation_space": box(5)},
            "metadata: the observation space is one of 5 numbers, each stored observation has 3",
        ),
        (
            {"observation_space": parts},
            "metadata: the observation space is one of 4 numbers, each stored observation has 3",
        ),
        ({"action_space": box(4)}, "metadata: the action space is one of 4 numbers, each stored action has 2"),
    ):
        meta.write_text(json.dumps(info | change))
        one("toy/set-v0", *words)


def test_nan_and_infinities_are_counted(write_d4rl: Write) -> None:
    rewards, actions = np.ones(N, np.float32), ACTIONS.copy()
    rewards[[2, 5, 7]], actions[3, 1] = np.inf, np.nan
    found = errors(write_d4rl("x.hdf5", EPISODES, rewards=rewards, actions=actions))
    assert [f for f in found if "reward of transition 2 (episode 0) is NaN or infinite, as are those of 2 more" in f]
    assert [f for f in found if "action of transition 3 (episode 0) is NaN or infinite" in f]


def test_flags_that_are_neither(write_d4rl: Write) -> None:
    terminals = np.concatenate([e["terminations"] for e in EPISODES]).astype(np.float32)
    terminals[[5, 6]] = np.nan, 0.5
    one(
        write_d4rl("x.hdf5", EPISODES, terminals=terminals),
        "terminals holds values other than 0 and 1 in 2 rows, first",
    )


def test_actions_out_of_range(write_d4rl: Write) -> None:
    actions = ACTIONS.copy()
    actions[[4, 6], 0] = 1.5, -3
    one(write_d4rl("x.hdf5", EPISODES, actions=actions), "action: outside [-1, 1] in 2 rows, up to 3, first in row 4")


def test_rewards_out_of_range(write_d4rl: Write) -> None:
    rewards = np.zeros(N, np.float32)
    rewards[5], rewards[9] = 1.0, -4e5
    path = write_d4rl("x.hdf5", EPISODES, rewards=rewards, actions=ACTIONS)
    rewards[9] = 0
    sparse = write_d4rl("y.hdf5", EPISODES, rewards=rewards, actions=ACTIONS)
    assert errors(sparse) == []  # one goal among zeros is not out of range
    one(sparse, "reward: outside [0, 0.5] in 1 rows, first in row 5: 1", reward_range=(0.0, 0.5))
    big = np.concatenate([np.random.default_rng(0).normal(size=(2000))]).astype(np.float32)
    big[77] = -4e5
    many = [episode(k, 200) for k in range(10)]
    path = write_d4rl("x.hdf5", many, rewards=big)
    one(path, "reward: outside ±", "in 1 rows, first in row 77: -4e+05")


def test_missing_arrays_and_cut_files(write_d4rl: Write) -> None:
    one(write_d4rl("x.hdf5", EPISODES, drop=("terminals",)), "file: ", "no 'terminals'")
    path = write_d4rl("x.hdf5", EPISODES)
    path.write_bytes(path.read_bytes()[:-50])
    one(path, "file: ", "not a whole HDF5 file")


def test_a_d4rl_id_whose_file_is_damaged(write_d4rl: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("D4RL_DATASET_DIR", str(tmp_path))
    write_d4rl("hopper-medium-v2.hdf5", EPISODES, actions=np.zeros((17, 2)))
    one("hopper-medium-v2", "file: ", "actions has shape (17, 2), expected 18 rows")
    (tmp_path / "hopper-medium-v2.hdf5").write_text("<html>")
    one("hopper-medium-v2", "file: ", "hopper-medium-v2.hdf5 is not a whole HDF5 file")
    with pytest.raises(DatasetError, match="no file of 'hopper-expert-v2'"):
        inspect.verify("hopper-expert-v2")


def test_notes_are_not_errors(write_d4rl: Write) -> None:
    both = np.concatenate([e["terminations"] | e["truncations"] for e in EPISODES])
    found = inspect.verify(str(write_d4rl("x.hdf5", EPISODES, timeouts=both, actions=np.zeros((N, 2)))))
    assert {f.level for f in found} == {"note"}
    assert any("both set at the end of 2 episodes" in f.message for f in found)
    assert any("component 0, 1 never changes" in f.message for f in found)


def test_no_such_dataset(write_minari: Write, tmp_path: Path) -> None:
    write_minari("toy/set-v0", EPISODES)
    for source, match in (("toy/sett-v0", "nearest there: toy/set-v0"), (str(tmp_path / "x.npz"), "no file")):
        with pytest.raises(DatasetError, match=match):
            inspect.verify(source)


def test_summary(write_minari: Write) -> None:
    actions = np.zeros((4, 2), np.float32)
    actions[0] = 1, -1
    write_minari("mine/hopper-v3", [episode(0, 4, "terminated") | {"actions": actions}, episode(1, 3)], env="Hopper-v5")
    s = inspect.summarize(*read("mine/hopper-v3"), bins=3)
    assert json.loads(json.dumps(s)) == s
    assert (s["dataset"], s["dataset_version"], s["benchmark"], s["env"]) == (
        "mine/hopper-v3",
        3,
        "Minari",
        "Hopper-v5",
    )
    assert (s["transitions"], s["episodes"], s["terminated_episodes"], s["obs_dim"], s["act_dim"]) == (7, 2, 1, 3, 2)
    assert s["return"] == pytest.approx({"mean": 4.65, "std": 1.35, "min": 3.3, "max": 6.0})
    assert s["length"] == {"mean": 3.5, "std": 0.5, "min": 3, "max": 4}
    assert s["action_max"] == pytest.approx([1.0, 0.0])
    assert s["action_min"] == pytest.approx([0.0, -1.0], abs=0.02)
    assert s["clipped_actions"] == pytest.approx(2 / 14)
    assert s["normalized_score"] == pytest.approx(100 * (4.65 + 20.272305) / (3234.3 + 20.272305))
    assert s["histogram"]["counts"] == [1, 0, 1]
    assert s["histogram"]["edges"] == pytest.approx([3.3, 4.2, 5.1, 6.0])


# -------------------------------------------------------------------------------------------------------------- scores
@pytest.mark.parametrize(
    ("id", "format", "want"),
    [
        ("hopper_medium-v2", "d4rl-hdf5", ("hopper-medium-v2", 2, "D4RL")),
        ("hopper_mixed", "d4rl-hdf5", ("hopper-medium-replay-v0", 0, "D4RL")),
        ("hopper_medium-v2", "npz", ("hopper_medium-v2", 2, "own")),
        ("my_robot", "d4rl-hdf5", ("my_robot", None, "own")),
        ("mujoco/hopper/medium-v0", "minari-hdf5", ("mujoco/hopper/medium-v0", 0, "Minari")),
        ("D4RL/antmaze/umaze-v1", "minari-parquet", ("D4RL/antmaze/umaze-v1", 1, "Minari")),
    ],
)
def test_labels(id: str, format: str, want: tuple[Any, ...]) -> None:
    assert tuple(dataset_labels(id, format).values()) == want


def test_benchmarks_never_share_a_column() -> None:
    rows = [
        {"algo": "td3bc", **dataset_labels("hopper_medium-v2", "d4rl-hdf5"), "normalized_score": 59.26},
        {"algo": "td3bc", **dataset_labels("mujoco/hopper/medium-v0", "minari-hdf5"), "normalized_score": 101.0},
        {"algo": "td3bc", **dataset_labels("mine", "npz"), "normalized_score": None},
    ]
    header, cells = score_table(rows, ["algo"])
    assert header == ["algo", "dataset", "version", "score (D4RL)", "score (Minari)", "score (own)"]
    assert cells == [
        ["td3bc", "hopper-medium-v2", "2", "59.3", "", ""],
        ["td3bc", "mujoco/hopper/medium-v0", "0", "", "101.0", ""],
        ["td3bc", "mine", "", "", "", ""],
    ]
    with pytest.raises(ValueError, match="lacks dataset_version, benchmark"):
        score_table([{"dataset": "x", "normalized_score": 1.0}])
