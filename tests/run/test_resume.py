"""A run that was stopped, at any step and any number of times, ends bit for bit like one that never was."""

from __future__ import annotations

from pathlib import Path

import pytest
from run_helpers import assert_same, final_state, hdf5, interrupted, rows, settings, train_in_pieces

from rlctl import checkpoint, experiment
from rlctl.data import ring
from rlctl.errors import UsageError
from rlctl.experiment import Settings

NETS = {"hidden": [16, 16]}
PPO = {"num_envs": 3, "horizon": 20, "minibatch_size": 30, "epochs": 2, "hidden": [8, 8]}
OFF_POLICY = {"buffer_size": 100, "learning_starts": 30, "batch_size": 16} | NETS


def ppo(env: str, steps: int = 900) -> Settings:
    return settings("ppo", env, steps=steps, **PPO, run={"eval_every": 250, "log_every": 70})


def off_policy(algo: str, num_envs: int = 1, steps: int = 280) -> Settings:
    extra = {"log_every": 7, "eval_every": 90}
    return settings(algo, "Hopper", steps=steps, num_envs=num_envs, **OFF_POLICY, run=extra)


def both(s: Settings, tmp_path: Path, pieces: list[int]) -> None:
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert train_in_pieces(s, tmp_path / "pieces", pieces) == len(pieces)
    assert_same(tmp_path / "whole", tmp_path / "pieces")


@pytest.mark.parametrize("env", ["Hopper", "Ant", "Humanoid", "Reacher", "probe:both"])
def test_ppo(env: str, tmp_path: Path) -> None:
    both(ppo(env), tmp_path, [4, 1, 5])


def test_ppo_stopped_where_an_evaluation_was_due(tmp_path: Path) -> None:
    # evaluations are due after updates 5, 9 and 13: the stop request arrives with each, and again while it is made up
    s = ppo("Hopper")
    experiment.train(s, tmp_path / "whole", quiet=True)
    folder = tmp_path / "pieces"
    assert interrupted(lambda: experiment.train(s, folder, quiet=True), 5)
    assert rows(folder / "eval.jsonl") == []
    for _ in range(2):
        assert interrupted(lambda: experiment.resume(folder, quiet=True), 1, "_evaluate")
    assert rows(folder / "eval.jsonl") == []
    experiment.resume(folder, quiet=True)
    assert_same(tmp_path / "whole", folder)


@pytest.mark.parametrize("algo", ["sac", "td3"])
def test_off_policy_across_the_wrap_around(algo: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SEGMENT", 16)  # several segments, some of them linked from one checkpoint to the next
    # while acting at random, just after learning began, one step before, at and after the wrap-around, much later
    both(off_policy(algo), tmp_path, [17, 20, 62, 1, 1, 2, 103])


def test_off_policy_with_several_worlds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SEGMENT", 16)
    both(off_policy("sac", num_envs=7), tmp_path, [2, 11, 2, 9])  # 7 divides neither buffer_size nor steps


def test_off_policy_with_periodic_checkpoints_writes_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ring, "SEGMENT", 16)
    often = settings(
        "sac", "Hopper", steps=280, **OFF_POLICY, run={"log_every": 7, "eval_every": 90, "checkpoint_every": 9}
    )
    experiment.train(off_policy("sac"), tmp_path / "rare", quiet=True)
    experiment.train(often, tmp_path / "often", quiet=True)
    left, right = final_state(tmp_path / "rare"), final_state(tmp_path / "often")
    assert left == right
    kept = sorted(p.name for p in (tmp_path / "often" / "checkpoints").glob("step_*"))
    assert kept == ["step_000000000279", "step_000000000280"]
    assert not [p for k in kept for p in checkpoint.damaged(tmp_path / "often" / "checkpoints" / k)]


def test_offline(tmp_path: Path) -> None:
    extra = {"log_every": 5, "eval_every": 40}
    s = settings("td3bc", "Hopper", hdf5(tmp_path / "d.hdf5"), steps=120, batch_size=16, **NETS, run=extra)
    both(s, tmp_path, [3, 38, 1, 50])


def test_offline_refuses_other_data(tmp_path: Path) -> None:
    data = hdf5(tmp_path / "d.hdf5")
    s = settings("td3bc", "Hopper", data, steps=60, batch_size=16, **NETS)
    assert interrupted(lambda: experiment.train(s, tmp_path / "run", quiet=True), 20)
    hdf5(data, n=300)
    with pytest.raises(ValueError, match="made with a dataset of sha256"):
        experiment.resume(tmp_path / "run", quiet=True)


def test_stochastic_evaluation_and_periods_that_do_not_divide(tmp_path: Path) -> None:
    extra = {"log_every": 13, "eval_every": 77, "eval_stochastic": True, "checkpoint_every": 31}
    s = settings("sac", "Hopper", steps=200, num_envs=2, **OFF_POLICY, run=extra)
    both(s, tmp_path, [7, 32, 40])
    kinds = [r["deterministic"] for r in rows(tmp_path / "whole" / "eval.jsonl")]
    assert kinds[:4] == [True, True, False, False]


def test_longer_run_equals_one_that_was_long_from_the_start(tmp_path: Path) -> None:
    # nothing of SAC depends on the length of the run, and with these periods nothing of its logs does either
    long, short = off_policy("sac", steps=280), off_policy("sac", steps=126)
    experiment.train(long, tmp_path / "long", quiet=True)
    experiment.train(short, tmp_path / "short", quiet=True)
    experiment.resume(tmp_path / "short", 280, quiet=True)
    assert_same(tmp_path / "long", tmp_path / "short")
    assert experiment.read_settings(tmp_path / "short") == long
    keys = [experiment.read_json(tmp_path / name / "run.json")["config_key"] for name in ("long", "short")]
    assert keys == [long.key()] * 2  # runs of one key count as repetitions of one experiment


def test_finished_run_needs_a_larger_total(tmp_path: Path) -> None:
    s, folder = ppo("probe:constant", 240), tmp_path / "run"
    experiment.train(s, folder, quiet=True)
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    for steps in (None, 1, 240):
        with pytest.raises(UsageError, match="--steps"):
            experiment.resume(folder, steps, quiet=True)
    assert {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()} == before
    experiment.resume(folder, 360, quiet=True)
    assert experiment.read_json(folder / "run.json")["progress"] == 360


def test_unfinished_run_cannot_be_cut_below_what_it_made(tmp_path: Path) -> None:
    s, folder = ppo("probe:constant"), tmp_path / "run"
    assert interrupted(lambda: experiment.train(s, folder, quiet=True), 5)
    with pytest.raises(UsageError, match="has made 300 steps"):
        experiment.resume(folder, 200, quiet=True)
    assert experiment.read_settings(folder) == s
    experiment.resume(folder, 420, quiet=True)
    assert experiment.read_json(folder / "run.json")["progress"] == 420


def test_killed_before_the_first_checkpoint_starts_over(tmp_path: Path) -> None:
    s = ppo("probe:both", 300)
    experiment.train(s, tmp_path / "whole", quiet=True)
    folder = experiment._new_folder(s, tmp_path / "pieces")  # all that a very early death leaves
    experiment.resume(folder, quiet=True)
    assert_same(tmp_path / "whole", folder)
