"""Twenty tasks of the DeepMind Control Suite ("dmc:hopper-stand").

Each class restates one task of `dm_control.suite` (Tassa et al. 2018, arXiv:1801.00690; Tunyasuvunakool et al. 2020,
arXiv:2006.12983; the code of dm_control 1.0.50) as pure functions over N simulations. The models are dm_control's own
XML files, read as data from the installed package (extra `dmc`), which is never imported: dm_control 1.0.50 does not
load under MuJoCo 4. `tests/envs/test_envs_dm_control.py` holds every class to transitions and start distributions
frozen from it.

What all of them share:
- 1000 control steps, then truncation; none ends early. Rewards lie in [0, 1], returns in [0, 1000].
- An observation is dm_control's dictionary laid flat, in the order of its keys; each docstring names them.
- Observations and rewards follow the state: positions, velocities and what derives from them belong to the end of the
  step, touch sensors to its last physics substep (dm_control's "legacy step", `Task.fresh` here).

Differs: where dm_control writes a target into the model for one episode (finger turn, fish, reacher), the model here
stays as it is, since all simulations share it, and the target is kept in `SimState.goal`; no target has any effect on
the physics. A simulation that diverges ends its episode; dm_control raises an exception.

Notation in the docstrings: q is qpos, v is qvel, T(x; a..b, m) the `tolerance` of x for the interval [a, b] and the
margin m.
"""

from __future__ import annotations

import importlib.util
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import numpy as np

from rlctl_envs.tasks.arrays import Array, ArrayOps, length
from rlctl_envs.tasks.base import Draws, SimState, Task

_INF = math.inf
_XX, _XZ, _ZX, _ZZ = 0, 2, 6, 8
"""Places in a flattened rotation matrix: the component along the world's first axis of the body's second axis."""


def suite_folder() -> Path:
    """Folder of dm_control's models. Raises ValueError if the package is not installed."""
    # Finding a package does not import it.
    spec = importlib.util.find_spec("dm_control")
    if spec is None or not spec.submodule_search_locations:
        raise ValueError(
            "the dmc: tasks simulate the models of the package dm_control, which is not installed: "
            "pip install 'rlctl[dmc]'"
        )
    return Path(spec.submodule_search_locations[0]) / "suite"


def tolerance(
    xp: ArrayOps,
    x: Array,
    low: float,
    high: float,
    margin: float = 0.0,
    at_margin: float = 0.1,
    shape: Literal["gaussian", "linear", "quadratic"] = "gaussian",
) -> Array:
    """1 where low <= x <= high, falling to `at_margin` where x is `margin` outside; elementwise.

    Without a margin it is 0 outside. Source: dm_control.utils.rewards.tolerance.
    """
    outside = xp.clip(low - x, 0.0, _INF) + xp.clip(x - high, 0.0, _INF)
    if margin == 0.0:
        return (outside <= 0.0) * 1.0
    if shape == "gaussian":
        z = outside * (math.sqrt(-2.0 * math.log(at_margin)) / margin)
        return xp.exp(-0.5 * (z * z))
    if shape == "linear":
        return xp.clip(1.0 - outside * ((1.0 - at_margin) / margin), 0.0, 1.0)
    return xp.clip(1.0 - outside * outside * ((1.0 - at_margin) / margin**2), 0.0, 1.0)


def _mean(xp: ArrayOps, x: Array) -> Array:
    """Mean over the last axis."""
    return xp.sum(x) / x.shape[-1]


def _small_control(xp: ArrayOps, s: SimState) -> Array:
    """From 0.8 at full control to 1 at none, [N]: 4/5 + mean(1 - ctrl^2) / 5."""
    return (4.0 + _mean(xp, tolerance(xp, s.ctrl, 0.0, 0.0, 1.0, 0.0, "quadratic"))) / 5.0


def _sensor(model: Any, first: str, last: str | None = None) -> slice:
    """Columns of `sensordata` from one sensor to another, both included."""
    start, end = model.sensor(first), model.sensor(last or first)
    return slice(int(start.adr[0]), int(end.adr[0] + end.dim[0]))


def _no_columns() -> slice:
    """What a task has before `bind`."""
    return slice(0)


def _repeat(xp: ArrayOps, x: Array, n: int) -> Array:
    """n copies of a row, in memory of their own."""
    return xp.arange(n)[:, None] * 0.0 + x


def _in_frame(x: Array, frame: Array) -> Array:
    """Vectors x [N, K, 3] along the axes of a frame, a flattened rotation matrix [N, 9].

    Not by a matrix product, which a GPU may have been told to compute in reduced precision.
    """
    first, second, third = (frame[:, None, row : row + 3] for row in (0, 3, 6))
    return x[:, :, 0:1] * first + x[:, :, 1:2] * second + x[:, :, 2:3] * third


@dataclass(kw_only=True)
class _SuiteTask(Task):
    """What the suite's tasks share. Subclasses say how to read the model in `bind`."""

    fresh: ClassVar[bool] = True
    episode_len: ClassVar[int] = 1000

    @classmethod
    def model_path(cls) -> Path:
        """Where the model is: in the installed dm_control."""
        return suite_folder() / cls.xml

    def compile_model(self) -> Any:
        """Make the model from its file, with a small picture of the sky."""
        import mujoco

        spec = mujoco.MjSpec.from_file(str(self.model_path()))
        for texture in spec.textures:
            # Eleven megabytes and most of the time that loading takes, for something no simulation looks at.
            if texture.type == mujoco.mjtTexture.mjTEXTURE_SKYBOX:
                texture.width = texture.height = 8
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "compiler attribute 'settotalmass' is deprecated")  # the cheetah's
            return spec.compile()


@dataclass(kw_only=True)
class _RandomJoints(_SuiteTask):
    """Starts at rest with random joints, each uniform: within its limits, or on [-pi, pi] for a hinge without any.

    Sliders without limits keep the model's own position, and so does the place of a free joint. The orientation of a
    free joint is u / |u| with u uniform on [0, 1]^4: the suite meant normal numbers and kept its slip, so as not to
    change published results.
    Source: dm_control.suite.utils.randomizers.randomize_limited_and_rotational_joints.
    """

    constants: ClassVar[tuple[str, ...]] = ("_low", "_high")
    _low: Array = field(init=False, default=None)
    _high: Array = field(init=False, default=None)
    _orientation: slice | None = field(init=False, default=None)

    def bind(self, model: Any) -> None:
        """Read the range [nq] of every coordinate."""
        import mujoco

        super().bind(model)
        kinds = mujoco.mjtJoint
        low, high = np.array(model.qpos0), np.array(model.qpos0)
        for kind, at, limited, bounds in zip(
            model.jnt_type, model.jnt_qposadr, model.jnt_limited, model.jnt_range, strict=True
        ):
            if kind == kinds.mjJNT_FREE:
                self._orientation = slice(int(at) + 3, int(at) + 7)
                low[self._orientation], high[self._orientation] = 0.0, 1.0
            elif limited:
                low[at], high[at] = bounds
            elif kind == kinds.mjJNT_HINGE:
                low[at], high[at] = -math.pi, math.pi
        self._low, self._high = low, high

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        qpos = self._low + (self._high - self._low) * draws.uniform(0.0, 1.0, (n, len(qpos0)))
        if self._orientation is not None:
            quaternion = qpos[:, self._orientation]
            qpos[:, self._orientation] = quaternion / length(xp, quaternion)[:, None]
        return qpos, _repeat(xp, qvel0, n)


@dataclass(kw_only=True)
class HopperStand(_RandomJoints):
    """Stand on one leg.

    Observation [15]: position q[1:] (6), velocity v (7), touch log(1 + force) of toe and heel (2).
    Reward: [height >= 0.6] * (4/5 + mean(1 - ctrl^2) / 5), the height being that of the torso above the foot.
    Source: dm_control.suite.hopper, task stand.
    """

    xml: ClassVar[str] = "hopper.xml"
    frame_skip: ClassVar[int] = 4
    obs_dim: ClassVar[int] = 15
    act_dim: ClassVar[int] = 4
    summary: ClassVar[str] = "stand on one leg"
    derived: ClassVar[tuple[str, ...]] = ("xipos", "sensordata")

    _torso: int = field(init=False, default=0)
    _foot: int = field(init=False, default=0)
    _speed: int = field(init=False, default=0)
    _touch: slice = field(init=False, default_factory=_no_columns)

    def bind(self, model: Any) -> None:
        """Look bodies and sensors up."""
        super().bind(model)
        self._torso, self._foot = model.body("torso").id, model.body("foot").id
        self._speed = _sensor(model, "torso_subtreelinvel").start
        self._touch = _sensor(model, "touch_toe", "touch_heel")

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, :13] = s.state[:, 1:]
        out[:, 13:] = xp.log1p(s.sensordata[:, self._touch])

    def _standing(self, xp: ArrayOps, s: SimState) -> Array:
        """1 where the torso is 0.6 m or more above the foot (and no more than the suite's 2 m)."""
        return tolerance(xp, s.xipos[:, self._torso, 2] - s.xipos[:, self._foot, 2], 0.6, 2.0)

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return self._standing(xp, s) * _small_control(xp, s)


@dataclass(kw_only=True)
class HopperHop(HopperStand):
    """Hop forward on one leg.

    Observation: as HopperStand. Reward: [height >= 0.6] * T(speed; 2.., 1), linear, 0.5 at the margin.
    Source: dm_control.suite.hopper, task hop.
    """

    summary: ClassVar[str] = "hop forward on one leg at 2 m/s"

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        speed = s.sensordata[:, self._speed]
        return self._standing(xp, s) * tolerance(xp, speed, 2.0, _INF, 1.0, 0.5, "linear")


@dataclass(kw_only=True)
class CheetahRun(_SuiteTask):
    """Run forward with two legs in a plane.

    Observation [17]: position q[1:] (8), velocity v (9). Reward: T(speed; 10.., 10), linear: speed / 10 up to 1.
    Starts with its limited joints drawn uniformly, then falls for 200 physics steps. In the first of these the suite
    applies the forces of the model's own pose (it moves the joints after computing them and steps at once), which moves
    every start by one and the same amount: that is done here before the remaining 199.
    Source: dm_control.suite.cheetah, task run.
    """

    xml: ClassVar[str] = "cheetah.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 17
    act_dim: ClassVar[int] = 6
    summary: ClassVar[str] = "run forward with two legs in a plane at 10 m/s"
    derived: ClassVar[tuple[str, ...]] = ("sensordata",)
    settle_steps: ClassVar[int] = 199
    constants: ClassVar[tuple[str, ...]] = ("_low", "_high", "_first_move", "_first_velocity")

    _speed: int = field(init=False, default=0)
    _low: Array = field(init=False, default=None)
    _high: Array = field(init=False, default=None)
    _first_move: Array = field(init=False, default=None)
    _first_velocity: Array = field(init=False, default=None)

    def bind(self, model: Any) -> None:
        """Read joint ranges, and make the first step of the fall."""
        import mujoco

        super().bind(model)
        self._speed = _sensor(model, "torso_subtreelinvel").start
        limited = model.jnt_limited.astype(bool)[:, None]
        bounds = np.where(limited, model.jnt_range, model.qpos0[:, None])
        self._low, self._high = bounds.T
        data = mujoco.MjData(model)
        mujoco.mj_step(model, data)
        self._first_move, self._first_velocity = data.qpos - model.qpos0, data.qvel.copy()

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        qpos = self._low + (self._high - self._low) * draws.uniform(0.0, 1.0, (n, len(qpos0)))
        return qpos + self._first_move, _repeat(xp, self._first_velocity, n)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:] = s.state[:, 1:]

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return tolerance(xp, s.sensordata[:, self._speed], 10.0, _INF, 10.0, 0.0, "linear")


@dataclass(kw_only=True)
class WalkerStand(_RandomJoints):
    """Stand up on two legs in a plane.

    Observation [24]: orientations, the xx and xz entries of each body's rotation matrix (14), height of the torso (1),
    velocity v (9). Reward: stand = (3 T(height; 1.2.., 0.6) + (1 + uprightness) / 2) / 4.
    Source: dm_control.suite.walker, task stand.
    """

    xml: ClassVar[str] = "walker.xml"
    frame_skip: ClassVar[int] = 10
    obs_dim: ClassVar[int] = 24
    act_dim: ClassVar[int] = 6
    summary: ClassVar[str] = "stand up on two legs in a plane"
    derived: ClassVar[tuple[str, ...]] = ("xpos", "xmat", "sensordata")

    _torso: int = field(init=False, default=0)
    _speed: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the torso and its velocity sensor up."""
        super().bind(model)
        self._torso = model.body("torso").id
        self._speed = _sensor(model, "torso_subtreelinvel").start

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0:14:2] = s.xmat[:, 1:, _XX]
        out[:, 1:14:2] = s.xmat[:, 1:, _XZ]
        out[:, 14] = s.xpos[:, self._torso, 2]
        out[:, 15:] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        standing = tolerance(xp, s.xpos[:, self._torso, 2], 1.2, _INF, 0.6)
        upright = (1.0 + s.xmat[:, self._torso, _ZZ]) / 2.0
        return (3.0 * standing + upright) / 4.0


@dataclass(kw_only=True)
class WalkerWalk(WalkerStand):
    """Walk forward on two legs in a plane.

    Observation: as WalkerStand. Reward: stand * (5 T(speed; 1.., 0.5) + 1) / 6, linear, 0.5 at the margin.
    Source: dm_control.suite.walker, task walk.
    """

    summary: ClassVar[str] = "walk forward on two legs in a plane at 1 m/s"
    target_speed: ClassVar[float] = 1.0

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        stand = super().reward(xp, s, action, before, after, healthy)
        speed, wanted = s.sensordata[:, self._speed], self.target_speed
        return stand * (5.0 * tolerance(xp, speed, wanted, _INF, wanted / 2, 0.5, "linear") + 1.0) / 6.0


@dataclass(kw_only=True)
class WalkerRun(WalkerWalk):
    """Run forward on two legs in a plane: WalkerWalk at 8 m/s. Source: dm_control.suite.walker, task run."""

    summary: ClassVar[str] = "run forward on two legs in a plane at 8 m/s"
    target_speed: ClassVar[float] = 8.0


@dataclass(kw_only=True)
class _Finger(_RandomJoints):
    """A two-joint finger beside a body that spins on an unactuated hinge; starts without any contact.

    Observation [9]: position, the finger's two angles and the x, z of the spinner's tip from its hinge (4), velocity of
    finger and hinge (3), touch log(1 + force) of the fingertip's two sides (2).
    """

    xml: ClassVar[str] = "finger.xml"
    frame_skip: ClassVar[int] = 2
    obs_dim: ClassVar[int] = 9
    act_dim: ClassVar[int] = 2
    derived: ClassVar[tuple[str, ...]] = ("sensordata",)
    clear_start: ClassVar[bool] = True
    islands: ClassVar[bool] = True

    _angles: slice = field(init=False, default_factory=_no_columns)
    _velocities: slice = field(init=False, default_factory=_no_columns)
    _touch: slice = field(init=False, default_factory=_no_columns)
    _tip: int = field(init=False, default=0)
    _spinner: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the sensors up."""
        super().bind(model)
        self._angles = _sensor(model, "proximal", "distal")
        self._velocities = _sensor(model, "proximal_velocity", "hinge_velocity")
        self._touch = _sensor(model, "touchtop", "touchbottom")
        self._tip, self._spinner = _sensor(model, "tip").start, _sensor(model, "spinner").start

    def _tip_position(self, s: SimState) -> Array:
        """x and z of the tip from the hinge, [N, 2]."""
        return self._x_and_z(s, self._tip) - self._x_and_z(s, self._spinner)

    @staticmethod
    def _x_and_z(s: SimState, sensor: int) -> Array:
        """First and third number of a position sensor, [N, 2]."""
        return s.sensordata[:, sensor : sensor + 3 : 2]

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0:2] = s.sensordata[:, self._angles]
        out[:, 2:4] = self._tip_position(s)
        out[:, 4:7] = s.sensordata[:, self._velocities]
        out[:, 7:9] = xp.log1p(s.sensordata[:, self._touch])


@dataclass(kw_only=True)
class FingerSpin(_Finger):
    """Keep a body spinning.

    Observation: see `_Finger`. Reward: 1 while the hinge turns at -15 rad/s or faster, else 0. The hinge is damped less
    than in the model's file (0.03).
    Source: dm_control.suite.finger, task spin.
    """

    summary: ClassVar[str] = "keep a body spinning with a finger"

    def compile_model(self) -> Any:
        """Let the body spin more freely."""
        model = super().compile_model()
        model.dof_damping[model.joint("hinge").dofadr[0]] = 0.03
        return model

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        hinge = s.sensordata[:, self._velocities.stop - 1]
        return (hinge <= -15.0) * 1.0


@dataclass(kw_only=True)
class FingerTurnEasy(_Finger):
    """Turn a body so that its tip is in a target.

    Observation [12]: see `_Finger`, then target_position, x and z from the hinge (2), dist_to_target, from the tip to
    the target's surface (1). Reward: 1 while that distance is 0 or less, else 0. The target lies where the tip would be
    at an angle uniform on [-pi, pi].
    Source: dm_control.suite.finger, task turn_easy.
    """

    obs_dim: ClassVar[int] = 12
    goal_dim: ClassVar[int] = 2
    summary: ClassVar[str] = "turn a body to an angle with a finger; wide target"
    target_radius: ClassVar[float] = 0.07
    constants: ClassVar[tuple[str, ...]] = (*_Finger.constants, "_hinge")

    _hinge: Array = field(init=False, default=None)
    _reach: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Read where the hinge is and how far the tip reaches."""
        super().bind(model)
        self._hinge = model.body("spinner").pos[[0, 2]]
        self._reach = float(model.geom("cap1").size.sum())

    def sample_goal(self, xp: ArrayOps, draws: Draws, n: int) -> Array:
        """x and z of the target in the world."""
        angle = draws.uniform(-math.pi, math.pi, (n,))
        goal = _repeat(xp, self._hinge, n)
        goal[:, 0] += self._reach * xp.sin(angle)
        goal[:, 1] += self._reach * xp.cos(angle)
        return goal

    def _distance(self, xp: ArrayOps, s: SimState) -> Array:
        """From the tip to the target's surface, negative inside, [N]."""
        return length(xp, s.goal - self._x_and_z(s, self._tip)) - self.target_radius

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        super().write_obs(xp, s, out)
        out[:, 9:11] = s.goal - self._x_and_z(s, self._spinner)
        out[:, 11] = self._distance(xp, s)

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return (self._distance(xp, s) <= 0.0) * 1.0


@dataclass(kw_only=True)
class FingerTurnHard(FingerTurnEasy):
    """FingerTurnEasy with a target of radius 0.03. Source: dm_control.suite.finger, task turn_hard."""

    summary: ClassVar[str] = "turn a body to an angle with a finger; narrow target"
    target_radius: ClassVar[float] = 0.03


@dataclass(kw_only=True)
class FishSwim(_SuiteTask):
    """Swim to a target in space.

    Observation [24]: joint_angles (7), upright, the z of the torso's own z axis (1), target, from the mouth in the
    mouth's frame (3), velocity v (13). Reward: (7 T(distance; 0..r, 2r) + (1 + upright) / 2) / 8 with r the sum of the
    radii of mouth and target.
    Starts in any orientation, joints uniform on [-0.2, 0.2], the target uniform on [-0.4, 0.4]^2 x [0.1, 0.3].
    Source: dm_control.suite.fish, task swim.
    """

    xml: ClassVar[str] = "fish.xml"
    frame_skip: ClassVar[int] = 10
    obs_dim: ClassVar[int] = 24
    act_dim: ClassVar[int] = 5
    goal_dim: ClassVar[int] = 3
    summary: ClassVar[str] = "swim to a target in space"
    derived: ClassVar[tuple[str, ...]] = ("xmat", "geom_xpos", "geom_xmat")

    _torso: int = field(init=False, default=0)
    _mouth: int = field(init=False, default=0)
    _radii: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Look torso, mouth and target up."""
        super().bind(model)
        self._torso, self._mouth = model.body("torso").id, model.geom("mouth").id
        self._radii = float(model.geom("mouth").size[0] + model.geom("target").size[0])

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        qpos = _repeat(xp, qpos0, n)
        quaternion = draws.standard_normal((n, 4))
        qpos[:, 3:7] = quaternion / length(xp, quaternion)[:, None]
        qpos[:, 7:] = draws.uniform(-0.2, 0.2, (n, len(qpos0) - 7))
        return qpos, _repeat(xp, qvel0, n)

    def sample_goal(self, xp: ArrayOps, draws: Draws, n: int) -> Array:
        """Where the target is in the world."""
        goal = draws.uniform(-0.4, 0.4, (n, 3))
        goal[:, 2] = draws.uniform(0.1, 0.3, (n,))
        return goal

    def _mouth_to_target(self, s: SimState) -> Array:
        """In the mouth's frame, [N, 3]."""
        return _in_frame((s.goal - s.geom_xpos[:, self._mouth])[:, None], s.geom_xmat[:, self._mouth])[:, 0]

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0:7] = s.qpos[:, 7:]
        out[:, 7] = s.xmat[:, self._torso, _ZZ]
        out[:, 8:11] = self._mouth_to_target(s)
        out[:, 11:] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        distance = length(xp, s.goal - s.geom_xpos[:, self._mouth])
        in_target = tolerance(xp, distance, 0.0, self._radii, 2.0 * self._radii)
        upright = 0.5 * (s.xmat[:, self._torso, _ZZ] + 1.0)
        return (7.0 * in_target + upright) / 8.0


@dataclass(kw_only=True)
class BallInCupCatch(_SuiteTask):
    """Swing a ball on a string into the cup it hangs from.

    Observation [8]: position q (4), velocity v (4). Reward: 1 while the ball is within the cup, else 0.
    Starts with the ball's x uniform on [-0.2, 0.2] and z on [0.2, 0.5], drawn until it touches nothing.
    Source: dm_control.suite.ball_in_cup, task catch.
    """

    xml: ClassVar[str] = "ball_in_cup.xml"
    frame_skip: ClassVar[int] = 10
    obs_dim: ClassVar[int] = 8
    act_dim: ClassVar[int] = 2
    summary: ClassVar[str] = "swing a ball on a string into its cup"
    derived: ClassVar[tuple[str, ...]] = ("xpos", "site_xpos")
    clear_start: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = ("_room",)

    _ball: int = field(init=False, default=0)
    _target: int = field(init=False, default=0)
    _room: Array = field(init=False, default=None)

    def bind(self, model: Any) -> None:
        """Look ball and target up."""
        super().bind(model)
        self._ball, self._target = model.body("ball").id, model.site("target").id
        self._room = model.site("target").size[[0, 2]] - model.geom("ball").size[0]

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class; positions are those of cup and ball, x and z each."""
        qpos = _repeat(xp, qpos0, n)
        qpos[:, 2] = draws.uniform(-0.2, 0.2, (n,))
        qpos[:, 3] = draws.uniform(0.2, 0.5, (n,))
        return qpos, _repeat(xp, qvel0, n)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:] = s.state

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        off = s.site_xpos[:, self._target, 0::2] - s.xpos[:, self._ball, 0::2]
        return xp.all((off < self._room) & (-off < self._room)) * 1.0


@dataclass(kw_only=True)
class CartpoleSwingup(_SuiteTask):
    """Swing a pole on a cart up and hold it.

    Observation [5]: position, the cart's x, cos and sin of the pole's angle from upright (3), velocity v (2).
    Reward: (1 + cos) / 2 * (1 + T(x; 0, 2)) / 2 * (4/5 + (1 - ctrl^2) / 5) * (1 + T(angular velocity; 0, 5)) / 2.
    Starts hanging: x ~ N(0, 0.01), angle ~ N(pi, 0.01), velocities ~ N(0, 0.01), standard deviations given.
    Source: dm_control.suite.cartpole, task swingup.
    """

    xml: ClassVar[str] = "cartpole.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 5
    act_dim: ClassVar[int] = 1
    summary: ClassVar[str] = "swing a pole on a cart up and hold it"
    derived: ClassVar[tuple[str, ...]] = ("xmat",)

    _pole: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the pole up."""
        super().bind(model)
        self._pole = model.body("pole_1").id

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        qpos = 0.01 * draws.standard_normal((n, 2))
        qpos[:, 1] += math.pi
        return qpos, 0.01 * draws.standard_normal((n, 2))

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0] = s.qpos[:, 0]
        out[:, 1] = s.xmat[:, self._pole, _ZZ]
        out[:, 2] = s.xmat[:, self._pole, _XZ]
        out[:, 3:] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        upright = (s.xmat[:, self._pole, _ZZ] + 1.0) / 2.0
        centered = (1.0 + tolerance(xp, s.qpos[:, 0], 0.0, 0.0, 2.0)) / 2.0
        small_velocity = (1.0 + tolerance(xp, s.qvel[:, 1], 0.0, 0.0, 5.0)) / 2.0
        return upright * _small_control(xp, s) * small_velocity * centered


@dataclass(kw_only=True)
class PendulumSwingup(_SuiteTask):
    """Swing a pendulum up with a motor too weak to lift it.

    Observation [3]: orientation, cos and sin of the angle from upright (2), velocity v (1). Reward: 1 within 8 degrees
    of upright, else 0. Starts at rest at an angle uniform on [-pi, pi].
    Source: dm_control.suite.pendulum, task swingup.
    """

    xml: ClassVar[str] = "pendulum.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 3
    act_dim: ClassVar[int] = 1
    summary: ClassVar[str] = "swing a pendulum up with a weak motor"
    derived: ClassVar[tuple[str, ...]] = ("xmat",)

    _pole: int = field(init=False, default=0)

    def bind(self, model: Any) -> None:
        """Look the pole up."""
        super().bind(model)
        self._pole = model.body("pole").id

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        return draws.uniform(-math.pi, math.pi, (n, 1)), _repeat(xp, qvel0, n)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0] = s.xmat[:, self._pole, _ZZ]
        out[:, 1] = s.xmat[:, self._pole, _XZ]
        out[:, 2:] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return tolerance(xp, s.xmat[:, self._pole, _ZZ], math.cos(math.radians(8.0)), 1.0)


@dataclass(kw_only=True)
class PointMassEasy(_RandomJoints):
    """Bring a point mass in a plane to the middle.

    Observation [4]: position q (2), velocity v (2). Reward: T(distance; 0..r, r) * (4/5 + mean(1 - ctrl^2) / 5) with r
    the target's radius.
    Source: dm_control.suite.point_mass, task easy.
    """

    xml: ClassVar[str] = "point_mass.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 4
    act_dim: ClassVar[int] = 2
    summary: ClassVar[str] = "bring a point mass in a plane to the middle"
    derived: ClassVar[tuple[str, ...]] = ("geom_xpos",)

    _mass: int = field(init=False, default=0)
    _target: int = field(init=False, default=0)
    _radius: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Look mass and target up."""
        super().bind(model)
        self._mass, self._target = model.geom("pointmass").id, model.geom("target").id
        self._radius = float(model.geom("target").size[0])

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:] = s.state

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        distance = length(xp, s.geom_xpos[:, self._target] - s.geom_xpos[:, self._mass])
        return tolerance(xp, distance, 0.0, self._radius, self._radius) * _small_control(xp, s)


@dataclass(kw_only=True)
class ReacherEasy(_RandomJoints):
    """Bring the finger of a two-joint arm to a target in a plane.

    Observation [6]: position q (2), to_target, x and y from the finger (2), velocity v (2). Reward: 1 while target and
    finger overlap, else 0. The target's distance from the shoulder is uniform on [0.05, 0.2], its direction on the
    circle.
    Source: dm_control.suite.reacher, task easy.
    """

    xml: ClassVar[str] = "reacher.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 6
    act_dim: ClassVar[int] = 2
    goal_dim: ClassVar[int] = 2
    summary: ClassVar[str] = "bring a two-joint arm's finger to a target; wide target"
    derived: ClassVar[tuple[str, ...]] = ("geom_xpos",)
    target_radius: ClassVar[float] = 0.05

    _finger: int = field(init=False, default=0)
    _radii: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Look the finger up."""
        super().bind(model)
        self._finger = model.geom("finger").id
        self._radii = self.target_radius + float(model.geom("finger").size[0])

    def sample_goal(self, xp: ArrayOps, draws: Draws, n: int) -> Array:
        """x and y of the target in the world."""
        angle, radius = draws.uniform(0.0, 2.0 * math.pi, (n,)), draws.uniform(0.05, 0.2, (n,))
        goal = draws.uniform(0.0, 0.0, (n, 2))
        goal[:, 0] = radius * xp.sin(angle)
        goal[:, 1] = radius * xp.cos(angle)
        return goal

    def _to_target(self, s: SimState) -> Array:
        """From finger to target, [N, 2]."""
        return s.goal - s.geom_xpos[:, self._finger, :2]

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        out[:, 0:2] = s.qpos
        out[:, 2:4] = self._to_target(s)
        out[:, 4:6] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return tolerance(xp, length(xp, self._to_target(s)), 0.0, self._radii)


@dataclass(kw_only=True)
class ReacherHard(ReacherEasy):
    """ReacherEasy with a target of radius 0.015. Source: dm_control.suite.reacher, task hard."""

    summary: ClassVar[str] = "bring a two-joint arm's finger to a target; narrow target"
    target_radius: ClassVar[float] = 0.015


@dataclass(kw_only=True)
class AcrobotSwingup(_SuiteTask):
    """Swing a two-link pendulum up by its elbow only.

    Observation [6]: orientations, sin of the two links' angles from upright, then cos (4), velocity v (2). Reward:
    T(distance of the tip from a point straight up; 0..r, 1) with r the target's radius. Starts at rest at any angles.
    Source: dm_control.suite.acrobot, task swingup.
    """

    xml: ClassVar[str] = "acrobot.xml"
    frame_skip: ClassVar[int] = 1
    obs_dim: ClassVar[int] = 6
    act_dim: ClassVar[int] = 1
    summary: ClassVar[str] = "swing a two-link pendulum up by its elbow"
    derived: ClassVar[tuple[str, ...]] = ("xmat", "site_xpos")

    _upper: int = field(init=False, default=0)
    _lower: int = field(init=False, default=0)
    _tip: int = field(init=False, default=0)
    _target: int = field(init=False, default=0)
    _radius: float = field(init=False, default=0.0)

    def bind(self, model: Any) -> None:
        """Look links, tip and target up."""
        super().bind(model)
        self._upper, self._lower = model.body("upper_arm").id, model.body("lower_arm").id
        self._tip, self._target = model.site("tip").id, model.site("target").id
        self._radius = float(model.site("target").size[0])

    def sample_start(self, xp: ArrayOps, draws: Draws, n: int, qpos0: Array, qvel0: Array) -> tuple[Array, Array]:
        """See the class."""
        return draws.uniform(-math.pi, math.pi, (n, 2)), _repeat(xp, qvel0, n)

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        for at, body in enumerate((self._upper, self._lower)):
            out[:, at] = s.xmat[:, body, _XZ]
            out[:, at + 2] = s.xmat[:, body, _ZZ]
        out[:, 4:] = s.qvel

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        distance = length(xp, s.site_xpos[:, self._target] - s.site_xpos[:, self._tip])
        return tolerance(xp, distance, 0.0, self._radius, 1.0)


@dataclass(kw_only=True)
class HumanoidStand(_RandomJoints):
    """Stand up on two legs.

    Observation [67]: joint_angles q[7:] (21), head_height (1), extremities, left hand, left foot, right hand and right
    foot from the torso in its frame (12), torso_vertical, the torso's z axis (3), com_velocity (3), velocity v (27).
    Reward: stand * mean T(horizontal velocity; 0, 2) with
    stand = T(head; 1.4.., 0.35) * T(uprightness; 0.9.., 1.9) * (4/5 + mean(1 - ctrl^2) / 5), the second linear.
    Starts are drawn until nothing touches.
    Source: dm_control.suite.humanoid, task stand.
    """

    xml: ClassVar[str] = "humanoid.xml"
    frame_skip: ClassVar[int] = 5
    obs_dim: ClassVar[int] = 67
    act_dim: ClassVar[int] = 21
    summary: ClassVar[str] = "stand up on two legs"
    derived: ClassVar[tuple[str, ...]] = ("xpos", "xmat", "sensordata")
    clear_start: ClassVar[bool] = True
    constants: ClassVar[tuple[str, ...]] = (*_RandomJoints.constants, "_limbs")

    _torso: int = field(init=False, default=0)
    _head: int = field(init=False, default=0)
    _limbs: Array = field(init=False, default=None)
    _velocity: slice = field(init=False, default_factory=_no_columns)

    def bind(self, model: Any) -> None:
        """Look bodies and the velocity sensor up."""
        super().bind(model)
        self._torso, self._head = model.body("torso").id, model.body("head").id
        limbs = [f"{side}_{limb}" for side in ("left", "right") for limb in ("hand", "foot")]
        self._limbs = np.array([model.body(limb).id for limb in limbs])
        self._velocity = _sensor(model, "torso_subtreelinvel")

    def write_obs(self, xp: ArrayOps, s: SimState, out: Array) -> None:
        """See the class."""
        limbs = s.xpos[:, self._limbs] - s.xpos[:, self._torso, None]
        out[:, 0:21] = s.qpos[:, 7:]
        out[:, 21] = s.xpos[:, self._head, 2]
        out[:, 22:34] = _in_frame(limbs, s.xmat[:, self._torso]).reshape(-1, 12)
        out[:, 34:37] = s.xmat[:, self._torso, _ZX:]
        out[:, 37:40] = s.sensordata[:, self._velocity]
        out[:, 40:] = s.qvel

    def _stand(self, xp: ArrayOps, s: SimState) -> Array:
        """The part of the reward that all three tasks share, [N]."""
        standing = tolerance(xp, s.xpos[:, self._head, 2], 1.4, _INF, 0.35)
        upright = tolerance(xp, s.xmat[:, self._torso, _ZZ], 0.9, _INF, 1.9, 0.0, "linear")
        return standing * upright * _small_control(xp, s)

    def _horizontal_velocity(self, s: SimState) -> Array:
        """Of the centre of mass, [N, 2]."""
        return s.sensordata[:, self._velocity.start : self._velocity.start + 2]

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        return self._stand(xp, s) * _mean(xp, tolerance(xp, self._horizontal_velocity(s), 0.0, 0.0, 2.0))


@dataclass(kw_only=True)
class HumanoidWalk(HumanoidStand):
    """Walk on two legs, in any direction.

    Observation and stand: as HumanoidStand. Reward: stand * (5 T(speed; 1.., 1) + 1) / 6, linear.
    Source: dm_control.suite.humanoid, task walk.
    """

    summary: ClassVar[str] = "walk on two legs at 1 m/s, in any direction"
    target_speed: ClassVar[float] = 1.0

    def reward(self, xp: ArrayOps, s: SimState, action: Array, before: Array, after: Array, healthy: Array) -> Array:
        """See the class."""
        speed, wanted = length(xp, self._horizontal_velocity(s)), self.target_speed
        return self._stand(xp, s) * (5.0 * tolerance(xp, speed, wanted, _INF, wanted, 0.0, "linear") + 1.0) / 6.0


@dataclass(kw_only=True)
class HumanoidRun(HumanoidWalk):
    """Run on two legs: HumanoidWalk at 10 m/s. Source: dm_control.suite.humanoid, task run."""

    summary: ClassVar[str] = "run on two legs at 10 m/s, in any direction"
    target_speed: ClassVar[float] = 10.0


DMC_TASKS: dict[str, type[Task]] = {
    "hopper-stand": HopperStand,
    "hopper-hop": HopperHop,
    "cheetah-run": CheetahRun,
    "walker-stand": WalkerStand,
    "walker-walk": WalkerWalk,
    "walker-run": WalkerRun,
    "finger-spin": FingerSpin,
    "finger-turn_easy": FingerTurnEasy,
    "finger-turn_hard": FingerTurnHard,
    "fish-swim": FishSwim,
    "ball_in_cup-catch": BallInCupCatch,
    "cartpole-swingup": CartpoleSwingup,
    "pendulum-swingup": PendulumSwingup,
    "point_mass-easy": PointMassEasy,
    "reacher-easy": ReacherEasy,
    "reacher-hard": ReacherHard,
    "acrobot-swingup": AcrobotSwingup,
    "humanoid-stand": HumanoidStand,
    "humanoid-walk": HumanoidWalk,
    "humanoid-run": HumanoidRun,
}
"""The tasks by the suite's own names, domain and task; "dmc:" comes before them in `rlctl_envs.make`."""
