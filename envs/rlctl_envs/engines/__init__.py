"""Engines: how N simulations of a model are advanced on this machine."""

from __future__ import annotations

import functools
import logging
import os
from typing import Any, Literal, TypeAlias

import mujoco
import numpy as np

from rlctl_envs.engines.base import Engine, Physics, load_model, margins_add
from rlctl_envs.engines.batch import BatchEngine, BatchUnavailable
from rlctl_envs.engines.pool import PoolEngine
from rlctl_envs.tasks import TASKS, Task

__all__ = [
    "Backend",
    "BatchEngine",
    "BatchUnavailable",
    "Engine",
    "Physics",
    "PoolEngine",
    "available_cores",
    "batch_problem",
    "load_model",
    "make_engine",
    "margins_add",
]

Backend: TypeAlias = Literal["auto", "batch", "pool"]

_log = logging.getLogger(__name__)


def available_cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def batch_problem() -> str | None:
    """Compare one step of two ants in the batch engine with plain MuJoCo; say what is wrong, or None.

    Run once per process. The batch engine reads a C interface whose layout this package cannot check otherwise, so a
    change in MuJoCo must show here and degrade to the pool instead of giving wrong numbers. A mismatch is logged.
    """
    problem: str | None
    try:
        problem = _compare_one_step()
    except (BatchUnavailable, AttributeError, OSError, ValueError) as error:
        problem = f"{type(error).__name__}: {error}"
    if problem is not None:
        _log.warning("MuJoCo's batch engine is not usable (%s); using one MjData per environment instead.", problem)
    return problem


def _compare_one_step() -> str | None:
    """Step two ants of different poses both ways; return the name of the first field that differs."""
    task = TASKS["Ant"]()
    model = load_model(task)
    derived = ("xpos", "cfrc_ext")
    batch = BatchEngine(model, 2, 1, derived, contact_forces=True)
    try:
        qpos = np.stack([model.qpos0, model.qpos0])
        qpos[1, 2] = 0.2  # four feet still touch the ground after the step: contact forces are not zero
        qvel = np.full((2, model.nv), 0.1)
        ctrl = np.stack([np.full(model.nu, 0.3), np.full(model.nu, -0.2)])
        batch.reset(np.arange(2, dtype=np.int32), qpos, qvel, forward=True)
        batch.sim.ctrl[:] = ctrl
        if batch.step(task.frame_skip) is not None:
            return "a step reports divergence where there is none"
        for i in range(2):
            data = mujoco.MjData(model)
            data.qpos[:], data.qvel[:] = qpos[i], qvel[i]
            mujoco.mj_forward(model, data)
            data.ctrl[:] = ctrl[i]
            mujoco.mj_step(model, data, task.frame_skip)
            mujoco.mj_rnePostConstraint(model, data)
            for name in ("qpos", "qvel", *derived):
                if not np.array_equal(getattr(batch.sim, name)[i], getattr(data, name)):
                    return f"{name} differs from a plain simulation"
    finally:
        batch.close()
    return None


def make_engine(task: Task, model: Any, num_envs: int, threads: int | None = None, backend: Backend = "auto") -> Engine:
    """Make the engine for a bound task.

    `threads` defaults to the cores available, at most one per environment. `backend` "auto" takes the batch engine
    if it passes its self-test, else the pool; naming one insists on it. Raises ValueError, or BatchUnavailable.
    """
    if threads is not None and threads < 1:
        raise ValueError(f"threads is {threads}; it is at least 1, or None for the cores available.")
    threads = min(num_envs, available_cores() if threads is None else threads)
    if backend not in ("auto", "batch", "pool"):
        raise ValueError(f"backend is {backend!r}; it is 'auto', 'batch' or 'pool'.")
    use_pool = backend == "pool" or (backend == "auto" and batch_problem() is not None)
    kind: type[PoolEngine] | type[BatchEngine] = PoolEngine if use_pool else BatchEngine
    return kind(
        model,
        num_envs,
        threads,
        task.derived,
        contact_forces=task.contact_forces,
        fresh=task.fresh,
        count_contacts=task.clear_start,
    )
