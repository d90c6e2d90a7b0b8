"""Where a run computes and simulates, and that it says why."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from rlctl import experiment
from rlctl.errors import UsageError
from rlctl.types import Spec
from rlctl_envs.engines import choice


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine with a GPU and all packages, where nobody has measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "missing_packages", list)
    monkeypatch.setattr(choice, "crossovers", dict)
    return monkeypatch


def settings(algo: str = "ppo", **layer: Any) -> experiment.Settings:
    return experiment.resolve(algo, [{"env": "Hopper", **layer}])


def test_auto_stays_on_the_cpu_with_cpu_tasks_and_small_networks(gpu: pytest.MonkeyPatch) -> None:
    device, why = experiment.pick_device("auto", settings())
    assert device.type == "cpu"
    assert "simulated on the CPU" in why
    large = settings("sac", agent={"hidden": [2048, 2048]})
    assert experiment.pick_device("auto", large) == (torch.device("cuda", 0), "the networks are large")


def test_auto_goes_where_the_tasks_are_simulated(gpu: pytest.MonkeyPatch) -> None:
    many = settings(agent={"num_envs": 4096})
    device, why = experiment.pick_device("auto", many)
    assert device.type == "cuda"
    assert "a guess" in why
    assert experiment.pick_device("auto", settings(env_backend="warp"))[0].type == "cuda"
    on_cpu = settings(agent={"num_envs": 4096}, env_backend="cpu")
    assert experiment.pick_device("auto", on_cpu)[0].type == "cpu"
    probe = experiment.resolve("ppo", [{"env": "probe:both", "agent": {"num_envs": 4096}}])
    assert experiment.pick_device("auto", probe)[0].type == "cpu"


def test_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    device, why = experiment.pick_device("auto", settings(agent={"num_envs": 4096}))
    assert device.type == "cpu"
    assert "sees no CUDA device" in why
    for asked in ("cuda", "cuda:1"):
        with pytest.raises(UsageError, match="this machine shows no CUDA device"):
            experiment.pick_device(asked)
    with pytest.raises(UsageError, match="--env-backend warp: this machine shows no CUDA device"):
        experiment.pick_device("auto", settings(env_backend="warp"))
    with pytest.raises(UsageError, match="allowed are auto, cpu, cuda"):
        experiment.pick_device("tpu")


def test_many_worlds_mean_short_rollouts_and_large_minibatches() -> None:
    """In the many of a GPU the settings for a few would be one rollout of a million steps."""
    many = settings(agent={"num_envs": 4096})
    a: Any = many.agent
    assert (a.horizon, a.minibatch_size, a.epochs, a.steps) == (16, 16_384, 5, 81_920_000)
    assert many.run.evaluations == 10
    own: Any = settings(agent={"num_envs": 4096, "horizon": 32, "epochs": 2, "steps": 10**6}, run={"evaluations": 3})
    assert (own.agent.horizon, own.agent.minibatch_size, own.agent.epochs) == (32, 32_768, 2)
    assert (own.agent.steps, own.run.evaluations) == (10**6, 3)
    few: Any = settings(agent={"num_envs": 1023, "minibatch_size": 33})
    assert few.agent.horizon == settings().agent.horizon  # type: ignore[attr-defined]
    off_policy: Any = settings("sac", agent={"num_envs": 4096}).agent
    assert off_policy.steps == settings("sac").agent.steps
    for algo in ("trpo", "mdpo", "spo", "fixpo", "pmoe-ppo", "dppo"):
        cfg: Any = settings(algo, agent={"num_envs": 2048}).agent
        assert cfg.horizon == 16
        assert 2048 * 16 % getattr(cfg, "minibatch_size", 1) == 0
    again = experiment.resolve(None, [many.plain()])
    assert again.plain() == many.plain()


@pytest.mark.gpu
@pytest.mark.parametrize("algo", ["ppo", "sac"])
def test_gpu_a_whole_run_and_its_resumption(algo: str, tmp_path: Path) -> None:
    """Simulated, learned, evaluated, written and taken up again on the device."""
    layer: dict[str, Any] = {"env": "Hopper", "device": "cuda:0", "env_backend": "warp"}
    layer["agent"] = {"num_envs": 64, "steps": 8192}
    layer["run"] = {"evaluations": 2, "eval_episodes": 2, "final_episodes": 4, "graphs": "require"}
    if algo == "ppo":
        layer["agent"] |= {"horizon": 16, "minibatch_size": 256, "epochs": 2}
    folder = tmp_path / "run"
    _, result = experiment.train(experiment.resolve(algo, [layer]), folder, quiet=True)
    assert result is not None
    experiment.resume(folder, steps=16_384, quiet=True)
    record = experiment.read_json(folder / "run.json")
    assert (record["status"], record["engine"]) == ("done", "warp")
    agent, _ = experiment.load_agent(folder)
    assert all(p.is_cuda and bool(p.isfinite().all()) for p in agent.parameters())


def test_every_process_gets_a_gpu_of_its_own(gpu: pytest.MonkeyPatch) -> None:
    for name, value in (("WORLD_SIZE", "4"), ("RANK", "6"), ("LOCAL_RANK", "2")):
        gpu.setenv(name, value)
    assert experiment.pick_device("cuda")[0] == torch.device("cuda", 2)
    assert experiment.pick_device("cuda:1")[0] == torch.device("cuda", 1)


def test_backends_are_checked_and_kept_in_the_config() -> None:
    with pytest.raises(UsageError, match="env_backend is one of auto, cpu, warp; got 'gpu'"):
        settings(env_backend="gpu")
    assert "env_backend" not in settings().plain()
    assert settings(env_backend="cpu").plain()["env_backend"] == "cpu"
    assert settings().key() == settings(device="cpu").key()


def test_a_run_records_and_keeps_its_engine(tmp_path: Path, gpu: pytest.MonkeyPatch) -> None:
    """What was picked at the start is what a resumed run takes, whatever `auto` would say by then."""
    gpu.undo()
    layer = {"steps": 64, "num_envs": 4, "horizon": 16, "minibatch_size": 32, "run": {"final_episodes": 0}}
    layer["run"] = {"final_episodes": 0, "eval_every": 0, "tensorboard": False}
    folder, _ = experiment.train(settings(device="cpu", agent={}, **layer), tmp_path / "run", quiet=True)
    assert folder is not None
    record = json.loads((folder / "run.json").read_text())
    assert (record["engine"], record["processes"]) == ("cpu", 1)
    record["engine"] = "pool"
    (folder / "run.json").write_text(json.dumps(record))
    experiment.resume(folder, 128, quiet=True)
    assert json.loads((folder / "run.json").read_text())["engine"] == "pool"


@pytest.mark.parametrize(
    ("engine", "insisted", "expected"),
    [
        ("warp", "auto", "warp"),
        ("warp", "warp", "warp"),
        ("cpu", "auto", None),
        ("cpu", "cpu", "cpu"),
        (None, "cpu", "cpu"),
    ],
)
def test_evaluations_are_simulated_where_training_is(engine: Any, insisted: Any, expected: str | None) -> None:
    found = experiment._Sources(
        env=None,
        data=None,
        env_id="Hopper-v5",
        env_options={"physics": "native", "nconmax": 50},
        spec=Spec(11, 3),
        engine=None if engine is None else choice.Choice(engine, "told so"),
        insisted=insisted,
    )
    options = found.eval_options()
    assert options.pop("backend", None) == expected
    assert options == {"physics": "native"}  # buffers are of training's number of worlds
