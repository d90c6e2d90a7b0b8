"""SIGINT, SIGTERM and `kill -9` to real processes: every one can be resumed, and ends as if nothing had happened."""

from __future__ import annotations

import json
import re
import signal
import time
from pathlib import Path

import numpy as np
import pytest
from run_helpers import assert_same, flags, launch, rows, settings, stop, wait_for

from rlctl import checkpoint, experiment
from rlctl.experiment import Settings

SAC = {"buffer_size": 400, "learning_starts": 50, "batch_size": 16, "hidden": [16, 16]}


def sac(steps: int = 700, **run: object) -> Settings:
    return settings("sac", "Hopper", steps=steps, **SAC, run={"log_every": 25, "eval_every": 200} | run)


def status(folder: Path) -> str:
    return str(experiment.read_json(folder / "run.json").get("status"))


def logged(folder: Path, name: str = "metrics") -> int:
    file = folder / f"{name}.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run that nobody disturbs."""
    folder = tmp_path_factory.mktemp("signals") / "whole"
    experiment.train(sac(), folder, quiet=True)
    return folder


def test_sigint_sigterm_resume(whole: Path, tmp_path: Path) -> None:
    # a relative directory, and the command from the message typed where it was printed
    process = launch("train", *flags(sac()), "--out", "deep/run", cwd=tmp_path)
    folder = tmp_path / "deep" / "run"
    wait_for(lambda: logged(folder) >= 4, process)
    code, out, err = stop(process, signal.SIGINT)
    assert code == 75, err
    assert out == ""
    assert err.splitlines()[-1] == "rlctl: interrupted; checkpoint written, go on with: rlctl resume deep/run"
    assert "Traceback" not in err
    assert status(folder) == "preempted"
    assert checkpoint.damaged(checkpoint.latest(folder / "checkpoints") or folder) == []
    seen = logged(folder)

    process = launch("resume", "deep/run", cwd=tmp_path)
    wait_for(lambda: logged(folder) > seen + 4, process)
    code, _, err = stop(process, signal.SIGTERM)
    assert code == 75, err
    assert "resumed from step_" in err

    process = launch("resume", "deep/run", "--quiet", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert (process.returncode, out, err) == (0, "", "")
    assert status(folder) == "done"
    assert len(experiment.read_json(folder / "run.json")["sessions"]) == 3
    assert_same(whole, folder)


def slow_evaluation(run_config: dict[str, object]) -> Settings:
    # Pusher never ends early: 100 steps of very many worlds take a while
    return settings("ppo", "Pusher", steps=240, num_envs=2, horizon=20, minibatch_size=40, epochs=1, run=run_config)


@pytest.mark.parametrize("which", ["during training", "final"])
def test_signal_during_an_evaluation(which: str, tmp_path: Path) -> None:
    many = {"final_episodes": 400, "eval_every": 0} if which == "final" else {"eval_episodes": 400, "eval_every": 120}
    s = slow_evaluation(many | {"log_every": 40})
    folder = tmp_path / "run"
    process = launch("train", *flags(s), "--out", folder)
    marker = 6 if which == "final" else 3  # rows written when that evaluation begins
    wait_for(lambda: logged(folder) >= marker, process)
    if which == "final":
        wait_for(lambda: checkpoint.progress(folder / "checkpoints") == 240, process)
    time.sleep(0.2)
    code, _, err = stop(process, signal.SIGTERM)
    assert code == 75, err
    assert status(folder) == "preempted"
    assert rows(folder / "eval.jsonl") == []
    assert checkpoint.progress(folder / "checkpoints") == (240 if which == "final" else 120)
    experiment.resume(folder, quiet=True)
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert_same(tmp_path / "whole", folder)
    assert len(rows(folder / "eval.jsonl")) == (400 if which == "final" else 803)


def test_second_interrupt_ends_at_once_and_loses_nothing(tmp_path: Path) -> None:
    s = slow_evaluation({"eval_every": 40, "checkpoint_every": 40, "eval_episodes": 50})
    folder = tmp_path / "run"
    process = launch("train", *flags(s), "--out", folder)
    wait_for(lambda: checkpoint.progress(folder / "checkpoints") >= 80, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.002)
    code, _, err = stop(process, signal.SIGINT)
    assert code in (75, 130), err  # the first one may already have done its work
    assert "Traceback" not in err
    experiment.resume(folder, quiet=True)
    experiment.train(s, tmp_path / "whole", quiet=True)
    assert_same(tmp_path / "whole", folder)


def kill_often(s: Settings, folder: Path, kills: int, seed: int) -> list[int]:
    """Train, killed `kills` times at random moments; the progress of the checkpoint each death left."""
    rng = np.random.default_rng(seed)
    left: list[int] = []
    args: list[str | Path] = ["train", *flags(s), "--out", folder]
    for _ in range(kills):
        process = launch(*args, "--quiet")
        begun = left[-1] if left else 0
        # the moments of interest come once it trains: how long the start takes says nothing
        wait_for(lambda begun=begun: checkpoint.progress(folder / "checkpoints") > begun, process)  # type: ignore[misc]
        time.sleep(float(rng.uniform(0.0, 0.25)))
        process.kill()
        out, err = process.communicate()
        assert process.returncode == -signal.SIGKILL, (out, err)
        newest = checkpoint.newest_intact(folder / "checkpoints", pytest.fail)
        assert newest is not None
        left.append(json.loads((newest / "manifest.json").read_text())["state"]["progress"])
        assert left[-1] > begun
        # whatever the last checkpoint promises is on disk
        offsets = json.loads((newest / "manifest.json").read_text())["state"]["offsets"]
        assert all((folder / f"{name}.jsonl").stat().st_size >= n for name, n in offsets.items())
        args = ["resume", folder]
    config = folder / "config.yaml"
    config.write_text(re.sub("checkpoint_every: .*", "checkpoint_every: 0", config.read_text()))  # enough of that
    experiment.resume(folder, quiet=True)
    return left


def test_kill_9_while_checkpoints_are_written(whole: Path, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    kill_often(sac(checkpoint_every=1), folder, kills=3, seed=0)  # nearly all of its time goes into checkpoints
    assert_same(whole, folder)
    assert not list((folder / "checkpoints").glob(".tmp-*"))


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("seed", [1, 2])
def test_kill_9_many_times(seed: int, tmp_path: Path) -> None:
    s = sac(6000, checkpoint_every=1 if seed == 1 else 25)
    folder = tmp_path / "run"
    deaths = kill_often(s, folder, kills=12, seed=seed)
    assert deaths == sorted(deaths)
    experiment.train(sac(6000), tmp_path / "whole", quiet=True)
    assert_same(tmp_path / "whole", folder)
