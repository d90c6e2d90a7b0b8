"""Gymnasium's eleven MuJoCo tasks, version 5.

Each class restates one environment of `gymnasium.envs.mujoco` (`<name>_v5.py`; documented at
https://gymnasium.farama.org/environments/mujoco/) as pure functions over N simulations. The settings are those of
Gymnasium's constructors and have the same names and defaults. Two properties of the originals are kept on purpose:
velocities measured from body positions use the positions left by the last physics substep, and the control cost is
computed in the float type of the action. `tests/envs/test_parity.py` holds every class to Gymnasium bit for bit.

Notation in the docstrings: q is qpos (generalised positions), v is qvel (velocities), dt the seconds per step.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy as np

from rlctl_envs.tasks.arrays import Array, ArrayOps, length
from rlctl_envs.tasks.base import Draws, SimState, Task, closed, inside, open_box


def _uniform_start(draws: Draws, n: int, qpos0: Array, qvel0: Array, scale: float) -> tuple[Array, Array]:
    """Both positions and velocities moved by uniform noise in [-scale, scale]."""
    nq = len(qpos0)
    noise = draws.uniform(-scale, scale, (n, nq + len(qvel0)))
    return qpos0 + noise[:, :nq], qvel0 + noise[:, nq:]


def _normal_start(draws: Draws, n: int, qpos0: Array, qvel0: Array, scale: float) -> tuple[Array, Array]:
    """Positions moved by uniform noise in [-scale, scale], velocities by normal noise of that deviation."""
    qpos = qpos0 + draws.uniform(-scale, scale, (n, len(qpos0)))
    qvel = qvel0 + scale * draws.standard_normal((n, len(qvel0)))
    return qpos, qvel


@dataclass(kw_only=True)
class _Runner(Task):
    """A planar body rewarded for moving along x: reward = w_forward * (change of x) / dt - w_ctrl * |action|^2."""

    skipped: ClassVar[int] = 1
    """How many leading positions the observation leaves out: those that say where the body is, not how."""

    forward_reward_weight: float = 1.0
    ctrl_cost_weight: float = 1e-3
    reset_noise_scale: float = 5e-3
    exclude_current_positions_from_observation: bool = True
    _first: int = field(init=False, default=0)
    _split: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Read the step length and lay the observation out."""
        super().bind(model)
        self._first = self.skipped if self.exclude_current_positions_from_observation else 0
        self._split = int(model.nq) - self._first

    def observation_size(self) -> int:
        """Length of one observation."""
        return self.obs_dim + (0 if self.exclude_current_positions_from_observation else self.skipped)

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise around the model's pose."""
        return _uniform_start(draws, n, qpos0, qvel0, self.reset_noise_scale)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Positions (without the leading ones), velocities."""
        out[:] = s.state[:, self._first :]

    def progress(self, xp: ArrayOps, s: SimState) -> Array:
        """Root x, metres."""
        return xp.copy(s.qpos[:, 0])

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Forward velocity less the control cost."""
        reward = (after - before) * (self.forward_reward_weight / self.dt)
        reward -= self.ctrl_cost_weight * xp.sum(action * action)
        return reward


@dataclass(kw_only=True)
class HalfCheetah(_Runner):
    """Run forward on two legs in a plane, without falling being an end.

    Observation [17]: q[1:] (z, pitch, six joints), v (9). Reward: velocity - 0.1 |a|^2. Never terminates.
    Source: gymnasium.envs.mujoco.half_cheetah_v5.
    """

    xml: ClassVar[str] = "half_cheetah.xml"
    frame_skip: ClassVar[int] = 5
    obs_dim: ClassVar[int] = 17
    act_dim: ClassVar[int] = 6
    summary: ClassVar[str] = "run forward with two legs in a plane; never ends early"

    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 0.1

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise on positions, normal noise on velocities."""
        return _normal_start(draws, n, qpos0, qvel0, self.reset_noise_scale)


@dataclass(kw_only=True)
class Swimmer(_Runner):
    """Swim along x with three links in a viscous plane.

    Observation [8]: q[2:] (heading, two joints), v (5). Reward: velocity - 1e-4 |a|^2. Never terminates.
    Source: gymnasium.envs.mujoco.swimmer_v5.
    """

    xml: ClassVar[str] = "swimmer.xml"
    frame_skip: ClassVar[int] = 4
    obs_dim: ClassVar[int] = 8
    act_dim: ClassVar[int] = 2
    skipped: ClassVar[int] = 2
    summary: ClassVar[str] = "swim forward with three links in a viscous plane; never ends early"

    ctrl_cost_weight: float = 1e-4
    reset_noise_scale: float = 0.1


@dataclass(kw_only=True)
class _Walker(_Runner):
    """A runner that must stay upright: healthy while the state lies strictly inside a box.

    Velocities are clipped to [-10, 10] in the observation, and `healthy_reward` is paid for every healthy step.
    """

    constants: ClassVar[tuple[str, ...]] = ("_low", "_high")

    healthy_reward: float = 1.0
    terminate_when_unhealthy: bool = True
    _low: Array = field(init=False, default=None)
    _high: Array = field(init=False, default=None)

    @property
    def terminates(self) -> bool:
        """Whether an unhealthy state ends the episode."""
        return self.terminate_when_unhealthy

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Positions (without x), velocities clipped to [-10, 10]."""
        out[:, : self._split] = s.qpos[:, self._first :]
        out[:, self._split :] = xp.clip(s.qvel, -10.0, 10.0)

    def healthy(self, xp: ArrayOps, s: SimState) -> Array:
        """Whether the state lies in the healthy box."""
        return inside(xp, s.state, self._low, self._high)

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Forward velocity, plus the healthy reward, less the control cost."""
        reward = (after - before) * (self.forward_reward_weight / self.dt)
        reward += healthy * self.healthy_reward
        reward -= self.ctrl_cost_weight * xp.sum(action * action)
        return reward


@dataclass(kw_only=True)
class Hopper(_Walker):
    """Hop forward on one leg.

    Observation [11]: q[1:] (z, pitch, three joints), v clipped to [-10, 10] (6).
    Reward: velocity + 1 while healthy - 1e-3 |a|^2.
    Terminates unless z > 0.7 and |pitch| < 0.2 and every one of q[2:], v lies in (-100, 100).
    Source: gymnasium.envs.mujoco.hopper_v5.
    """

    xml: ClassVar[str] = "hopper.xml"
    frame_skip: ClassVar[int] = 4
    obs_dim: ClassVar[int] = 11
    act_dim: ClassVar[int] = 3
    summary: ClassVar[str] = "hop forward on one leg"

    healthy_state_range: tuple[float, float] = (-100.0, 100.0)
    healthy_z_range: tuple[float, float] = (0.7, math.inf)
    healthy_angle_range: tuple[float, float] = (-0.2, 0.2)

    def bind(self, model: Any) -> None:
        """Lay the observation and the healthy box out."""
        super().bind(model)
        low, high = open_box(model.nq + model.nv, z=(1, *self.healthy_z_range))
        low[2:], high[2:] = self.healthy_state_range
        low[2] = max(low[2], self.healthy_angle_range[0])
        high[2] = min(high[2], self.healthy_angle_range[1])
        self._low, self._high = low, high


@dataclass(kw_only=True)
class Walker2d(_Walker):
    """Walk forward on two legs in a plane.

    Observation [17]: q[1:] (z, pitch, six joints), v clipped to [-10, 10] (9).
    Reward: velocity + 1 while healthy - 1e-3 |a|^2. Terminates unless 0.8 < z < 2 and |pitch| < 1.
    Source: gymnasium.envs.mujoco.walker2d_v5.
    """

    xml: ClassVar[str] = "walker2d_v5.xml"
    frame_skip: ClassVar[int] = 4
    obs_dim: ClassVar[int] = 17
    act_dim: ClassVar[int] = 6
    summary: ClassVar[str] = "walk forward on two legs in a plane"

    healthy_z_range: tuple[float, float] = (0.8, 2.0)
    healthy_angle_range: tuple[float, float] = (-1.0, 1.0)

    def bind(self, model: Any) -> None:
        """Lay the observation and the healthy box out."""
        super().bind(model)
        self._low, self._high = open_box(
            model.nq + model.nv, z=(1, *self.healthy_z_range), angle=(2, *self.healthy_angle_range)
        )


@dataclass(kw_only=True)
class Ant(_Walker):
    """Run forward on four legs in space.

    Observation [105]: q[2:] (13), v (14), contact forces on the 13 bodies clipped to [-1, 1] (78).
    Reward: torso velocity + 1 while healthy - 0.5 |a|^2 - 5e-4 |clipped contact forces|^2.
    Terminates unless 0.2 <= z <= 1 and the state is finite.
    Source: gymnasium.envs.mujoco.ant_v5. `main_body` is a body number here.
    """

    xml: ClassVar[str] = "ant.xml"
    frame_skip: ClassVar[int] = 5
    obs_dim: ClassVar[int] = 105
    act_dim: ClassVar[int] = 8
    skipped: ClassVar[int] = 2
    summary: ClassVar[str] = "run forward on four legs"
    derived: ClassVar[tuple[str, ...]] = ("xpos", "cfrc_ext")
    contact_forces: ClassVar[bool] = True
    contact_dim: ClassVar[int] = 78

    ctrl_cost_weight: float = 0.5
    contact_cost_weight: float = 5e-4
    main_body: int = 1
    healthy_z_range: tuple[float, float] = (0.2, 1.0)
    contact_force_range: tuple[float, float] = (-1.0, 1.0)
    reset_noise_scale: float = 0.1
    include_cfrc_ext_in_observation: bool = True

    def bind(self, model: Any) -> None:
        """Lay the observation and the healthy box out."""
        super().bind(model)
        if not 0 <= self.main_body < model.nbody:
            raise ValueError(f"main_body is {self.main_body}; the ant's bodies are 0 to {model.nbody - 1}.")
        self._low, self._high = open_box(model.nq + model.nv, z=(2, *closed(*self.healthy_z_range)))
        self._split = int(model.nq + model.nv) - self._first

    def observation_size(self) -> int:
        """Length of one observation."""
        return super().observation_size() - (0 if self.include_cfrc_ext_in_observation else self.contact_dim)

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise on positions, normal noise on velocities."""
        return _normal_start(draws, n, qpos0, qvel0, self.reset_noise_scale)

    def _clipped_forces(self, xp: ArrayOps, s: SimState) -> Array:
        """Contact forces of all bodies, clipped and flat: [N, 6 * nbody]; the first six are the world's."""
        return xp.clip(s.cfrc_ext, *self.contact_force_range).reshape(len(s.cfrc_ext), -1)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Positions (without x, y), velocities, clipped contact forces."""
        out[:, : self._split] = s.state[:, self._first :]
        if self.include_cfrc_ext_in_observation:
            out[:, self._split :] = self._clipped_forces(xp, s)[:, 6:]

    def progress(self, xp: ArrayOps, s: SimState) -> Array:
        """Torso x as left by the last substep, metres."""
        return xp.copy(s.xpos[:, self.main_body, 0])

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Forward velocity, plus the healthy reward, less control and contact costs."""
        reward = super().reward(xp, s, action, before, after, healthy)
        forces = self._clipped_forces(xp, s)
        reward -= self.contact_cost_weight * xp.sum(forces * forces)
        return reward


@dataclass(kw_only=True)
class _HumanoidBody(Task):
    """What Humanoid and HumanoidStandup share: the body, its observation and its start.

    Observation [348]: q[2:] (22), v (23), and of the 13 bodies cinert (130), cvel (78); joint actuator forces (17);
    cfrc_ext of the bodies (78).
    """

    frame_skip: ClassVar[int] = 5
    obs_dim: ClassVar[int] = 348
    act_dim: ClassVar[int] = 17
    derived: ClassVar[tuple[str, ...]] = ("cinert", "cvel", "qfrc_actuator", "cfrc_ext")
    contact_forces: ClassVar[bool] = True
    block_dims: ClassVar[dict[str, int]] = {"cinert": 130, "cvel": 78, "qfrc_actuator": 17, "cfrc_ext": 78}

    ctrl_cost_weight: float = 0.1
    reset_noise_scale: float = 1e-2
    exclude_current_positions_from_observation: bool = True
    include_cinert_in_observation: bool = True
    include_cvel_in_observation: bool = True
    include_qfrc_actuator_in_observation: bool = True
    include_cfrc_ext_in_observation: bool = True
    _first: int = field(init=False, default=2)

    def bind(self, model: Any) -> None:
        """Read the step length and lay the observation out."""
        super().bind(model)
        self._first = 2 if self.exclude_current_positions_from_observation else 0

    def _blocks(self) -> list[str]:
        """Names of the derived fields in the observation, in order."""
        return [name for name in self.block_dims if getattr(self, f"include_{name}_in_observation")]

    def observation_size(self) -> int:
        """Length of one observation."""
        joints = self.obs_dim - sum(self.block_dims.values())
        extra = 0 if self.exclude_current_positions_from_observation else 2
        return joints + extra + sum(self.block_dims[name] for name in self._blocks())

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise around the model's pose."""
        return _uniform_start(draws, n, qpos0, qvel0, self.reset_noise_scale)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Positions (without x, y), velocities, then the blocks that are switched on."""
        n, at = len(s.qpos), s.state.shape[1] - self._first
        out[:, :at] = s.state[:, self._first :]
        for name in self._blocks():
            # The world body (row 0) and the free root joint (six forces) carry nothing.
            block = getattr(s, name)
            block = block[:, 6:] if name == "qfrc_actuator" else block[:, 1:].reshape(n, -1)
            out[:, at : at + block.shape[1]] = block
            at += block.shape[1]

    def _squared_contact_forces(self, xp: ArrayOps, s: SimState) -> Array:
        """Sum of squares of cfrc_ext over all bodies, [N]."""
        forces = s.cfrc_ext.reshape(len(s.cfrc_ext), -1)
        return xp.sum(forces * forces)


@dataclass(kw_only=True)
class Humanoid(_HumanoidBody):
    """Walk forward on two legs in space.

    Observation: see `_HumanoidBody`. Reward: 1.25 * centre-of-mass velocity + 5 while healthy - 0.1 |ctrl|^2
    - min(10, 5e-7 |contact forces|^2). Terminates unless 1 < z < 2.
    Source: gymnasium.envs.mujoco.humanoid_v5.
    """

    xml: ClassVar[str] = "humanoid.xml"
    summary: ClassVar[str] = "walk forward on two legs"
    derived: ClassVar[tuple[str, ...]] = ("xipos", *_HumanoidBody.derived)
    constants: ClassVar[tuple[str, ...]] = ("_mass_share",)

    forward_reward_weight: float = 1.25
    contact_cost_weight: float = 5e-7
    contact_cost_range: tuple[float, float] = (-math.inf, 10.0)
    healthy_reward: float = 5.0
    terminate_when_unhealthy: bool = True
    healthy_z_range: tuple[float, float] = (1.0, 2.0)
    _mass_share: Array = field(init=False, default=None)

    @property
    def terminates(self) -> bool:
        """Whether an unhealthy state ends the episode."""
        return self.terminate_when_unhealthy

    def bind(self, model: Any) -> None:
        """Read each body's share of the total mass."""
        super().bind(model)
        self._mass_share = np.asarray(model.body_mass / model.body_mass.sum())

    def progress(self, xp: ArrayOps, s: SimState) -> Array:
        """Centre of mass x as left by the last substep, metres."""
        return s.xipos[:, :, 0] @ self._mass_share

    def healthy(self, xp: ArrayOps, s: SimState) -> Array:
        """Whether the torso height is in range."""
        z = s.qpos[:, 2]
        return (z > self.healthy_z_range[0]) & (z < self.healthy_z_range[1])

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Forward velocity, plus the healthy reward, less control and contact costs."""
        reward = (after - before) * (self.forward_reward_weight / self.dt)
        reward += healthy * self.healthy_reward
        reward -= self.ctrl_cost_weight * xp.sum(s.ctrl * s.ctrl)
        reward -= xp.clip(self.contact_cost_weight * self._squared_contact_forces(xp, s), *self.contact_cost_range)
        return reward


@dataclass(kw_only=True)
class HumanoidStandup(_HumanoidBody):
    """Stand up from lying on the ground.

    Observation: see `_HumanoidBody`. Reward: z / timestep - 0.1 |ctrl|^2 - min(10, 5e-7 |contact forces|^2) + 1
    (Gymnasium divides by the physics time step, not by dt). Never terminates.
    Gymnasium's `uph_cost_weight` is not offered: its own reward never reads it.
    Source: gymnasium.envs.mujoco.humanoidstandup_v5.
    """

    xml: ClassVar[str] = "humanoidstandup.xml"
    summary: ClassVar[str] = "stand up from lying down; never ends early"

    impact_cost_weight: float = 0.5e-6
    impact_cost_range: tuple[float, float] = (-math.inf, 10.0)
    _timestep: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Read the physics time step, seconds."""
        super().bind(model)
        self._timestep = float(model.opt.timestep)

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Torso height over the time step, less control and impact costs, plus one."""
        reward = s.qpos[:, 2] / self._timestep
        reward -= self.ctrl_cost_weight * xp.sum(s.ctrl * s.ctrl)
        reward -= xp.clip(self.impact_cost_weight * self._squared_contact_forces(xp, s), *self.impact_cost_range)
        reward += 1.0
        return reward


@dataclass(kw_only=True)
class Reacher(Task):
    """Bring the fingertip of a two-joint arm to a target.

    Observation [10]: cos and sin of the two joints (4), target x, y (2), joint velocities (2), fingertip - target (2).
    Reward: -distance - |a|^2. Never terminates; 50 steps.
    Source: gymnasium.envs.mujoco.reacher_v5.
    """

    xml: ClassVar[str] = "reacher.xml"
    frame_skip: ClassVar[int] = 2
    episode_len: ClassVar[int] = 50
    obs_dim: ClassVar[int] = 10
    act_dim: ClassVar[int] = 2
    summary: ClassVar[str] = "bring a two-joint arm's fingertip to a target; 50 steps"
    derived: ClassVar[tuple[str, ...]] = ("xpos",)
    target_radius: ClassVar[float] = 0.2

    reward_dist_weight: float = 1.0
    reward_control_weight: float = 1.0
    _tip: int = field(init=False, default=0)
    _target: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the two bodies up."""
        super().bind(model)
        self._tip, self._target = model.body("fingertip").id, model.body("target").id

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Joints near zero, the target uniform on a disc and at rest.

        Gymnasium rejects points of a square until one lies on the disc; a radius of r * sqrt(u) has the same
        distribution and takes a fixed number of draws.
        """
        qpos = qpos0 + draws.uniform(-0.1, 0.1, (n, len(qpos0)))
        qvel = qvel0 + draws.uniform(-0.005, 0.005, (n, len(qvel0)))
        radius = self.target_radius * draws.uniform(0.0, 1.0, (n,)) ** 0.5
        angle = draws.uniform(0.0, 2 * math.pi, (n,))
        qpos[:, -2] = radius * xp.cos(angle)
        qpos[:, -1] = radius * xp.sin(angle)
        qvel[:, -2:] = 0.0
        return qpos, qvel

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        joints = s.qpos[:, :2]
        out[:, 0:2] = xp.cos(joints)
        out[:, 2:4] = xp.sin(joints)
        out[:, 4:6] = s.qpos[:, 2:]
        out[:, 6:8] = s.qvel[:, :2]
        out[:, 8:10] = s.xpos[:, self._tip, :2] - s.xpos[:, self._target, :2]

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Minus the distance, less the control cost."""
        reward = length(xp, s.xpos[:, self._tip] - s.xpos[:, self._target])
        reward *= -self.reward_dist_weight
        reward -= self.reward_control_weight * xp.sum(action * action)
        return reward


@dataclass(kw_only=True)
class Pusher(Task):
    """Push a cylinder to a goal with a seven-joint arm.

    Observation [23]: seven joint angles, seven joint velocities, positions of fingertip, object, goal (9).
    Reward: -|object - goal| - 0.5 |object - fingertip| - 0.1 |a|^2. Never terminates; 100 steps.
    Source: gymnasium.envs.mujoco.pusher_v5.
    """

    xml: ClassVar[str] = "pusher_v5.xml"
    frame_skip: ClassVar[int] = 5
    episode_len: ClassVar[int] = 100
    obs_dim: ClassVar[int] = 23
    act_dim: ClassVar[int] = 7
    summary: ClassVar[str] = "push a cylinder to a goal with a seven-joint arm; 100 steps"
    derived: ClassVar[tuple[str, ...]] = ("xpos",)
    islands: ClassVar[bool] = True
    candidates: ClassVar[int] = 64

    reward_near_weight: float = 0.5
    reward_dist_weight: float = 1.0
    reward_control_weight: float = 0.1
    _object: int = field(init=False, default=0)
    _tip: int = field(init=False, default=0)
    _goal: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the three bodies up."""
        super().bind(model)
        self._object, self._tip, self._goal = (model.body(name).id for name in ("object", "tips_arm", "goal"))

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Arm at rest up to small velocities; the cylinder uniform on [-0.3, 0] x [-0.2, 0.2], over 0.17 from the goal.

        Gymnasium redraws until the distance is large enough. Here the first acceptable of 64 candidates is taken, a
        fixed number of draws; none is acceptable with probability 0.38^64, about 1e-27.
        """
        qpos = qpos0 + draws.uniform(0.0, 0.0, (n, len(qpos0)))
        qvel = qvel0 + draws.uniform(-0.005, 0.005, (n, len(qvel0)))
        x = draws.uniform(-0.3, 0.0, (n, self.candidates))
        y = draws.uniform(-0.2, 0.2, (n, self.candidates))
        first = ((x * x + y * y) > 0.17**2).argmax(-1)[:, None] == xp.arange(self.candidates)
        qpos[:, -4] = (x * first).sum(-1)
        qpos[:, -3] = (y * first).sum(-1)
        qpos[:, -2:] = 0.0
        qvel[:, -4:] = 0.0
        return qpos, qvel

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0:7] = s.qpos[:, :7]
        out[:, 7:14] = s.qvel[:, :7]
        out[:, 14:17] = s.xpos[:, self._tip]
        out[:, 17:20] = s.xpos[:, self._object]
        out[:, 20:23] = s.xpos[:, self._goal]

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Minus the two distances, less the control cost."""
        thing = s.xpos[:, self._object]
        reward = length(xp, thing - s.xpos[:, self._goal])
        reward *= -self.reward_dist_weight
        reward -= self.reward_control_weight * xp.sum(action * action)
        reward -= self.reward_near_weight * length(xp, thing - s.xpos[:, self._tip])
        return reward


@dataclass(kw_only=True)
class InvertedPendulum(Task):
    """Balance a pole on a cart.

    Observation [4]: cart x, pole angle, their velocities. Reward: 1 while |angle| <= 0.2 and the state is finite,
    0 on the step that fails, which terminates.
    Source: gymnasium.envs.mujoco.inverted_pendulum_v5.
    """

    xml: ClassVar[str] = "inverted_pendulum.xml"
    frame_skip: ClassVar[int] = 2
    obs_dim: ClassVar[int] = 4
    act_dim: ClassVar[int] = 1
    summary: ClassVar[str] = "balance a pole on a cart"
    constants: ClassVar[tuple[str, ...]] = ("_low", "_high")

    reset_noise_scale: float = 0.01
    _low: Array = field(init=False, default=None)
    _high: Array = field(init=False, default=None)

    @property
    def terminates(self) -> bool:
        """A fallen pole ends the episode."""
        return True

    def bind(self, model: Any) -> None:
        """Lay the healthy box out."""
        super().bind(model)
        self._low, self._high = open_box(model.nq + model.nv, angle=(1, *closed(-0.2, 0.2)))

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise around the upright pose."""
        return _uniform_start(draws, n, qpos0, qvel0, self.reset_noise_scale)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """Positions, velocities."""
        out[:] = s.state

    def healthy(self, xp: ArrayOps, s: SimState) -> Array:
        """Whether the pole stands."""
        return inside(xp, s.state, self._low, self._high)

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """One while healthy."""
        return healthy * 1.0


@dataclass(kw_only=True)
class InvertedDoublePendulum(Task):
    """Balance two linked poles on a cart.

    Observation [9]: cart x, sin of the two angles, cos of the two angles, v clipped to [-10, 10] (3), the constraint
    force on the cart clipped to [-10, 10]. Reward: 10 while healthy - 0.01 x^2 - (y - 2)^2 - 1e-3 v1^2 - 5e-3 v2^2 for
    the tip at (x, y). Terminates when y <= 1.
    Source: gymnasium.envs.mujoco.inverted_double_pendulum_v5.
    """

    xml: ClassVar[str] = "inverted_double_pendulum.xml"
    frame_skip: ClassVar[int] = 5
    obs_dim: ClassVar[int] = 9
    act_dim: ClassVar[int] = 1
    summary: ClassVar[str] = "balance two linked poles on a cart"
    derived: ClassVar[tuple[str, ...]] = ("site_xpos", "qfrc_constraint")

    healthy_reward: float = 10.0
    reset_noise_scale: float = 0.1

    @property
    def terminates(self) -> bool:
        """A fallen pole ends the episode."""
        return True

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """Uniform noise on positions, normal noise on velocities."""
        return _normal_start(draws, n, qpos0, qvel0, self.reset_noise_scale)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        angles = s.qpos[:, 1:]
        out[:, 0] = s.qpos[:, 0]
        out[:, 1:3] = xp.sin(angles)
        out[:, 3:5] = xp.cos(angles)
        out[:, 5:8] = xp.clip(s.qvel, -10.0, 10.0)
        out[:, 8] = xp.clip(s.qfrc_constraint[:, 0], -10.0, 10.0)

    def healthy(self, xp: ArrayOps, s: SimState) -> Array:
        """Whether the tip is higher than one metre."""
        return s.site_xpos[:, 0, 2] > 1.0

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """Healthy reward less the penalties on position and velocity of the tip."""
        x, y = s.site_xpos[:, 0, 0], s.site_xpos[:, 0, 2] - 2.0
        v1, v2 = s.qvel[:, 1], s.qvel[:, 2]
        reward = healthy * self.healthy_reward
        reward -= 0.01 * (x * x) + y * y
        reward -= 1e-3 * (v1 * v1) + 5e-3 * (v2 * v2)
        return reward


TASKS: dict[str, type[Task]] = {
    cls.__name__: cls
    for cls in (
        Hopper,
        Walker2d,
        HalfCheetah,
        Swimmer,
        Ant,
        Humanoid,
        HumanoidStandup,
        Reacher,
        Pusher,
        InvertedPendulum,
        InvertedDoublePendulum,
    )
}
"""The eleven tasks by name."""
