"""Vectorised environments with torch tensors: the contract, and the MuJoCo implementation."""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium.utils import seeding
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.engines import Backend, Physics, load_model, make_engine
from rlctl_envs.tasks import NUMPY, Task

_log = logging.getLogger(__name__)

StepResult: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]
EnvState: TypeAlias = dict[str, NDArray[Any]]

_NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class VecEnv(VectorEnv[Tensor, Any, Tensor]):
    """N copies of one environment, torch tensors in and out: the contract every environment of this package keeps.

    - Actions [N, A] lie in [-1, 1], as torch tensor or numpy array; the environment clips and rescales them. A NaN or
      an infinity is an error.
    - `step` returns obs [N, O], reward [N], terminated [N], truncated [N] (bool) and an info with `next_obs` [N, O],
      the true successor of every row; `final_obs`, the same tensor under Gymnasium's name; `_final_obs` [N], where an
      episode ended.
    - Same-step autoreset: where an episode ended, `obs` is already the first of the next one, and `next_obs` the last
      of the old one. Elsewhere the two agree.
    - `terminated` and `truncated` may both be True; only `terminated` stops bootstrapping.
    - Returned tensors are never overwritten by a later step. They may share memory among each other (`next_obs` is
      `obs` when no episode ended) and with `current_obs`: copy before writing into one.
    - `state` and `set_state`, where `can_checkpoint`, continue a run bit for bit.
    """

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    id: str
    """Name with version, such as "Hopper-v5"."""
    num_envs: int
    obs_dim: int
    act_dim: int
    device: torch.device
    dtype: torch.dtype
    """Type of observations and rewards."""
    episode_len: int
    """Steps after which an episode is truncated."""
    can_checkpoint: bool = False
    _np_dtype: np.dtype[Any]
    num_diverged: int = 0
    """Simulations that ran away and were ended, since construction."""

    def _describe(
        self, env_id: str, num_envs: int, obs_dim: int, act_dim: int, episode_len: int, device: Any, dtype: torch.dtype
    ) -> None:
        """Set the attributes above and the spaces; checks num_envs, dtype and device."""
        if num_envs < 1:
            raise ValueError(f"num_envs is {num_envs}; it is at least 1.")
        if episode_len < 1:
            raise ValueError(f"episode_len is {episode_len}; it is at least 1.")
        if dtype not in _NUMPY_DTYPE:
            raise ValueError(f"dtype is {dtype}; it is torch.float32 or torch.float64.")
        self.id, self.num_envs, self.episode_len = env_id, int(num_envs), int(episode_len)
        self.obs_dim, self.act_dim = obs_dim, act_dim
        self.device, self.dtype = torch.device(device), dtype
        self._np_dtype = _NUMPY_DTYPE[dtype]
        self.single_observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (obs_dim,), self._np_dtype.type)
        self.single_action_space = gymnasium.spaces.Box(-1.0, 1.0, (act_dim,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)

    @property
    @abstractmethod
    def current_obs(self) -> Tensor:
        """The observation [N, O] the next action answers: of the last reset, step or set_state."""

    @abstractmethod
    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start every environment anew and return the observations [N, O].

        With a seed the random stream restarts there; without one it goes on. `options` must be empty.
        """

    @abstractmethod
    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every environment by one step; see the class. Raises ValueError on a bad action."""

    def state(self) -> EnvState:
        """Everything a bit-identical continuation needs, as plain arrays. Raises NotImplementedError without it."""
        raise NotImplementedError(f"{self.id}: this kind of environment cannot be checkpointed (can_checkpoint).")

    def set_state(self, state: EnvState) -> None:
        """Continue from what `state` returned. Raises ValueError if it does not fit this environment."""
        raise NotImplementedError(f"{self.id}: this kind of environment cannot be checkpointed (can_checkpoint).")

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.id}, num_envs={self.num_envs})"

    def _check_options(self, options: dict[str, Any] | None) -> None:
        """Refuse reset options: none are known, and ignoring one would hide a mistake."""
        if options:
            raise ValueError(f"{self.id}: reset takes no options; got {', '.join(map(repr, options))}.")

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        """Refuse actions that are not [N, A]."""
        if tuple(shape) != (self.num_envs, self.act_dim):
            raise ValueError(
                f"{self.id}: action has shape {tuple(shape)}; it must be ({self.num_envs}, {self.act_dim}): "
                "one row per environment."
            )

    def _bad_action(self, action: NDArray[Any]) -> ValueError:
        """Build the error for an action [N, A] that holds something not finite."""
        row, column = (int(i) for i in np.argwhere(~np.isfinite(action))[0])
        return ValueError(
            f"{self.id}: action of environment {row} is not finite: component {column} is {action[row, column]}. "
            "Actions are finite numbers in [-1, 1]; check the policy for divergence."
        )


class ActionScale:
    """Takes actions of [-1, 1] to simulator units: check, clip, rescale. The float type of the action is kept."""

    def __init__(self, env: VecEnv, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        self._env = env
        self._low, self._high = low, high
        self._half, self._middle = (high - low) / 2, (high + low) / 2
        self._unit = bool((low == -1).all() and (high == 1).all())
        # Work arrays and constants by float type. Constants are arrays because a ufunc converts scalars every time.
        self._arrays = {np.dtype(t): self._make_arrays(np.dtype(t)) for t in (np.float32, np.float64)}

    def _make_arrays(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
        """Output buffer [N, A], zeros [N * A], one, minus one, half width [A], middle [A]."""
        n, a = self._env.num_envs, self._env.act_dim
        return (
            np.empty((n, a), dtype),
            np.zeros(n * a, dtype),
            np.ones((), dtype),
            -np.ones((), dtype),
            self._half.astype(dtype),
            self._middle.astype(dtype),
        )

    def __call__(self, action: Any) -> NDArray[Any]:
        """Return actions [N, A] in simulator units, valid until the next call. Raises ValueError."""
        if isinstance(action, Tensor):
            action = action.detach().cpu().numpy()
        elif not isinstance(action, np.ndarray):
            action = np.asarray(action)
        env = self._env
        if action.shape != (env.num_envs, env.act_dim):
            env._check_shape(action.shape)
        arrays = self._arrays.get(action.dtype)
        if arrays is None:
            action = action.astype(np.float32)
            arrays = self._arrays[action.dtype]
        out, zeros, one, minus_one, half, middle = arrays
        # A product with zeros is zero unless some element is NaN or infinite: the cheapest test there is.
        if np.dot(action.reshape(-1), zeros) != 0.0:
            raise env._bad_action(action)
        np.minimum(action, one, out=out)
        np.maximum(out, minus_one, out=out)
        if not self._unit:
            # half * action + middle, so that -1 and 1 give the bounds exactly
            np.multiply(out, half, out=out)
            np.add(out, middle, out=out)
        return out


def rng_to_array(rng: np.random.Generator) -> NDArray[np.uint64]:
    """Encode a PCG64 generator as six integers: state and increment (high and low half), and the buffered draw."""
    state: Any = rng.bit_generator.state
    words = []
    for number in (state["state"]["state"], state["state"]["inc"]):
        words += [number >> 64, number & (2**64 - 1)]
    return np.array([*words, state["has_uint32"], state["uinteger"]], dtype=np.uint64)


def rng_from_array(words: NDArray[np.uint64]) -> np.random.Generator:
    """Decode what `rng_to_array` returned. Raises ValueError."""
    if words.shape != (6,):
        raise ValueError(f"random state has shape {words.shape}; it must be (6,).")
    w = [int(word) for word in words]
    bits = np.random.PCG64()
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": w[0] << 64 | w[1], "inc": w[2] << 64 | w[3]},
        "has_uint32": w[4],
        "uinteger": w[5],
    }
    return np.random.Generator(bits)


def check_state(env: VecEnv, given: EnvState, expected: dict[str, tuple[int, ...]]) -> None:
    """Refuse a state whose arrays are not exactly the expected names and shapes."""
    if given.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - given.keys()), sorted(given.keys() - expected.keys())
        raise ValueError(f"{env!r}: the state does not fit: missing {missing}, unknown {extra}.")
    for name, shape in expected.items():
        if given[name].shape != shape:
            raise ValueError(
                f"{env!r}: state {name!r} has shape {given[name].shape}; it must be {shape}. "
                "A state is for the same task, settings and number of environments."
            )


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
        self._qpos0, self._qvel0 = np.array(model.qpos0), np.zeros(model.nv)
        self._on_cpu = self.device.type == "cpu"
        self._clock = np.zeros(self.num_envs, dtype=np.int64)
        # Steps until some episode can reach its limit: spares the test on every other step.
        self._steps_to_limit = self.episode_len
        self._obs: NDArray[Any] | None = None
        self._progress: NDArray[np.float64] | None = None
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

    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every environment by one step; see `VecEnv`."""
        last_obs = self._require_obs()
        task, sim, n = self.task, self.engine.sim, self.num_envs
        action = self._scale(actions)
        sim.ctrl[:] = action
        diverged = self.engine.step(task.frame_skip)

        obs = np.empty((n, self.obs_dim), self._np_dtype)
        task.write_obs(NUMPY, sim, obs)
        progress = task.progress(NUMPY, sim)
        healthy = task.healthy(NUMPY, sim)
        reward = task.reward(NUMPY, sim, action, self._progress, progress, healthy)
        self._progress = progress
        if self._np_dtype != np.float64:
            reward = reward.astype(self._np_dtype)

        terminated = np.logical_not(healthy) if task.terminates else np.zeros(n, dtype=np.bool_)
        if diverged is not None or not math.isfinite(np.add.reduce(sim.state, axis=None)):
            self._end_diverged(diverged, last_obs, obs, reward, terminated)

        self._clock += 1
        self._steps_to_limit -= 1
        if self._steps_to_limit <= 0:
            truncated = self._clock >= self.episode_len
            done = terminated | truncated
            self._steps_to_limit = self.episode_len - int(self._clock[~done].max(initial=0))
        else:
            truncated = np.zeros(n, dtype=np.bool_)
            done = terminated.copy()

        next_obs = obs
        if np.count_nonzero(done):
            obs = next_obs.copy()
            self._restart(np.flatnonzero(done).astype(np.int32), obs)
        self._obs = obs

        next_tensor = self._tensor(next_obs)
        obs_tensor = next_tensor if obs is next_obs else self._tensor(obs)
        return (
            obs_tensor,
            self._tensor(reward),
            self._tensor(terminated),
            self._tensor(truncated),
            {"next_obs": next_tensor, "final_obs": next_tensor, "_final_obs": self._tensor(done)},
        )

    def state(self) -> EnvState:
        """Simulator rows and derived fields, random stream, episode clocks, current observation; see `VecEnv.state`."""
        obs = self._require_obs()
        state: EnvState = {f"engine.{name}": x for name, x in self.engine.state().items()}
        state["clock"] = self._clock.copy()
        state["num_diverged"] = np.array(self.num_diverged, dtype=np.int64)
        state["obs"] = obs.copy()
        state["rng"] = rng_to_array(self.np_random)
        return state

    def set_state(self, state: EnvState) -> None:
        """Continue from a `state` of the same task, settings and N (the engine and threads may differ)."""
        self._check_open()
        engine = self.engine.state()
        expected = {f"engine.{name}": x.shape for name, x in engine.items()}
        n = self.num_envs
        expected |= {"clock": (n,), "num_diverged": (), "obs": (n, self.obs_dim), "rng": (6,)}
        check_state(self, state, expected)
        self.np_random = rng_from_array(state["rng"])
        self.engine.set_state({name: state[f"engine.{name}"] for name in engine})
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

    def _tensor(self, array: NDArray[Any]) -> Tensor:
        """The array as a tensor on `device`, sharing memory on the CPU."""
        tensor = torch.from_numpy(array)
        return tensor if self._on_cpu else tensor.to(self.device)

    def _restart(self, ids: NDArray[np.int32], obs: NDArray[Any]) -> None:
        """Begin new episodes in simulations `ids` [K] and write their observations into the rows of `obs` [N, O]."""
        task, engine = self.task, self.engine
        qpos, qvel = task.sample_start(NUMPY, self.np_random, len(ids), self._qpos0, self._qvel0)
        engine.reset(ids, qpos, qvel, forward=bool(task.derived))
        self._clock[ids] = 0
        if len(ids) == self.num_envs:
            rows, sim = obs, engine.sim
            self._steps_to_limit = self.episode_len
        else:
            rows, sim = np.empty((len(ids), self.obs_dim), obs.dtype), engine.sim.rows(ids)
        task.write_obs(NUMPY, sim, rows)
        progress = task.progress(NUMPY, sim)
        if rows is obs:
            self._progress = progress
            return
        obs[ids] = rows
        if progress is not None and self._progress is not None:
            self._progress[ids] = progress

    def _end_diverged(
        self,
        reported: NDArray[np.int32] | None,
        last_obs: NDArray[Any],
        obs: NDArray[Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
    ) -> None:
        """Turn diverged simulations into ended episodes with finite outputs, in place; count and log them."""
        bad = ~np.isfinite(self.engine.sim.state).all(axis=1) | ~np.isfinite(obs).all(axis=1) | ~np.isfinite(reward)
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
