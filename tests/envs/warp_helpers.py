"""What the tests of the warp engine share: compiled kernels, and Gymnasium's single steps to compare with."""

from __future__ import annotations

import fcntl
from pathlib import Path
from typing import Any, NamedTuple

import gymnasium
import numpy as np
import pytest
import torch

from rlctl_envs.tasks import DMC_TASKS, NUMPY, TASKS, SimState
from rlctl_envs.warp_vector import WarpVecEnv

DEFAULT_TASKS = ("Hopper", "Ant", "Reacher")
"""Tasks of the default suite: a planar walker with contacts, contact forces in space, a start of its own."""


def make(name: str, num_envs: int = 4, **options: Any) -> WarpVecEnv:
    """The task on warp's CPU device, or where `device` says."""
    return WarpVecEnv((TASKS | DMC_TASKS)[name](), num_envs, **{"device": "cpu", "seed": 0} | options)


def compile_kernels(request: pytest.FixtureRequest, names: tuple[str, ...] = DEFAULT_TASKS) -> None:
    """Fill warp's kernel cache for the CPU; one test process at a time, the others then find it full.

    Not where tests on a GPU alone have been chosen: its machine may have no compiler for the CPU.
    """
    if all(item.get_closest_marker("gpu") for item in request.session.items):
        return
    import warp as wp

    wp.init()
    with (Path(wp.config.kernel_cache_dir) / "rlctl-tests.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for name in names:
            make(name, 2).reset()


class Steps(NamedTuple):
    """K single steps of Gymnasium: state before [K, ...], action in [-1, 1], and what came of it."""

    qpos: np.ndarray
    qvel: np.ndarray
    warm: np.ndarray
    before: np.ndarray
    """`Task.progress` before the step; zeros where the task has none."""
    action: np.ndarray
    obs: np.ndarray
    reward: np.ndarray
    terminated: np.ndarray


def gymnasium_steps(name: str, count: int) -> Steps:
    """Every third step of a free run under random actions, resets included."""
    env: Any = gymnasium.make(f"{name}-v5", disable_env_checker=True).unwrapped
    env.reset(seed=0)
    task, data, rng = TASKS[name](), env.data, np.random.default_rng(0)
    task.bind(env.model)
    low, high = env.model.actuator_ctrlrange.T
    rows: list[list[Any]] = []
    steps = 0
    while len(rows) < count:
        action = np.clip(rng.normal(0, 0.6, env.model.nu), -1, 1).astype(np.float32)
        steps += 1
        if keep := steps % 3 == 0:
            state = np.concatenate([data.qpos, data.qvel])[None]
            derived = {field: np.array(getattr(data, field))[None] for field in task.derived}
            sim = SimState(state[:, : env.model.nq], state[:, env.model.nq :], state, data.ctrl[None], **derived)
            before = task.progress(NUMPY, sim)
            rows.append(
                [data.qpos.copy(), data.qvel.copy(), data.qacc_warmstart.copy(), 0.0 if before is None else before[0]]
            )
        scaled = action * ((high - low) / 2).astype(np.float32) + ((high + low) / 2).astype(np.float32)
        obs, reward, terminated, _, _ = env.step(scaled)
        if keep:
            rows[-1] += [action, obs, reward, terminated]
        if terminated:
            env.reset()
    return Steps(*[np.array(column) for column in zip(*rows, strict=True)])


def rollout(env: Any, steps: int, seed: int = 0) -> list[torch.Tensor]:
    """Everything `steps` random steps return."""
    g = torch.Generator().manual_seed(seed)
    seen = []
    for _ in range(steps):
        obs, reward, terminated, truncated, info = env.step(torch.rand(env.num_envs, env.act_dim, generator=g) * 2 - 1)
        seen += [obs, reward, terminated, truncated, info["next_obs"], info["_final_obs"]]
    return seen


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    """Bit for bit."""
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
