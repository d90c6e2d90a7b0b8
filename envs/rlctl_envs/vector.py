"""Simulated tasks as vectorised environments."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.contract import (
    ActionScale,
    EnvState,
    StepResult,
    VecEnv,
    check_state,
    rng_from_array,
    rng_to_array,
)
from rlctl_envs.engines import Backend, Physics, load_model, make_engine
from rlctl_envs.tasks import NUMPY, Task

__all__ = ["EnvState", "MujocoVecEnv", "StepResult", "VecEnv"]

_log = logging.getLogger(__name__)

_ONE = np.ones((), dtype=np.int64)
_MAX_DRAWS = 1000


class MujocoVecEnv(VecEnv):
    """A simulated `Task` in N copies.

    One random stream serves all copies, so seeds do not reproduce Gymnasium's individual ones. A simulation that
    diverges (MuJoCo resets it by itself, or its state is no longer finite) ends its episode: terminated is True,
    the reward of that step is 0 and `next_obs` repeats the last valid observation; it is counted in `num_diverged`
    and logged. So that one bad state cannot poison a learner, nothing returned is ever NaN or infinite.

    Args:
        task: the task; it is bound to its model here.
        num_envs: number of copies, N.
        env_id: name reported as `id`; the task's name with "-v5" by default.
        seed: of the random stream; entropy of the machine by default.
        device: where returned tensors live; the simulation itself runs on the CPU.
        backend: "batch", "pool", or "auto" (see `rlctl_envs.engines.make_engine`).
        threads: simulation threads; by default the cores available, at most N. Results do not depend on it.
        physics: "published" or "native" (see `rlctl_envs.engines.load_model`).
        dtype: of observations and rewards.
        episode_len: steps until truncation, where the task's own limit is not wanted.
    """

    can_checkpoint: bool = True
    can_stagger: bool = True

    def __init__(
        self,
        task: Task,
        num_envs: int = 1,
        *,
        env_id: str | None = None,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        backend: Backend = "auto",
        threads: int | None = None,
        physics: Physics = "published",
        dtype: torch.dtype = torch.float32,
        episode_len: int | None = None,
    ) -> None:
        model = load_model(task, physics)
        task.bind(model)
        name = env_id or f"{type(task).__name__}-v5"
        limit = task.episode_len if episode_len is None else episode_len
        self._describe(name, num_envs, task.observation_size(), int(model.nu), limit, device, dtype)
        self.task, self.physics = task, physics
        self.engine = make_engine(task, model, self.num_envs, threads, backend)
        low, high = model.actuator_ctrlrange.T
        self._scale = ActionScale(self, low, high)
        if task.goal_dim:
            self.engine.sim.goal = np.zeros((self.num_envs, task.goal_dim))
        # A reset computes derived fields only where they are read.
        self._forward = bool(task.derived) or task.clear_start
        self._qpos0, self._qvel0 = np.array(model.qpos0), np.zeros(model.nv)
        # On the CPU a tensor shares the array's memory.
        self._tensor: Callable[[NDArray[Any]], Tensor] = (
            torch.from_numpy if self.device.type == "cpu" else self._to_device
        )
        self._casts = self._np_dtype != np.float64
        self._terminates = task.terminates
        self._clock = np.zeros(self.num_envs, dtype=np.int64)
        # Steps until some episode can reach its limit: spares the test on every other step.
        self._steps_to_limit = self.episode_len
        self._obs: NDArray[Any] | None = None
        self._progress: NDArray[np.float64] | None = None
        self._finite = np.empty((self.num_envs, model.nq + model.nv), dtype=np.bool_)
        self._all_ids = np.arange(self.num_envs, dtype=np.int32)
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)

    @property
    def threads(self) -> int:
        """Simulation threads in use."""
        return self.engine.threads

    @property
    def current_obs(self) -> Tensor:
        """The observation [N, O] the next action answers."""
        return self._tensor(self._require_obs())

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start every environment anew; see `VecEnv.reset`."""
        self._check_open()
        self._check_options(options)
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)
        self._obs = np.empty((self.num_envs, self.obs_dim), self._np_dtype)
        self._restart(self._all_ids, self._obs)
        return self._tensor(self._obs), {}

    def stagger(self) -> None:
        """Spread the episodes' ages over the time limit; see `VecEnv.stagger`."""
        self._require_obs()
        self._clock[...] = self._staggered_ages()
        self._steps_to_limit = self.episode_len - int(self._clock.max())

    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every environment by one step; see `VecEnv`."""
        # At one environment this method costs as much as some tasks' physics, hence a few liberties: constants as
        # arrays (a ufunc converts a Python number anew every time), and work skipped while nothing can have ended.
        last_obs = self._obs
        if last_obs is None:
            last_obs = self._require_obs()
        task, sim, n = self.task, self.engine.sim, self.num_envs
        action = self._scale(actions)
        sim.ctrl[...] = action
        diverged = self.engine.step(task.frame_skip)

        obs = np.empty((n, self.obs_dim), self._np_dtype)
        task.write_obs(NUMPY, sim, obs)
        progress = task.progress(NUMPY, sim)
        healthy = task.healthy(NUMPY, sim)
        reward = task.reward(NUMPY, sim, action, self._progress, progress, healthy)
        self._progress = progress
        if self._casts:
            reward = reward.astype(self._np_dtype)

        terminated = np.logical_not(healthy) if self._terminates else np.zeros(n, np.bool_)
        np.isfinite(sim.state, out=self._finite)
        if diverged is not None or np.count_nonzero(self._finite) != self._finite.size:
            self._end_diverged(diverged, last_obs, obs, reward, terminated)

        np.add(self._clock, _ONE, out=self._clock)
        self._steps_to_limit -= 1
        if self._steps_to_limit > 0:
            truncated, done = np.zeros(n, np.bool_), terminated
        else:
            truncated = self._clock >= self.episode_len
            done = terminated | truncated
            self._steps_to_limit = self.episode_len - int(self._clock[~done].max(initial=0))

        obs_tensor = next_tensor = self._tensor(obs)
        if np.count_nonzero(done):
            obs = obs.copy()
            self._restart(done.nonzero()[0], obs)
            obs_tensor = self._tensor(obs)
        self._obs = obs
        terminated_tensor = self._tensor(terminated)
        done_tensor = terminated_tensor if done is terminated else self._tensor(done)
        return (
            obs_tensor,
            self._tensor(reward),
            terminated_tensor,
            self._tensor(truncated),
            {"next_obs": next_tensor, "final_obs": next_tensor, "_final_obs": done_tensor},
        )

    def state(self) -> EnvState:
        """Simulator rows and derived fields, random stream, episode clocks, current observation; see `VecEnv.state`."""
        obs = self._require_obs()
        state: EnvState = {f"engine.{name}": x for name, x in self.engine.state().items()}
        state["clock"] = self._clock.copy()
        state["num_diverged"] = np.array(self.num_diverged, dtype=np.int64)
        state["obs"] = obs.copy()
        state["rng"] = rng_to_array(self.np_random)
        if self.task.goal_dim:
            state["goal"] = self.engine.sim.goal.copy()
        return state

    def set_state(self, state: EnvState) -> None:
        """Continue from a `state` of the same task, settings and N (the engine and threads may differ)."""
        self._check_open()
        engine = self.engine.state()
        expected = {f"engine.{name}": x.shape for name, x in engine.items()}
        n = self.num_envs
        expected |= {"clock": (n,), "num_diverged": (), "obs": (n, self.obs_dim), "rng": (6,)}
        if self.task.goal_dim:
            expected["goal"] = (n, self.task.goal_dim)
        check_state(self, state, expected)
        self.np_random = rng_from_array(state["rng"])
        self.engine.set_state({name: state[f"engine.{name}"] for name in engine})
        if self.task.goal_dim:
            self.engine.sim.goal[:] = state["goal"]
        self._clock[:] = state["clock"]
        self.num_diverged = int(state["num_diverged"])
        self._obs = state["obs"].astype(self._np_dtype)
        self._steps_to_limit = self.episode_len - int(self._clock.max())
        self._progress = self.task.progress(NUMPY, self.engine.sim)

    def close_extras(self, **kwargs: Any) -> None:
        """Free the simulations; called once by `close`."""
        self.engine.close()
        self._obs = None

    def _require_obs(self) -> NDArray[Any]:
        """The current observation; an error before the first reset or after close."""
        if self._obs is None:
            self._check_open()
            raise RuntimeError(f"{self.id}: call reset() before the first step.")
        return self._obs

    def _check_open(self) -> None:
        """Refuse to work after close."""
        if self.closed:
            raise RuntimeError(f"{self.id}: the environment is closed.")

    def _to_device(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor on a device that is not the CPU."""
        return torch.from_numpy(array).to(self.device)

    def _restart(self, ids: NDArray[np.integer[Any]], obs: NDArray[Any]) -> None:
        """Begin new episodes in simulations `ids` [K] and write their observations into the rows of `obs` [N, O]."""
        task, engine = self.task, self.engine
        self._draw_starts(ids.astype(np.int32))
        if task.goal_dim:
            engine.sim.goal[ids] = task.sample_goal(NUMPY, self.np_random, len(ids))
        if len(ids) == self.num_envs:
            self._clock[...] = 0
            self._steps_to_limit = self.episode_len
            task.write_obs(NUMPY, engine.sim, obs)
            self._progress = task.progress(NUMPY, engine.sim)
            return
        self._clock[ids] = 0
        sim, rows = engine.sim.rows(ids), np.empty((len(ids), self.obs_dim), self._np_dtype)
        task.write_obs(NUMPY, sim, rows)
        obs[ids] = rows
        if self._progress is not None:
            self._progress[ids] = task.progress(NUMPY, sim)

    def _draw_starts(self, ids: NDArray[np.int32]) -> None:
        """Put simulations `ids` [K] into start states; where the task wants them clear, redraw those with contacts."""
        task, engine = self.task, self.engine
        for _ in range(_MAX_DRAWS):
            qpos, qvel = task.sample_start(NUMPY, self.np_random, len(ids), self._qpos0, self._qvel0)
            engine.reset(ids, qpos, qvel, self._forward, task.settle_steps)
            if not task.clear_start:
                return
            ids = ids[engine.contacts(ids) > 0]
            if not len(ids):
                return
        raise RuntimeError(f"{self.id}: no start without contact in {_MAX_DRAWS} draws of environment {ids[0]}.")

    def _end_diverged(
        self,
        reported: NDArray[np.int32] | None,
        last_obs: NDArray[Any],
        obs: NDArray[Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
    ) -> None:
        """Turn diverged simulations into ended episodes with finite outputs, in place; count and log them."""
        bad = ~self._finite.all(axis=1) | ~np.isfinite(obs).all(axis=1) | ~np.isfinite(reward)
        if reported is not None:
            bad[reported] = True
        ids = np.flatnonzero(bad)
        if not len(ids):
            return
        obs[ids] = last_obs[ids]
        reward[ids] = 0.0
        terminated[ids] = True
        self.num_diverged += len(ids)
        shown = ", ".join(map(str, ids[:8])) + (", ..." if len(ids) > 8 else "")
        _log.warning(
            "%s: the simulation diverged in environment %s; the episode ends there (%d so far).",
            self.id,
            shown,
            self.num_diverged,
        )
