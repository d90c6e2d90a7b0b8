"""Which engine simulates, what is said of it, and that nobody pays for warp who did not ask for it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import torch
from dmc_helpers import needs_models
from scipy import stats

import rlctl_envs
from rlctl_envs.engines import EngineUnavailable, available_cores, choice, choose, load_model
from rlctl_envs.tasks import DMC_TASKS, NUMPY, TASKS, TorchDraws, TorchOps


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine that has everything, where nobody has measured."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(choice, "missing_packages", list)
    monkeypatch.setattr(choice, "crossovers", dict)
    return monkeypatch


def test_auto_follows_the_device_and_the_number_of_worlds(gpu: pytest.MonkeyPatch) -> None:
    assert choose("Hopper", 100_000, "cpu").backend == "cpu"
    few, many = choose("Hopper", 2047, "cuda"), choose("Hopper", 2048, "cuda:1")
    assert (few.backend, many.backend) == ("cpu", "warp")
    assert "a guess, nobody has measured Hopper" in few.why
    assert "a guess, nobody has measured Hopper" in many.why


def test_auto_goes_by_measurement_where_there_is_one(gpu: pytest.MonkeyPatch) -> None:
    where = {"gpu": "Some GPU", "cpu": "Some CPU", "cores": 16}
    table = {"Hopper": {"num_envs": 512, **where}, "Ant": {"num_envs": None, **where}}
    gpu.setattr(choice, "crossovers", lambda: table)
    assert [choose("Hopper", n, "cuda").backend for n in (511, 512, 4096)] == ["cpu", "warp", "warp"]
    assert "from 512 worlds on, measured on Some GPU against 16 cores of Some CPU" in choose("Hopper", 512, "cuda").why
    assert choose("Ant", 10**6, "cuda").backend == "cpu"


def test_tasks_of_the_suite_go_there_too(gpu: pytest.MonkeyPatch) -> None:
    assert [choose("dmc:walker-walk", n, "cuda").backend for n in (2047, 2048)] == ["cpu", "warp"]
    assert choose("dmc:walker-walk", 1, "cpu", "warp").backend == "warp"
    with pytest.raises(ValueError, match="Pendulum-v1 cannot be simulated on a GPU: only the MuJoCo tasks and dmc:"):
        rlctl_envs.make("Pendulum-v1", 2, backend="warp")


def test_the_shipped_table_can_be_read() -> None:
    for task, entry in choice.crossovers().items():
        assert task in TASKS
        assert {"num_envs", "gpu", "cpu", "cores"} <= entry.keys()


def test_what_is_asked_for_is_taken_or_refused(gpu: pytest.MonkeyPatch) -> None:
    for backend in ("cpu", "batch", "pool", "warp"):
        assert choose("Hopper", 1, "cuda", backend).backend == backend
    assert "slow" in choose("Hopper", 1, "cpu", "warp").why
    with pytest.raises(ValueError, match="it is one of auto, cpu, batch, pool, warp"):
        choose("Hopper", 1, "cpu", "gpu")  # type: ignore[arg-type]
    gpu.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(EngineUnavailable, match="sees none"):
        choose("Hopper", 1, "cuda", "warp")


def test_a_missing_extra_is_named(gpu: pytest.MonkeyPatch) -> None:
    gpu.setattr(choice, "missing_packages", lambda: ["warp-lang", "mujoco-warp"])
    with pytest.raises(EngineUnavailable, match=r"needs warp-lang and mujoco-warp, .* pip install 'rlctl\[warp\]'"):
        rlctl_envs.make("Hopper", 4, backend="warp")
    found = choose("Hopper", 100_000, "cuda")
    assert found.backend == "cpu"
    assert "rlctl[warp]" in found.why


def test_options_of_the_gpu_are_refused_on_the_cpu() -> None:
    with pytest.raises(ValueError, match=r"njmax: options of the warp engine, but the CPU simulates \(the device is"):
        rlctl_envs.make("Hopper", 2, njmax=10)


@pytest.mark.parametrize("backend", ["auto", "cpu"])
def test_cpu_engines_serve_auto(backend: Any) -> None:
    env = rlctl_envs.make("Reacher", 2, backend=backend)
    assert isinstance(env, rlctl_envs.MujocoVecEnv)
    assert env.threads == min(2, available_cores())
    env.close()


def test_nothing_imports_warp_unless_asked() -> None:
    code = """
import sys, rlctl, rlctl.cli, rlctl_envs
env = rlctl_envs.make("Hopper", 2, seed=0)
env.reset()
rlctl_envs.task_table()
rlctl.make_agent("ppo", env)
assert not [m for m in sys.modules if m.split(".")[0] in ("warp", "mujoco_warp")]
"""
    subprocess.run([sys.executable, "-c", f"import sys; sys.path[:0] = {sys.path!r}\n{code}"], check=True)


@pytest.mark.parametrize("name", [*TASKS, *(pytest.param(name, marks=needs_models) for name in DMC_TASKS)])
def test_starts_drawn_by_torch_have_the_same_distribution(name: str) -> None:
    """Kolmogorov-Smirnov over 2000 starts, each coordinate; the torch draws are those of a GPU engine."""
    task, n = (TASKS | DMC_TASKS)[name](), 2000
    model = load_model(task)
    task.bind(model)
    zeros = np.zeros(model.nv)
    rng, draws = np.random.default_rng(0), TorchDraws(torch.Generator().manual_seed(0))
    ours = task.sample_start(NUMPY, rng, n, np.array(model.qpos0), zeros)
    goals = [task.sample_goal(NUMPY, rng, n)] if task.goal_dim else []
    for constant in task.constants:
        setattr(task, constant, torch.as_tensor(getattr(task, constant), dtype=torch.float32))
    tensors = (torch.tensor(model.qpos0, dtype=torch.float32), torch.zeros(model.nv))
    theirs = task.sample_start(TorchOps(), draws, n, *tensors)
    ours, theirs = (*ours, *goals), (*theirs, *(task.sample_goal(TorchOps(), draws, n) for _ in goals))
    for a, b in zip(ours, theirs, strict=True):
        assert a.shape == tuple(b.shape)
        assert b.dtype == torch.float32
        for column in range(a.shape[1]):
            x, y = a[:, column], b[:, column].double().numpy()
            if np.ptp(x) == 0:
                np.testing.assert_allclose(y, x, rtol=1e-6)
            else:
                assert stats.ks_2samp(x, y).statistic < 0.062  # 0.1 % critical value
