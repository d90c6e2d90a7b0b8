"""Probe environments: tiny problems whose optimal actions and values are known in closed form.

Each isolates one thing an agent must get right, in the order in which to look for a fault: the value of a constant
(`constant`), of an observation (`observation`), of a later reward (`delayed`), the choice of an action (`action`), a
choice that depends on the observation (`both`), and bootstrapping through a time limit (`time-limit`). A working agent
solves every one in seconds, so a failure says which part of it is broken.

Rewards of a step depend on the state and the action before it; values are those of the optimal policy at the start
of a step and discount by gamma per step.
"""

from __future__ import annotations

import difflib
from abc import abstractmethod
from typing import Any, ClassVar

import numpy as np
import torch
from gymnasium.utils import seeding
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.contract import EnvState, StepResult, VecEnv, check_state, rng_from_array, rng_to_array


class ProbeEnv(VecEnv):
    """Base of the probes: N copies held as tensors, vectorised by arithmetic; checkpointable.

    A subclass says how an episode starts, what a step pays and when it ends, and knows its own solution.
    """

    can_checkpoint: bool = True
    can_stagger: bool = True
    probe_obs_dim: ClassVar[int] = 1
    default_episode_len: ClassVar[int] = 2
    """One more than the step that terminates, so that the time limit plays no part."""
    summary: ClassVar[str]
    name: ClassVar[str]

    def __init__(
        self,
        num_envs: int = 1,
        *,
        act_dim: int = 1,
        seed: int | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        episode_len: int | None = None,
    ) -> None:
        limit = self.default_episode_len if episode_len is None else episode_len
        self._describe(f"probe:{self.name}", num_envs, self.probe_obs_dim, act_dim, limit, device, dtype)
        if act_dim < 1:
            raise ValueError(f"act_dim is {act_dim}; it is at least 1.")
        self._obs: Tensor | None = None
        self._clock = torch.zeros(num_envs, dtype=torch.int64)
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)

    @abstractmethod
    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Draw the first observations [n, O] of n episodes."""

    @abstractmethod
    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """Reward [N] for taking `action` [N, A] in `obs` [N, O]."""

    def advance(self, obs: Tensor) -> Tensor:
        """Successor observations [N, O]; by default the same again."""
        return obs.clone()

    def ends(self, clock: Tensor) -> Tensor:
        """Whether the episode terminates after step number `clock` [N] (from 1); by default after the first."""
        return clock >= 1

    @abstractmethod
    def optimal_action(self, obs: Tensor) -> Tensor:
        """Best action [N, A] in `obs`; zeros where no action matters."""

    @abstractmethod
    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """Value [N] of `obs` under the best actions."""

    @property
    def current_obs(self) -> Tensor:
        """The observation [N, O] the next action answers."""
        return self._require_obs().to(self.device)

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Tensor, dict[str, Any]]:
        """Start every episode anew; see `VecEnv.reset`."""
        self._check_open()
        self._check_options(options)
        if seed is not None:
            self._np_random, self._np_random_seed = seeding.np_random(seed)
        self._obs = torch.as_tensor(self.first_obs(self.num_envs), dtype=self.dtype)
        self._clock = torch.zeros(self.num_envs, dtype=torch.int64)
        return self._obs.to(self.device), {}

    def stagger(self) -> None:
        """Spread the episodes' ages over the time limit; see `VecEnv.stagger`."""
        _ = self.current_obs
        self._clock = torch.from_numpy(self._staggered_ages())

    def step(self, actions: Tensor | NDArray[Any]) -> StepResult:
        """Advance every episode by one step; see `VecEnv`."""
        obs = self._require_obs()
        action = torch.as_tensor(actions).detach().to("cpu", self.dtype)
        self._check_shape(tuple(action.shape))
        if not bool(torch.isfinite(action).all()):
            raise self._bad_action(action.numpy())
        reward = self.pay(obs, action.clamp(-1.0, 1.0))
        self._clock = self._clock + 1
        terminated, truncated = self.ends(self._clock), self._clock >= self.episode_len
        done = terminated | truncated
        next_obs = self.advance(obs)
        self._obs = next_obs
        if bool(done.any()):
            self._obs = next_obs.clone()
            self._obs[done] = torch.as_tensor(self.first_obs(int(done.sum())), dtype=self.dtype)
            self._clock[done] = 0
        successor = next_obs.to(self.device)
        info = {"next_obs": successor, "final_obs": successor, "_final_obs": done.to(self.device)}
        moved = (x.to(self.device) for x in (self._obs, reward, terminated, truncated))
        return (*moved, info)  # type: ignore[return-value]

    def state(self) -> EnvState:
        """Observation, clocks, random stream."""
        obs = self._require_obs()
        return {"obs": obs.numpy().copy(), "clock": self._clock.numpy().copy(), "rng": rng_to_array(self.np_random)}

    def set_state(self, state: EnvState) -> None:
        """Continue from what `state` returned."""
        self._check_open()
        check_state(self, state, {"obs": (self.num_envs, self.obs_dim), "clock": (self.num_envs,), "rng": (6,)})
        self._obs = torch.tensor(state["obs"], dtype=self.dtype)
        self._clock = torch.tensor(state["clock"], dtype=torch.int64)
        self.np_random = rng_from_array(state["rng"])

    def _require_obs(self) -> Tensor:
        """The current observation; an error before the first reset or after close."""
        self._check_open()
        if self._obs is None:
            raise RuntimeError(f"{self.id}: call reset() before the first step.")
        return self._obs

    def _check_open(self) -> None:
        """Refuse to work after close."""
        if self.closed:
            raise RuntimeError(f"{self.id}: the environment is closed.")

    def _signs(self, n: int) -> NDArray[np.float64]:
        """Draw -1 or 1, [n, 1]."""
        return self.np_random.integers(0, 2, (n, 1)).astype(np.float64) * 2.0 - 1.0

    def _idle(self, obs: Tensor) -> Tensor:
        """Zero actions [N, A], for probes in which no action matters."""
        return obs.new_zeros(len(obs), self.act_dim)


class ConstantReward(ProbeEnv):
    """One step, observation 0, reward 1. V = 1: the critic's loss and step are right."""

    name = "constant"
    summary = "one step, reward 1: value 1"

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Zeros."""
        return np.zeros((n, 1))

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """One."""
        return torch.ones(len(obs), dtype=obs.dtype)

    def optimal_action(self, obs: Tensor) -> Tensor:
        """None matters."""
        return self._idle(obs)

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """One."""
        return torch.ones_like(obs[:, 0])


class ObservationReward(ProbeEnv):
    """One step, observation -1 or 1, reward equal to it. V(s) = s: the critic reads its input."""

    name = "observation"
    summary = "one step, reward = observation: value = observation"

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Minus one or one."""
        return self._signs(n)

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """The observation."""
        return obs[:, 0].clone()

    def optimal_action(self, obs: Tensor) -> Tensor:
        """None matters."""
        return self._idle(obs)

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """The observation."""
        return obs[:, 0].clone()


class DelayedReward(ProbeEnv):
    """Two steps, observations 0 then 1, reward 1 at the second. V(0) = gamma, V(1) = 1: discounting is right."""

    name = "delayed"
    summary = "two steps, reward 1 at the second: value gamma, then 1"
    default_episode_len = 3

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Zeros."""
        return np.zeros((n, 1))

    def advance(self, obs: Tensor) -> Tensor:
        """One."""
        return torch.ones_like(obs)

    def ends(self, clock: Tensor) -> Tensor:
        """After the second step."""
        return clock >= 2

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """One at the second step."""
        return obs[:, 0].clone()

    def optimal_action(self, obs: Tensor) -> Tensor:
        """None matters."""
        return self._idle(obs)

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """Gamma at the first step, one at the second."""
        return torch.where(obs[:, 0] > 0.5, 1.0, gamma).to(obs.dtype)


class ActionReward(ProbeEnv):
    """One step, reward 1 - mean((a - 0.4)^2). Best action 0.4, V = 1: the actor's loss has the right sign and scale."""

    name = "action"
    summary = "one step, reward 1 - (action - 0.4)^2: best action 0.4, value 1"
    target: ClassVar[float] = 0.4

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Zeros."""
        return np.zeros((n, 1))

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """One at the best action, falling with the mean square distance."""
        return 1.0 - (action - self.optimal_action(obs)).square().mean(-1)

    def optimal_action(self, obs: Tensor) -> Tensor:
        """Always 0.4."""
        return self._idle(obs) + self.target

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """One."""
        return torch.ones_like(obs[:, 0])


class ActionObservationReward(ActionReward):
    """One step, observation -1 or 1, reward 1 - mean((a - s / 2)^2). V = 1: the actor reads its input."""

    name = "both"
    summary = "one step, reward 1 - (action - obs / 2)^2: best action obs / 2, value 1"

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Minus one or one."""
        return self._signs(n)

    def optimal_action(self, obs: Tensor) -> Tensor:
        """Half the observation."""
        return 0.5 * obs[:, :1].expand(-1, self.act_dim)


class TimeLimit(ProbeEnv):
    """Reward 1 forever, truncated every `episode_len` (10) steps, never terminated.

    V = 1 / (1 - gamma) exactly, if and only if a truncation bootstraps from its true successor.
    """

    name = "time-limit"
    summary = "reward 1 for ever, truncated every 10 steps: value 1 / (1 - gamma)"
    default_episode_len = 10

    def first_obs(self, n: int) -> NDArray[np.float64]:
        """Zeros."""
        return np.zeros((n, 1))

    def ends(self, clock: Tensor) -> Tensor:
        """Never."""
        return torch.zeros_like(clock, dtype=torch.bool)

    def pay(self, obs: Tensor, action: Tensor) -> Tensor:
        """One."""
        return torch.ones(len(obs), dtype=obs.dtype)

    def optimal_action(self, obs: Tensor) -> Tensor:
        """None matters."""
        return self._idle(obs)

    def value(self, obs: Tensor, gamma: float) -> Tensor:
        """The geometric series."""
        return torch.full_like(obs[:, 0], 1.0 / (1.0 - gamma))


PROBES: dict[str, type[ProbeEnv]] = {
    cls.name: cls
    for cls in (ConstantReward, ObservationReward, DelayedReward, ActionReward, ActionObservationReward, TimeLimit)
}
"""The probes by name."""


def make_probe(name: str, num_envs: int = 1, **kwargs: Any) -> ProbeEnv:
    """Make the probe called `name`; see `ProbeEnv` for the keywords. Raises UnknownTask."""
    if name not in PROBES:
        from rlctl_envs.registry import UnknownTask

        near = difflib.get_close_matches(name, PROBES, n=1)
        hint = f"did you mean 'probe:{near[0]}'? " if near else ""
        raise UnknownTask(f"unknown environment 'probe:{name}': {hint}list them with `rlctl envs`")
    return PROBES[name](num_envs, **kwargs)
