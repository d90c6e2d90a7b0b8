"""The contract of vectorised environments with torch tensors, and what every kind of them needs. No simulator."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, TypeAlias

import gymnasium
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray
from torch import Tensor

StepResult: TypeAlias = tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]
EnvState: TypeAlias = dict[str, NDArray[Any]]

_NUMPY_DTYPE: dict[torch.dtype, np.dtype[Any]] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
}


class NonFiniteAction(ValueError):
    """An action holds a NaN or an infinity: as a rule the policy has diverged."""


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
      `obs` when no episode ended, `_final_obs` may be `terminated`) and with `current_obs`: copy before writing.
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
    can_stagger: bool = False
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

    @property
    def action_bounds(self) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """Lower and upper bounds [A] in the environment's own units: what actions of -1 and 1 become."""
        scale: ActionScale | None = getattr(self, "_scale", None)
        if scale is None:
            return -np.ones(self.act_dim), np.ones(self.act_dim)
        return scale.low.copy(), scale.high.copy()

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

    def report(self) -> dict[str, float]:
        """What is worth a line in a log now and then, by TensorBoard tag: troubles since construction, none if none.

        Where the environment lives on a device this waits for it, so it is asked once per rollout or log row, not per
        step. May raise what `step` could not find out in time.
        """
        return {"env/diverged": float(self.num_diverged)} if self.num_diverged else {}

    def stagger(self) -> None:
        """After a reset: spread the running episodes' ages evenly over the time limit; environment 0 keeps age 0.

        Their first episodes are truncated that much sooner, and from then on the environments do not reach their limits
        all in the same step: a rollout shorter than an episode sees all of its phases.
        """
        raise NotImplementedError(f"{self.id}: this kind of environment cannot be staggered (can_stagger).")

    def _staggered_ages(self) -> NDArray[np.int64]:
        """Steps [N] each environment's episode counts as having run."""
        return np.arange(self.num_envs, dtype=np.int64) * self.episode_len // self.num_envs

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

    def _bad_action(self, action: NDArray[Any]) -> NonFiniteAction:
        """Build the error for an action [N, A] that holds something not finite."""
        row, column = (int(i) for i in np.argwhere(~np.isfinite(action))[0])
        return NonFiniteAction(
            f"{self.id}: action of environment {row} is not finite: component {column} is {action[row, column]}. "
            "Actions are finite numbers in [-1, 1]; check the policy for divergence."
        )


class ActionScale:
    """Takes actions of [-1, 1] to simulator units: check, clip, rescale. The float type of the action is kept."""

    def __init__(self, env: VecEnv, low: NDArray[np.float64], high: NDArray[np.float64]) -> None:
        self._env = env
        self.low, self.high = low, high
        self._half, self._middle = (high - low) / 2, (high + low) / 2
        self._unit = bool((low == -1).all() and (high == 1).all())
        # Work arrays and constants by float type. Constants are arrays because a ufunc converts scalars every time.
        self._arrays = {np.dtype(t): self._make_arrays(np.dtype(t)) for t in (np.float32, np.float64)}

    def _make_arrays(self, dtype: np.dtype[Any]) -> tuple[NDArray[Any], ...]:
        """Output buffer [N, A], finite [N, A], one, minus one, half width [A], middle [A]."""
        n, a = self._env.num_envs, self._env.act_dim
        return (
            np.empty((n, a), dtype),
            np.empty((n, a), np.bool_),
            np.ones((), dtype),
            -np.ones((), dtype),
            self._half.astype(dtype),
            self._middle.astype(dtype),
        )

    def __call__(self, action: Any) -> NDArray[Any]:
        """Return actions [N, A] in simulator units, valid until the next call. Raises ValueError."""
        if isinstance(action, Tensor):
            if action.requires_grad or not action.is_cpu:
                action = action.detach().cpu()
            action = action.numpy()
        elif not isinstance(action, np.ndarray):
            action = np.asarray(action)
        env = self._env
        if action.shape != (env.num_envs, env.act_dim):
            env._check_shape(action.shape)
        arrays = self._arrays.get(action.dtype)
        if arrays is None:
            action = action.astype(np.float32)
            arrays = self._arrays[action.dtype]
        out, finite, one, minus_one, half, middle = arrays
        np.isfinite(action, out=finite)
        if np.count_nonzero(finite) != finite.size:
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
