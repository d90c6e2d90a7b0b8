"""The run directory: its files, their fields, TensorBoard's tags; runs in memory; the API of the package docstring."""

from __future__ import annotations

import json
import math
import re
import threading
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from run_helpers import rows, settings

import rlctl
from rlctl import experiment
from rlctl.run import EpisodeStats

PPO = {"num_envs": 2, "horizon": 20, "minibatch_size": 40, "epochs": 1, "hidden": [8, 8]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    extra = {"tensorboard": True, "log_every": 40, "eval_every": 80, "eval_stochastic": True, "checkpoint_every": 40}
    s = settings("ppo", "Hopper", steps=240, **PPO, run=extra)
    return experiment.train(s, tmp_path_factory.mktemp("folder") / "run", quiet=True)[0]


def test_files(folder: Path) -> None:
    names = {p.name for p in folder.iterdir() if not p.name.startswith((".lock", "events."))}
    assert names == {"run.json", "config.yaml", "metrics.jsonl", "eval.jsonl", "console.log", "checkpoints"}
    assert len(list(folder.glob("events.out.tfevents.*"))) == 1
    kept = {p.name for p in (folder / "checkpoints").iterdir()}
    assert kept == {"step_000000000200", "step_000000000240", "best", "latest"}
    assert (folder / "checkpoints" / "latest").read_text() == "step_000000000240"
    newest = folder / "checkpoints" / "step_000000000240"
    files = {p.name for p in newest.iterdir()}
    assert files == {
        "manifest.json",
        "agent.safetensors",
        "optim.safetensors",
        "rng.safetensors",
        "run.safetensors",
        "on_policy.env",
    }
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {"format", "agent", "counters", "state", "files"} <= manifest.keys()


def test_run_json(folder: Path) -> None:
    record = experiment.read_json(folder / "run.json")
    assert record["schema"] == 1
    assert (record["status"], record["error"]) == ("done", None)
    assert (record["algo"], record["env"], record["seed"], record["progress"]) == ("ppo", "Hopper-v5", 3, 240)
    assert record["eval_env"] == "Hopper-v5"
    assert re.fullmatch("[0-9a-f]{8}", record["config_key"])
    assert {"started", "updated", "physics", "final", "spent_s", "spec"} <= record.keys()
    (session,) = record["sessions"]
    assert {"started", "command", "git", "versions", "machine", "torch_threads"} <= session.keys()
    assert {"python", "torch", "mujoco", "gymnasium", "numpy", "rlctl"} <= session["versions"].keys()
    assert record["final"]["episodes"] == 3
    assert record["final"]["normalized_score"] is None  # that scale belongs to D4RL-like data, not to an online run
    json.dumps(record, allow_nan=False)


def test_config_yaml_is_complete(folder: Path) -> None:
    plain = yaml.safe_load((folder / "config.yaml").read_text())
    assert list(plain) == ["algo", "env", "data", "seed", "device", "env_options", "agent", "run"]
    assert experiment.resolve(None, [plain]).plain() == plain


def test_config_key_is_of_the_experiment_not_of_the_repetition() -> None:
    base = settings("ppo", "Hopper", steps=240, **PPO)
    assert settings("ppo", "Hopper", steps=240, **PPO, seed=9, run={"keep": 7}).key() == base.key()
    assert settings("ppo", "Hopper", steps=241, **PPO).key() != base.key()
    assert settings("ppo", "Walker2d", steps=240, **PPO).key() != base.key()
    assert settings("ppo", "Hopper", steps=240, **PPO, run={"precision": "bf16"}).key() != base.key()


def test_one_row_per_evaluation_episode(folder: Path) -> None:
    log = rows(folder / "eval.jsonl")
    groups: dict[tuple[int, bool, bool], list[int]] = {}
    for r in log:
        assert r.keys() == {"env_steps", "updates", "episode", "return", "length", "deterministic", "final"}
        assert math.isfinite(r["return"])
        assert 1 <= r["length"] <= 1000
        groups.setdefault((r["env_steps"], r["deterministic"], r["final"]), []).append(r["episode"])
    want = {(n, d, False): [0, 1] for n in (80, 160, 240) for d in (True, False)}
    assert groups == want | {(240, d, True): [0, 1, 2] for d in (True, False)}


def test_metric_rows(folder: Path) -> None:
    log = rows(folder / "metrics.jsonl")
    assert [r["env_steps"] for r in log] == [40, 80, 120, 160, 200, 240]
    assert [r["updates"] for r in log] == [1, 2, 3, 4, 5, 6]
    for r in log:
        assert {"losses/policy", "losses/value", "charts/SPS", "time/collect_s", "time/learn_s"} <= r.keys()
        json.dumps(r, allow_nan=False)


def test_tensorboard(folder: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = event_accumulator.EventAccumulator(str(folder))
    events.Reload()
    tags = set(events.Tags()["scalars"])
    assert {
        "charts/episodic_return",
        "charts/episodic_length",
        "charts/SPS",
        "charts/updates",
        "losses/policy",
        "losses/value",
        "eval/return_mean",
        "eval/return_std",
        "eval/stochastic_return_mean",
        "eval/episodes_used_total",
        "time/collect_s",
        "time/learn_s",
    } <= tags
    log = rows(folder / "metrics.jsonl")
    loss = events.Scalars("losses/value")
    assert [e.step for e in loss] == [r["env_steps"] for r in log]  # x axis: environment steps
    assert [e.value for e in loss] == pytest.approx([r["losses/value"] for r in log])
    assert [e.step for e in events.Scalars("eval/return_mean")] == [80, 160, 240]
    used = [e.value for e in events.Scalars("eval/episodes_used_total")]
    assert used == [4, 8, 12]


def test_episode_statistics() -> None:
    stats = EpisodeStats(2, torch.device("cpu"))
    stats.add(torch.tensor([1.0, 10.0]), torch.tensor([False, True]))
    stats.add(torch.tensor([2.0, 20.0]), torch.tensor([True, False]))
    stats.add(torch.tensor([4.0, 40.0]), torch.tensor([False, False]))
    assert stats.take() == (6.5, 1.5, 2)  # (3 + 10) / 2 over (2 + 1) / 2 steps
    assert stats.take()[2] == 0
    stats.add(torch.tensor([8.0, 80.0]), torch.tensor([True, True]))
    assert stats.take() == (76.0, 2.5, 2)  # 12 and 140: an episode spans calls of take


@pytest.mark.parametrize("span", [1, 7, 256])
def test_episode_statistics_against_a_plain_loop(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the number of steps worked through at once, and across a saved and restored state."""
    monkeypatch.setattr(EpisodeStats, "SPAN", span)
    g = torch.Generator().manual_seed(0)
    stats, ret, length, found = EpisodeStats(3, torch.device("cpu")), np.zeros(3), np.zeros(3), []
    for t in range(100):
        reward, done = torch.randn(3, generator=g), torch.rand(3, generator=g) < 0.08
        stats.add(reward, done)
        if t == 52:
            stored = {k: v.clone() for k, v in stats.state().items()}
            stats = EpisodeStats(3, torch.device("cpu"))
            stats.set_state(stored)
    g = torch.Generator().manual_seed(0)
    for _ in range(100):
        ret += torch.randn(3, generator=g).double().numpy()
        length += 1
        for n in (torch.rand(3, generator=g) < 0.08).nonzero()[:, 0].tolist():
            found.append((ret[n], length[n]))
            ret[n] = length[n] = 0
    mean_ret, mean_len, count = stats.take()
    assert count == len(found) > 10
    assert mean_ret == pytest.approx(float(np.mean([r for r, _ in found])), rel=1e-9)
    assert mean_len == pytest.approx(float(np.mean([n for _, n in found])), rel=1e-12)


@pytest.mark.parametrize("span", [1, 2, 256])
def test_episodes_that_are_left_out(span: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The running one of that world, and no other: neither its own next one nor another world's."""
    monkeypatch.setattr(EpisodeStats, "SPAN", span)
    stats = EpisodeStats(2, torch.device("cpu"))
    stats.leave_out(slice(1, None))
    for reward, done in (([1.0, 10.0], [False, False]), ([2.0, 20.0], [True, True]), ([4.0, 40.0], [False, True])):
        stats.add(torch.tensor(reward), torch.tensor(done))
    assert stats.take() == ((3 + 40) / 2, 1.5, 2)


def test_staggered_first_episodes_are_not_counted(tmp_path: Path) -> None:
    """A Pusher episode lasts 100 steps whatever happens, so every episode that the chart counts has that length."""
    s = settings("ppo", "Pusher", steps=1200, **PPO | {"num_envs": 4, "horizon": 10}, run={"log_every": 400})
    metrics = rows(experiment.train(s, tmp_path / "run", quiet=True)[0] / "metrics.jsonl")
    lengths = [r["charts/episodic_length"] for r in metrics if r.get("charts/episodic_length") is not None]
    assert lengths
    assert set(lengths) == {100.0}


def test_episode_statistics_when_the_number_of_worlds_changes() -> None:
    """As stages with environments of their own do: what was pending is settled first."""
    stats = EpisodeStats(2, torch.device("cpu"))
    stats.add(torch.tensor([1.0, 2.0]), torch.tensor([True, False]))
    stats.add(torch.tensor([4.0, 5.0, 6.0]), torch.tensor([True, True, False]))
    stats.add(torch.tensor([7.0, 8.0]), torch.tensor([False, True]))
    assert stats.state()["reward"].shape == (1, 2)
    assert stats.take() == ((1 + 4 + 5 + 8) / 4, 1.0, 4)


def test_in_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    env = rlctl.make_env("Hopper", 2, seed=0)
    agent = rlctl.make_agent("sac", env)
    run = rlctl.Run(
        config=rlctl.RunConfig(eval_every=20, eval_episodes=2, final_episodes=2),
        make_eval_env=lambda n, seed: rlctl.make_env("Hopper", n, seed=seed),
    )
    rlctl.off_policy(agent, env, rlctl.Ring(1000), run, steps=60, batch_size=8, learning_starts=40)
    assert (run.env_steps, run.updates) == (60, 20)
    assert run.last_eval is not None
    final = run.finish(agent)
    assert final is not None
    assert len(final.returns) == 2
    run.close()
    assert list(tmp_path.iterdir()) == []


def test_the_example_of_the_package_docstring(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rlctl.__doc__ is not None
    code = rlctl.__doc__.partition("\n\n")[2].replace("steps=100_000", "steps=4096")
    assert "steps=4096" in code
    monkeypatch.chdir(tmp_path)
    said: list[float] = []
    exec(compile(code, "docstring", "exec"), {"print": said.append})
    assert math.isfinite(said[0])
    assert (tmp_path / "runs" / "mine" / "metrics.jsonl").exists()
    assert (tmp_path / "runs" / "mine" / "checkpoints" / "latest").exists()


def test_a_run_of_ones_own_resumes(tmp_path: Path) -> None:
    def session(steps: int, resume: bool) -> rlctl.Agent:
        env = rlctl.make_env("Hopper", 2, seed=0)
        agent = rlctl.make_agent("sac", env)
        run = rlctl.Run(tmp_path / f"{resume}", rlctl.RunConfig(log_every=10, tensorboard=False), resume=resume)
        rlctl.off_policy(agent, env, rlctl.Ring(1000), run, steps=steps, batch_size=8, learning_starts=20)
        run.finish(agent)
        run.close()
        return agent

    whole = session(80, False)
    session(50, True)
    again = session(80, True)
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), again.state_dict().values(), strict=True))


def test_stop_request_from_another_thread_is_seen_in_memory() -> None:
    env = rlctl.make_env("probe:both", 2, seed=0)
    agent = rlctl.make_agent("sac", env)
    run = rlctl.Run()
    threading.Timer(0.3, lambda: setattr(run, "_stop", True)).start()
    with pytest.raises(rlctl.Interrupted, match=r"^interrupted$"):
        rlctl.off_policy(agent, env, rlctl.Ring(1000), run, steps=10**9, learning_starts=10**9)


def test_offline_counts_gradient_steps(tmp_path: Path) -> None:
    from run_helpers import hdf5

    s = settings("td3bc", None, hdf5(tmp_path / "d.hdf5"), steps=40, batch_size=8, hidden=[8, 8], run={"log_every": 20})
    folder, result = experiment.train(s, tmp_path / "run", quiet=True)
    assert result is None  # a plain file does not name its environment
    assert [(r["env_steps"], r["updates"]) for r in rows(folder / "metrics.jsonl")] == [(0, 20), (0, 40)]
    assert "no evaluation" in (folder / "console.log").read_text()
    assert experiment.read_json(folder / "run.json")["final"] is None


def test_small_networks_take_one_thread_and_large_ones_all_cores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experiment, "available_cores", lambda: 6)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert experiment.torch_threads(rlctl.agents.get("ppo").Config()) == 1
    assert experiment.torch_threads(rlctl.agents.get("sac").Config()) == 6
    assert experiment.torch_threads(rlctl.agents.get("sac").Config(hidden=(64, 64))) == 1
    trpo = rlctl.agents.get("trpo").Config
    assert experiment.torch_threads(trpo()) == 6  # its products are as long as the rollout
    assert experiment.torch_threads(trpo(hidden=(16, 16))) == 1
    assert experiment.torch_threads(rlctl.types.AgentConfig()) == 6  # nobody knows
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert experiment.torch_threads(rlctl.agents.get("ppo").Config()) == 3
    before = torch.get_num_threads()
    try:
        experiment.train(settings("sac", "Hopper", steps=4, run={"threads": 2}), tmp_path / "run", quiet=True)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
