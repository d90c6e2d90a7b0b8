"""Any Gymnasium environment with continuous observations and actions, as a `VecEnv`."""

from __future__ import annotations

import functools
import importlib
import multiprocessing
import signal
from typing import Any, NoReturn

import gymnasium
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.error import AlreadyPendingCallError
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.contract import ActionScale, StepResult, VecEnv


class GymnasiumVecEnv(VecEnv):
    """N copies of a Gymnasium environment, stepped one after the other or each in a process of its own.

    Observations must be a Box, or a Dict or Tuple of Boxes; anything but a vector is flattened by Gymnasium's
    `flatten` (keys in sorted order). Actions must be a Box with finite bounds; they are taken from [-1, 1] to those
    bounds. Copy i is seeded with seed + i, as Gymnasium does. Such environments hide their state, so they cannot be
    checkpointed (`can_checkpoint` is False): a resumed run starts new episodes.

    Args:
        env_id: a registered id; "module:Id" imports the module first.
        num_envs: number of copies, N.
        seed: of the first reset, where that names none.
        device: where returned tensors live.
        dtype: of observations and rewards.
        workers: None steps all copies in this process; N gives each copy a process of its own (worth it only for
            environments slower than about a millisecond per step). No other number is supported.
        episode_len: steps until truncation; by default the one the id is registered with.
        worker_timeout: seconds to wait for a worker process before giving up on it.
        **env_kwargs: for the environment's constructor.

    Raises ValueError if the environment does not fit.
    """

    can_checkpoint: bool = False

    def __init__(
        self,
        env_id: str,
        num_envs: int = 1,
        *,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        workers: int | None = None,
        episode_len: int | None = None,
        worker_timeout: float = 120.0,
        **env_kwargs: Any,
    ) -> None:
        if workers is not None and workers != num_envs:
            raise ValueError(f"{env_id}: workers is {workers}; it is None, or num_envs ({num_envs}): one each.")
        limit = _episode_len(env_id, episode_len)
        build = functools.partial(_build, env_id, limit, env_kwargs)
        probe = build()
        try:
            low, high = _action_bounds(env_id, probe.action_space)
            assert isinstance(probe.observation_space, spaces.Box)  # _build flattens
            self._action_space = probe.action_space
            obs_dim = int(np.prod(probe.observation_space.shape))
        finally:
            probe.close()
        self._describe(env_id, num_envs, obs_dim, len(low), limit, device, dtype)
        self._scale = ActionScale(self, low, high)
        self._timeout = worker_timeout
        self._first_seed = seed
        self._obs: Tensor | None = None
        self._envs: SyncVectorEnv | AsyncVectorEnv
        if workers is None:
            self._envs = SyncVectorEnv([build] * num_envs, autoreset_mode=AutoresetMode.SAME_STEP)
        else:
            # Not fork: it copies a process whose torch threads hold locks.
            start = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
            self._envs = AsyncVectorEnv([build] * num_envs, context=start, autoreset_mode=AutoresetMode.SAME_STEP)

    @property
    def current_obs(self) -> Tensor:
        """The observation [N, O] the next action answers."""
        if self._obs is None:
            raise RuntimeError(f"{self.id}: call reset() before the first step.")
        return self._obs

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start every environment anew; `options` are passed on to the environments."""
        self._check_open()
        seed = self._first_seed if seed is None else seed
        self._first_seed = None
        try:
            if isinstance(self._envs, AsyncVectorEnv):
                self._envs.reset_async(seed=seed, options=options)
                obs, _ = self._envs.reset_wait(timeout=self._timeout)
            else:
                obs, _ = self._envs.reset(seed=seed, options=options)
        except (EOFError, OSError, multiprocessing.TimeoutError, AlreadyPendingCallError) as error:
            self._worker_failed(error)
        self._obs = self._tensor(np.array(obs, dtype=self._np_dtype))
        return self._obs, {}

    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every environment by one step; see `VecEnv`. Raises RuntimeError if a worker process failed."""
        self._check_open()
        _ = self.current_obs
        scaled = self._scale(actions).astype(self._action_space.dtype)
        scaled = scaled.reshape(self.num_envs, *(self._action_space.shape or ()))
        try:
            if isinstance(self._envs, AsyncVectorEnv):
                self._envs.step_async(scaled)
                obs, reward, terminated, truncated, info = self._envs.step_wait(timeout=self._timeout)
            else:
                obs, reward, terminated, truncated, info = self._envs.step(scaled)
        except (EOFError, OSError, multiprocessing.TimeoutError, AlreadyPendingCallError) as error:
            self._worker_failed(error)
        except Exception as error:
            if isinstance(self._envs, SyncVectorEnv):
                raise  # the environment's own error, with its own traceback
            self._worker_failed(error)
        new = np.array(obs, dtype=self._np_dtype)
        done = np.logical_or(terminated, truncated)
        successor = new
        if done.any():
            successor = new.copy()
            for i in np.flatnonzero(done):
                successor[i] = info["final_obs"][i]
        next_obs = self._tensor(successor)
        self._obs = next_obs if successor is new else self._tensor(new)
        return (
            self._obs,
            self._tensor(np.array(reward, dtype=self._np_dtype)),
            self._tensor(np.array(terminated, dtype=np.bool_)),
            self._tensor(np.array(truncated, dtype=np.bool_)),
            {"next_obs": next_obs, "final_obs": next_obs, "_final_obs": self._tensor(done)},
        )

    def close_extras(self, **kwargs: Any) -> None:
        """Close the environments and end the worker processes; called once by `close`."""
        if isinstance(self._envs, AsyncVectorEnv):
            self._envs.close(timeout=5)
        else:
            self._envs.close()
        self._obs = None

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor on `device`."""
        return torch.from_numpy(array).to(self.device)

    def _check_open(self) -> None:
        """Refuse to work after close, or after a worker failed."""
        if self.closed:
            raise RuntimeError(f"{self.id}: the environment is closed.")

    def _worker_failed(self, error: Exception) -> NoReturn:
        """End all workers and raise an error that says which one failed, how, and what to do."""
        assert isinstance(self._envs, AsyncVectorEnv)
        for process in self._envs.processes:
            # A process that has just been killed takes a moment to be seen dead.
            process.join(timeout=0.2 / self.num_envs)
        dead = [(i, p.exitcode) for i, p in enumerate(self._envs.processes) if not p.is_alive()]
        if isinstance(error, multiprocessing.TimeoutError) and not dead:
            cause = f"no answer from the workers within {self._timeout:g} s (worker_timeout)"
        elif any(code for _, code in dead):
            cause = "; ".join(f"worker {i} died with {_describe_exit(code)}" for i, code in dead if code)
        else:
            # Gymnasium logs the worker's traceback and raises its exception here.
            named = ", ".join(f"worker {i}" for i, _ in dead) or "a worker"
            cause = f"{named} raised {type(error).__name__}: {error}"
        for process in self._envs.processes:
            process.kill()
        self._envs.closed = True  # nothing left for Gymnasium to close
        self.closed = True
        raise RuntimeError(
            f"{self.id}: {cause}. The environment is closed. Run with workers=None to see the error where it "
            "happens, or make the environment anew."
        ) from error


def _build(env_id: str, limit: int, env_kwargs: dict[str, Any]) -> gymnasium.Env[Any, Any]:
    """Make one copy with flat observations. Runs in worker processes, so it is a plain function."""
    env: gymnasium.Env[Any, Any] = gymnasium.make(
        env_id, max_episode_steps=limit, disable_env_checker=True, **env_kwargs
    )
    if not _all_boxes(env.observation_space):
        space = env.observation_space
        env.close()
        raise ValueError(f"{env_id}: observations are {space}; only Box, or Dict or Tuple of Box, are supported.")
    if not isinstance(env.observation_space, spaces.Box) or len(env.observation_space.shape) != 1:
        env = FlattenObservation(env)
    return env


def _all_boxes(space: spaces.Space[Any]) -> bool:
    """Whether a space is a Box or made of Boxes only."""
    if isinstance(space, spaces.Dict):
        return all(_all_boxes(part) for part in space.spaces.values())
    if isinstance(space, spaces.Tuple):
        return all(_all_boxes(part) for part in space.spaces)
    return isinstance(space, spaces.Box)


def _action_bounds(env_id: str, space: spaces.Space[Any]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Lower and upper action bounds, flat, or a ValueError that says what is wrong with the space."""
    if not isinstance(space, spaces.Box) or not np.issubdtype(space.dtype, np.floating):
        raise ValueError(f"{env_id}: actions are {space}; they must be a Box of floats (continuous control).")
    low, high = space.low.astype(np.float64).ravel(), space.high.astype(np.float64).ravel()
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ValueError(
            f"{env_id}: actions are {space}; bounds must be finite. Wrap it in RescaleAction or ClipAction."
        )
    return low, high


def _episode_len(env_id: str, given: int | None) -> int:
    """The time limit in steps: given, or registered with the id."""
    module, _, registered = env_id.rpartition(":")
    if module:
        importlib.import_module(module)
    limit = given if given is not None else gymnasium.spec(registered).max_episode_steps
    if limit is None:
        raise ValueError(f"{env_id} is registered without a time limit: pass episode_len=STEPS.")
    return limit


def _describe_exit(code: int | None) -> str:
    """Word a process's exit code."""
    if code is not None and code < 0:
        return f"signal {signal.Signals(-code).name}"
    return f"exit code {code}"
