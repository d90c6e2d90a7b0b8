"""Damaged checkpoints, foreign checkpoints, diverging agents, full disks: words, and no harm done."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from run_helpers import assert_same, final_state, hdf5, interrupted, settings

import rlctl
from rlctl import checkpoint, experiment
from rlctl.data import ring
from rlctl.errors import DiskFull, Diverged, UsageError

SAC: dict[str, Any] = {"buffer_size": 100, "learning_starts": 30, "batch_size": 16, "hidden": [8, 8]}
S = settings("sac", "probe:both", steps=200, **SAC, run={"log_every": 10, "eval_every": 60, "checkpoint_every": 20})


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("damage") / "whole"
    experiment.train(S, folder, quiet=True)
    return folder


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Stopped at step 130: checkpoints 120 and 130."""
    monkeypatch.setattr(ring, "SEGMENT", 16)
    folder = tmp_path / "stopped"
    assert interrupted(lambda: experiment.train(S, folder, quiet=True), 130)
    return folder


def flip(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_digit(file: Path) -> None:
    """Still a readable manifest, with another step count in it."""
    file.write_text(file.read_text().replace('"env_steps": 130', '"env_steps": 131'))


def empty(file: Path) -> None:
    file.write_bytes(b"")


DAMAGE: list[tuple[str, Callable[[Path], None]]] = [
    ("agent.safetensors", flip),
    ("optim.safetensors", cut),
    ("rng.safetensors", Path.unlink),
    ("off_policy.buffer/segment-00000.safetensors", flip),
    ("off_policy.env/state.safetensors", empty),
    ("manifest.json", cut),
    ("manifest.json", flip_digit),
    ("manifest.json", Path.unlink),
]


@pytest.mark.parametrize(("name", "how"), DAMAGE, ids=[f"{how.__name__} {name}" for name, how in DAMAGE])
def test_falls_back_to_the_one_before_and_says_so(
    name: str, how: Callable[[Path], None], whole: Path, stopped: Path
) -> None:
    root = stopped / "checkpoints"
    bad = root / "step_000000000130" / name
    if name.startswith("off_policy.buffer"):  # hard-linked into the checkpoint before: a copy, or both would be damaged
        data = bad.read_bytes()
        bad.unlink()
        bad.write_bytes(data)
    how(bad)
    experiment.resume(stopped, quiet=True)
    said = (stopped / "console.log").read_text()
    assert f"checkpoint step_000000000130 is damaged ({name}" in said
    assert "resumed from step_000000000120" in said
    # what follows does not build on the damaged files: the segments linked from checkpoint to checkpoint are sound
    for folder in root.glob("step_*"):
        assert checkpoint.damaged(folder) == []
    segments = [k for k in final_state(stopped) if k.startswith("off_policy.buffer/segment")]
    assert len(segments) == 7
    assert (root / "damaged-step_000000000130").is_dir()
    # another segment size is another set of files, so compare what they hold
    left, right = final_state(whole), final_state(stopped)
    assert {k: v for k, v in left.items() if "segment" not in k} == {
        k: v for k, v in right.items() if "segment" not in k
    }


@pytest.mark.parametrize("pointer", [None, "", "step_999", "step_000000000120"])
def test_latest_missing_or_wrong(pointer: str | None, stopped: Path) -> None:
    latest = stopped / "checkpoints" / "latest"
    latest.unlink()
    if pointer is not None:
        latest.write_text(pointer)
    experiment.resume(stopped, quiet=True)
    step = 120 if pointer == "step_000000000120" else 130
    assert f"resumed from step_{step:012d}" in (stopped / "console.log").read_text()
    assert experiment.read_json(stopped / "run.json")["status"] == "done"


def test_every_checkpoint_damaged_is_an_error_that_destroys_nothing(stopped: Path) -> None:
    for folder in (stopped / "checkpoints").glob("step_*"):
        cut(folder / "agent.safetensors")
    before = {p: p.read_bytes() for p in stopped.rglob("*") if p.is_file() and p.name not in ("console.log", ".lock")}
    with pytest.raises(UsageError, match=r"every checkpoint in .* is damaged"):
        experiment.resume(stopped, quiet=True)
    assert {p: p.read_bytes() for p in before} == before


def test_checkpoint_of_another_format(stopped: Path) -> None:
    manifest = checkpoint.latest(stopped / "checkpoints") / "manifest.json"  # type: ignore[operator]
    text = json.loads(manifest.read_text()) | {"format": 99}
    del text["digest"]
    manifest.write_text(json.dumps(text))
    with pytest.raises(UsageError, match=f"checkpoint format 99, this version reads {checkpoint.FORMAT}"):
        experiment.resume(stopped, quiet=True)


def test_checkpoint_of_another_agent(stopped: Path) -> None:
    config = stopped / "config.yaml"
    plain = experiment.load_yaml(config)
    plain |= {"algo": "td3", "agent": {k: plain["agent"][k] for k in SAC} | {"steps": 200}}
    config.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="class SAC, not TD3"):
        experiment.resume(stopped, quiet=True)


def test_checkpoint_of_other_networks(stopped: Path) -> None:
    config = stopped / "config.yaml"
    plain = experiment.load_yaml(config)
    plain["agent"]["hidden"] = [9, 9]
    config.write_text(json.dumps(plain))
    with pytest.raises(UsageError, match="does not fit SAC as configured"):
        experiment.resume(stopped, quiet=True)
    with pytest.raises(UsageError, match="does not fit SAC as configured"):
        experiment.load_agent(stopped)


def test_no_pickle_in_what_is_written(whole: Path) -> None:
    for file in (p for p in whole.rglob("*") if p.is_file()):
        head = file.read_bytes()[:16]
        assert not head.startswith(b"\x80") or file.suffix == ".safetensors", file  # pickle's first opcode
        assert head[:2] != b"PK", file  # torch.save, npz
        assert file.suffix in {".json", ".jsonl", ".yaml", ".safetensors", ".log", ""}, file


def test_no_pickle_in_the_sources() -> None:
    package = Path(rlctl.__file__).parent
    roots = [package, package.parent / "envs" / "rlctl_envs"]
    call = re.compile(
        r"\bimport (pickle|cloudpickle|dill|joblib)\b|\btorch\.(save|load)\(|allow_pickle\s*=\s*True"
        r"|yaml\.load\((?!.*SafeLoader\))"
    )
    found = [p for root in roots for p in root.rglob("*.py") if call.search(p.read_text())]
    assert found == []


# -------------------------------------------------------------------------------------------------------- divergence
USER_FILE = """
import math
import torch
from dataclasses import dataclass
from rlctl.agents.sac import SAC, SACConfig
from rlctl.agents.ppo import PPO
from rlctl.agents.td3bc import TD3BC

class NaNLoss(SAC):
    def critic_loss(self, b):
        return super().critic_loss(b) * (math.nan if self.counters["updates"] > 60 else 1.0)

class NaNMetric(SAC):
    def update(self, b):
        row = super().update(b)
        return row | {"losses/mine": row["losses/critic"] / (self.counters["updates"] < 60)}

class NaNAction(SAC):
    def act(self, obs, explore):
        action, extra = super().act(obs, explore)
        return (action * math.nan if self.counters["updates"] > 60 else action), extra

class NaNPPO(PPO):
    def value_loss(self, v, ret):
        return super().value_loss(v, ret) * (math.nan if self.counters["updates"] > 3 else 1.0)

class NaNOffline(TD3BC):
    def actor_loss(self, b, log=None):
        return super().actor_loss(b, log) * (math.nan if self.counters["updates"] > 60 else 1.0)

class Unseeded(SAC):
    def critic_loss(self, b):
        return super().critic_loss(b) * (1 + 0.1 * torch.rand(()))
"""


@pytest.fixture
def user_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "user_pkg").mkdir()
    (tmp_path / "user_pkg" / "agents.py").write_text(USER_FILE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    for name in ("user_pkg", "user_pkg.agents"):
        monkeypatch.delitem(sys.modules, name, raising=False)


LOGS = {"log_every": 10, "eval_every": 0, "checkpoint_every": 20}


@pytest.mark.parametrize(
    ("cls", "metric"),
    [("NaNLoss", "losses/critic"), ("NaNMetric", "losses/mine"), ("NaNAction", "action")],
)
@pytest.mark.parametrize("env", ["probe:both", "Hopper"])
def test_divergence_online(cls: str, metric: str, env: str, user_file: None, tmp_path: Path) -> None:
    s = settings(f"user_pkg.agents:{cls}", env, steps=200, **SAC, run=LOGS)
    folder = tmp_path / "run"
    with pytest.raises(Diverged, match=metric) as e:
        experiment.train(s, folder, quiet=True)
    assert e.value.exit_code == 3
    assert "\n" not in str(e.value)
    check_diverged(folder, e.value)
    # the last good checkpoint goes on, and meets its fate again
    assert interrupted(lambda: experiment.resume(folder, quiet=True), 2)
    with pytest.raises(Diverged, match=metric):
        experiment.resume(folder, quiet=True)


def check_diverged(folder: Path, e: Diverged) -> None:
    record = experiment.read_json(folder / "run.json")
    assert record["status"] == "failed"
    assert record["error"].startswith("Diverged: ")
    report = json.loads((folder / "diverged" / "note.json").read_text())
    assert report["metrics"]
    assert (folder / "diverged" / "agent.safetensors").exists()
    good = checkpoint.latest(folder / "checkpoints")
    assert good is not None
    assert f"last good checkpoint: {good.name}" in str(e)
    assert checkpoint.damaged(good) == []
    agent, _ = experiment.load_agent(folder)
    assert all(bool(x.isfinite().all()) for x in agent.state_dict().values())


def test_divergence_on_policy(user_file: None, tmp_path: Path) -> None:
    small = {"num_envs": 2, "horizon": 10, "minibatch_size": 20, "epochs": 1}
    s = settings("user_pkg.agents:NaNPPO", "Hopper", steps=200, **small, run=LOGS)
    with pytest.raises(Diverged, match="losses/value") as e:
        experiment.train(s, tmp_path / "run", quiet=True)
    check_diverged(tmp_path / "run", e.value)


def test_divergence_offline(user_file: None, tmp_path: Path) -> None:
    data = hdf5(tmp_path / "d.hdf5")
    s = settings(
        "user_pkg.agents:NaNOffline", "Hopper", data, steps=200, batch_size=16, hidden=[8, 8], policy_every=1, run=LOGS
    )
    with pytest.raises(Diverged, match="losses/actor") as e:
        experiment.train(s, tmp_path / "run", quiet=True)
    check_diverged(tmp_path / "run", e.value)


def test_dead_agent_is_never_checkpointed(user_file: None, tmp_path: Path) -> None:
    # no log row is due before the stop request: the checkpoint itself must notice
    s = settings("user_pkg.agents:NaNLoss", "probe:both", steps=200, **SAC, run=LOGS | {"log_every": 200})
    with pytest.raises(Diverged, match="non-finite"):
        experiment.train(s, tmp_path / "run", quiet=True)
    check_diverged_name = checkpoint.latest(tmp_path / "run" / "checkpoints")
    assert check_diverged_name is not None
    assert check_diverged_name.name == "step_000000000080"


def test_a_users_use_of_the_global_generator_is_seeded_and_resumed(user_file: None, tmp_path: Path) -> None:
    def make(seed: int) -> experiment.Settings:
        return settings("user_pkg.agents:Unseeded", "probe:both", steps=120, **SAC, seed=seed, run={"log_every": 10})

    experiment.train(make(1), tmp_path / "a", quiet=True)
    assert interrupted(lambda: experiment.train(make(1), tmp_path / "b", quiet=True), 70)
    experiment.resume(tmp_path / "b", quiet=True)
    assert_same(tmp_path / "a", tmp_path / "b")


# --------------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("name", ["agent.safetensors", "manifest.json", "segment-00000.safetensors"])
def test_full_disk_leaves_the_checkpoint_before(
    name: str, whole: Path, stopped: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sync = checkpoint._sync_file

    def no_space(file: Path) -> None:
        if file.name == name and file.parent.name.startswith((".tmp-step", "off_policy.buffer")):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(file))
        sync(file)

    with monkeypatch.context() as m:
        m.setattr(checkpoint, "_sync_file", no_space)
        with pytest.raises(DiskFull, match="no space left on the disk"):
            experiment.resume(stopped, quiet=True)
    assert experiment.read_json(stopped / "run.json")["status"] == "failed"
    newest = checkpoint.newest_intact(stopped / "checkpoints", pytest.fail)
    assert newest is not None
    assert newest.name == "step_000000000130"
    assert not list((stopped / "checkpoints").glob(".tmp-*"))  # what could not be finished makes room
    (stopped / "checkpoints" / ".tmp-step_of_one_killed").mkdir()
    experiment.resume(stopped, quiet=True)
    assert experiment.read_json(stopped / "run.json")["status"] == "done"
    assert not list((stopped / "checkpoints").glob(".tmp-*"))  # and is cleared away, whatever its name


def test_moved_and_symlinked_runs_resume(whole: Path, stopped: Path, tmp_path: Path) -> None:
    moved, link = tmp_path / "elsewhere" / "run", tmp_path / "link"
    moved.parent.mkdir()
    shutil.move(stopped, moved)
    link.symlink_to(moved)
    experiment.resume(link, quiet=True)
    assert link.is_symlink()
    assert experiment.read_json(moved / "run.json")["status"] == "done"
