"""What a simulated task is: a model, a start distribution, and pure functions of the simulator's state."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
import torch

from rlctl_envs.tasks.arrays import Array, ArrayOps


@dataclass(slots=True)
class SimState:
    """Live arrays over N simulations, as an engine exposes them; the first axis is always N.

    `state` is qpos and qvel side by side, [N, nq + nv]. Derived fields describe the instant before the last physics
    substep (as `mj_step` leaves them), or with `Task.fresh` the one after it; they are None unless the task lists them
    in `derived`. `goal` [N, G] holds what the task drew for the running episode besides the joint state.
    """

    qpos: Array
    qvel: Array
    state: Array
    ctrl: Array
    xpos: Array = None
    xmat: Array = None
    xipos: Array = None
    geom_xpos: Array = None
    geom_xmat: Array = None
    site_xpos: Array = None
    sensordata: Array = None
    cinert: Array = None
    cvel: Array = None
    cfrc_ext: Array = None
    qfrc_actuator: Array = None
    qfrc_constraint: Array = None
    goal: Array = None

    def rows(self, ids: Array) -> SimState:
        """Copy the simulations `ids` (integer array [K]) into a state of their own."""
        state = self.state[ids]
        nq = self.qpos.shape[1]
        rest = {name: None if (x := getattr(self, name)) is None else x[ids] for name in _OPTIONAL}
        return SimState(qpos=state[:, :nq], qvel=state[:, nq:], state=state, ctrl=self.ctrl[ids], **rest)


_OPTIONAL = tuple(f.name for f in fields(SimState))[4:]


class Draws(Protocol):
    """The random draws a start distribution uses (numpy's `Generator` has them; other engines bring their own)."""

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> Array:
        """Draw uniformly from [low, high)."""

    def standard_normal(self, size: tuple[int, ...]) -> Array:
        """Draw from the standard normal distribution."""


class TorchDraws:
    """`Draws` from a torch generator, on its device."""

    def __init__(self, generator: torch.Generator) -> None:
        self._generator = generator

    def uniform(self, low: float, high: float, size: tuple[int, ...]) -> torch.Tensor:
        """Draw uniformly from [low, high), float32."""
        u = torch.rand(size, generator=self._generator, device=self._generator.device)
        return u.mul_(high - low).add_(low)

    def standard_normal(self, size: tuple[int, ...]) -> torch.Tensor:
        """Draw from the standard normal distribution, float32."""
        return torch.randn(size, generator=self._generator, device=self._generator.device)


@dataclass(kw_only=True)
class Task:
    """Base of every simulated task.

    Class variables describe the task and cost nothing to read; dataclass fields are what a user may set by keyword.
    `bind` is called once with the compiled model, before anything else. The methods below it are pure functions of
    `SimState` arrays and work on numpy and torch alike. Arrays a task keeps (named in `constants`) are numpy after
    `bind`; an engine on another device replaces them by its own.
    """

    xml: ClassVar[str]
    """File name of the model in the folder that `model_path` looks in."""
    frame_skip: ClassVar[int]
    """Physics steps per environment step."""
    episode_len: ClassVar[int] = 1000
    """Environment steps until an episode is truncated."""
    obs_dim: ClassVar[int]
    """Observation size with default settings; `observation_size` gives it for the settings in force."""
    act_dim: ClassVar[int]
    summary: ClassVar[str]
    """One line for listings."""
    derived: ClassVar[tuple[str, ...]] = ()
    """`SimState` fields read besides qpos, qvel and ctrl."""
    contact_forces: ClassVar[bool] = False
    """Whether `cfrc_ext` is read, which the simulator computes only on request."""
    islands: ClassVar[bool] = False
    """Keep the solver's constraint islands. Off is faster and bit-identical, but for Pusher and the finger."""
    constants: ClassVar[tuple[str, ...]] = ()
    fresh: ClassVar[bool] = False
    """Recompute what depends on positions and velocities after each step; forces stay those of the last substep."""
    settle_steps: ClassVar[int] = 0
    """Physics steps without control between the drawn state and the first observation."""
    clear_start: ClassVar[bool] = False
    """Draw starts again until nothing touches."""
    goal_dim: ClassVar[int] = 0
    """Length G of a row of `SimState.goal`."""

    dt: float = field(init=False, default=0.0)
    """Seconds of simulated time per environment step; set by `bind`."""

    @property
    def terminates(self) -> bool:
        """Whether an episode can end before the time limit."""
        return False

    @classmethod
    def model_path(cls) -> Path:
        """Where the model is: by default among Gymnasium's."""
        import gymnasium.envs.mujoco

        return Path(str(gymnasium.envs.mujoco.__file__)).parent / "assets" / cls.xml

    def compile_model(self) -> Any:
        """Make the `mujoco.MjModel` from its file; a task that is more than its file changes it here."""
        import mujoco

        return mujoco.MjModel.from_xml_path(str(self.model_path()))

    def bind(self, model: Any) -> None:
        """Read what the task needs from the compiled `mujoco.MjModel`."""
        self.dt = float(model.opt.timestep) * self.frame_skip

    def observation_size(self) -> int:
        """Length of one observation with the settings in force."""
        return self.obs_dim

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Draw n initial states [n, nq], [n, nv] around the model's own (qpos0 [nq], qvel0 [nv])."""
        raise NotImplementedError

    def sample_goal(self, xp: ArrayOps, draws: Draws, n: int) -> Array:
        """Draw what n episodes keep in `SimState.goal`, [n, goal_dim]; called if `goal_dim` is not 0."""
        raise NotImplementedError

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Write observations into `out` [N, O]; assignment casts to its dtype, once."""
        raise NotImplementedError

    def progress(self, xp: ArrayOps, s: SimState) -> Array:
        """Position [N] in metres whose change over a step is rewarded, in memory of its own; None if none is."""
        return None

    def healthy(self, xp: ArrayOps, s: SimState) -> Array:
        """Boolean [N], or None for a task that never terminates."""
        return None

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Reward [N] of one step.

        `action` [N, A] is in the simulator's units (clipped and rescaled) and keeps the caller's float type, in which
        Gymnasium computes its control cost; `before` and `after` are `progress` around the step. These and `healthy`
        are None where the task has none.
        """
        raise NotImplementedError


def build_task(cls: type[Task], kwargs: dict[str, Any], others: Sequence[str] = ()) -> Task:
    """Make a task from user keywords; an unknown one is an error that names the nearest, of `others` too.

    `others` are keywords that the caller has taken for itself.
    """
    known = [f.name for f in fields(cls) if f.init]
    allowed = [*known, *others]
    for key in kwargs:
        if key not in known:
            near = difflib.get_close_matches(key, allowed, n=1)
            hint = f": did you mean {near[0]!r}?" if near else "."
            raise ValueError(f"{cls.__name__} has no setting {key!r}{hint} It takes: {', '.join(allowed) or 'none'}.")
    return cls(**kwargs)


def open_box(size: int, **bounds: tuple[int, float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Lower and upper bounds [size], infinite except for the named (index, low, high)."""
    low, high = np.full(size, -np.inf), np.full(size, np.inf)
    for index, lo, hi in bounds.values():
        low[index], high[index] = lo, hi
    return low, high


def closed(low: float, high: float) -> tuple[float, float]:
    """Bounds for a strict comparison that accept exactly the closed interval [low, high] in float64."""
    return float(np.nextafter(low, -np.inf)), float(np.nextafter(high, np.inf))


def inside(xp: ArrayOps, x: Array, low: Array, high: Array) -> Array:
    """Whether low < x < high in every column: boolean [N]. NaN and, with infinite bounds, infinity are outside."""
    return xp.all((x > low) & (x < high))
