"""MuJoCo Warp: N simulations on a CUDA device (or, for tests, on Warp's CPU device), in float32.

Importing this module imports warp, which takes seconds: nothing else in the package does so before it is asked for
this engine. Source of the algorithmic facts below: mujoco_warp 4.0, and measurements against MuJoCo 4.0
(`tests/envs/test_envs_warp.py` holds every task to Gymnasium, one step at a time).

Differs from the CPU engines:
- float32 instead of float64; one step agrees to rounding, trajectories of a contact-rich body part after some steps.
- mujoco_warp has no PGS solver: models that ask for it (both humanoids) run Newton with 100 iterations, which solves
  the same problem to the same optimum.
- mujoco_warp turns the friction pyramid of a capsule on a plane when the capsule is steep; `_capsule_frames` turns it
  back to where MuJoCo has it.
- contacts and constraint rows live in buffers of fixed size; what does not fit is dropped, and `overflow` says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import mujoco
import mujoco_warp as mjw
import numpy as np
import torch
import warp as wp
from numpy.typing import NDArray
from torch import Tensor

from rlctl_envs.engines import warp_kernels as kernels
from rlctl_envs.tasks import SimState, Task

NEWTON_ITERATIONS = 100
"""Upper bound of the solver's iterations for models that asked for PGS."""

BUFFERS: dict[str, tuple[int, int]] = {
    "Hopper": (16, 32),
    "Walker2d": (24, 48),
    "HalfCheetah": (24, 48),
    "Ant": (32, 64),
    "Swimmer": (8, 16),
    "Reacher": (8, 16),
    "Pusher": (16, 32),
    "InvertedPendulum": (8, 16),
    "InvertedDoublePendulum": (8, 16),
    "HopperStand": (16, 64),
    "CheetahRun": (16, 48),
    "WalkerStand": (16, 64),
    "_Finger": (8, 16),
    "FishSwim": (8, 16),
    "BallInCupCatch": (8, 24),
    "CartpoleSwingup": (8, 16),
    "PendulumSwingup": (8, 16),
    "PointMassEasy": (8, 16),
    "ReacherEasy": (8, 16),
    "AcrobotSwingup": (8, 16),
    "HumanoidStand": (32, 96),
}
"""Contacts and constraint rows per world, by task or a class it derives from. Random actions need at most 10 rows in
Hopper, 18 in Walker2d, 17 in HalfCheetah, 19 in Ant, 6 in Pusher, 2 in the others of Gymnasium; 34 in the suite's
hoppers, 24 in its cheetah, 35 in its walkers, 7 with the finger, 12 with the cup, 48 in its humanoids, 1 in the rest. A
trained gait touches the ground more often, hence the room."""
DEFAULT_BUFFERS = (48, 64)
"""For every other task: Gymnasium's humanoids (at most 38 rows under random actions), and tasks not measured."""

OVERFLOWS = (
    (("NEFC", "NJMAX_NNZ"), "njmax", "constraint rows per world"),
    (("BROADPHASE", "NARROWPHASE", "CCD"), "nconmax", "contacts per world"),
)
"""Which bits of `overflow` each option cures."""
STALE_SENSORS = ("ACTUATOR", "TENDON", "JOINTLIMIT", "TENDONLIMIT")
"""Sensors of positions and velocities that a refresh after the step would leave as they were: they need more than the
places and velocities of bodies."""
NO_LOSS = ("ITERATIONS", "LS_ITERATIONS", "TACTILE")
"""Bits that tell of no full buffer: MuJoCo's own solver stops at its iterations too, and says nothing."""

_PLANE, _CAPSULE = int(mujoco.mjtGeom.mjGEOM_PLANE), int(mujoco.mjtGeom.mjGEOM_CAPSULE)


def _capsule_frames(m: Any, d: Any) -> None:
    """Correct the frames of plane-capsule contacts; called by mujoco_warp between collision and constraints."""
    wp.launch(
        kernels.capsule_frames,
        dim=d.naconmax,
        inputs=[m.geom_type, d.geom_xmat, d.nacon, d.contact.geom, d.contact.worldid, _PLANE, _CAPSULE],
        outputs=[d.contact.frame],
    )


def prepare(model: Any) -> Any:
    """Change a compiled `mujoco.MjModel` to what mujoco_warp can solve, in place: Newton instead of PGS."""
    if model.opt.solver == mujoco.mjtSolver.mjSOL_PGS:
        model.opt.solver = mujoco.mjtSolver.mjSOL_NEWTON
        model.opt.iterations = NEWTON_ITERATIONS
    return model


class WarpEngine:
    """N simulations of one model on a device, as torch tensors that share memory with warp's arrays.

    `sim` holds float32 tensors. The caller writes `sim.ctrl` and calls `step`; it writes `mask` [N] and `start`
    [N, nq + nv] and calls `restart`. Neither call reads anything on the host or changes which memory is used, so both
    can be captured in a graph.

    Args:
        task: bound to `model`; says which derived fields are read.
        model: compiled `mujoco.MjModel`; changed by `prepare`.
        num_envs: N.
        device: "cuda", "cuda:1" or "cpu".
        prepared: whether `restart` takes the derived fields of starts from `first` instead of computing them.
        nconmax: room for contacts, per world on average; None takes `BUFFERS`.
        njmax: room for constraint rows of every world; None takes `BUFFERS`.
        capsule_frames: correct the frames of plane-capsule contacts; off only to show what it is for.
    """

    name = "warp"

    def __init__(
        self,
        task: Task,
        model: Any,
        num_envs: int,
        device: torch.device,
        prepared: bool = False,
        nconmax: int | None = None,
        njmax: int | None = None,
        capsule_frames: bool = True,
    ) -> None:
        prepare(model)
        known = (BUFFERS[cls.__name__] for cls in type(task).__mro__ if cls.__name__ in BUFFERS)
        contacts, rows = next(known, DEFAULT_BUFFERS)
        self.nconmax = contacts if nconmax is None else nconmax
        self.njmax = rows if njmax is None else njmax
        for name, value in (("nconmax", self.nconmax), ("njmax", self.njmax)):
            if value < 1:
                raise ValueError(f"{name} is {value}; it is at least 1.")
        self.num_envs, self.device = num_envs, device
        wp.config.log_level = wp.LOG_WARNING  # not a line for every kernel it loads
        self._device = wp.get_device(str(device))
        self._derived, self._fresh = bool(task.derived), task.fresh
        self._sensors = "sensordata" in task.derived
        if self._fresh and self._sensors:
            _refuse_stale_sensors(model)
        self._contact_forces = task.contact_forces
        self._nq, self._size = int(model.nq), int(model.nq + model.nv)
        rest = mujoco.MjData(model)
        mujoco.mj_forward(model, rest)
        with wp.ScopedDevice(self._device):
            self._model = mjw.put_model(model)
            self._model.opt.warn_overflow = 0  # a printf on the device serialises it; `overflow` is read instead
            if capsule_frames:
                self._model.callback.contactfilter = _capsule_frames
            self._data = mjw.put_data(model, rest, nworld=num_envs, nconmax=self.nconmax, njmax=self.njmax)
            wp.synchronize_device(self._device)  # from here on the caller's torch stream is used
        d = self._data
        state = torch.zeros(num_envs, self._size, device=device)
        names = ("ctrl", "overflow", "qacc_warmstart", *task.derived)
        views = {name: _as_torch(getattr(d, name)) for name in names}
        self.sim = SimState(
            qpos=state[:, : self._nq],
            qvel=state[:, self._nq :],
            state=state,
            ctrl=views["ctrl"],
            **{name: views[name] for name in task.derived},
        )
        self.mask = torch.ones(num_envs, dtype=torch.bool, device=device)
        """Which worlds `restart` puts into `start`."""
        self.start = torch.zeros(num_envs, self._size, device=device)
        self.overflow: Tensor = views["overflow"]
        """[N] int32, bits of `mjw.OverflowType` raised since the world's last restart."""
        self.warm: Tensor = views["qacc_warmstart"]
        """Where the solver begins, [N, nv]."""
        self._qpos, self._qvel = wp.to_torch(d.qpos), wp.to_torch(d.qvel)
        self._state, self._mask, self._start = (wp.from_torch(x) for x in (state, self.mask, self.start))
        # A reset leaves these as MuJoCo's full forward would at a start: no actuator pulls and no limit is reached.
        self._cleared = [
            wp.from_torch(views[name].view(num_envs, -1))
            for name in ("cfrc_ext", "qfrc_actuator", "qfrc_constraint")
            if name in views and not prepared
        ]
        kept = {name: views[name] for name in ("qacc_warmstart", *task.derived)} if prepared else {}
        self.first: dict[str, Tensor] = {name: torch.zeros_like(x) for name, x in kept.items()}
        """What `restart` gives the worlds of `mask` besides `start`: warm start and derived fields, if `prepared`."""
        self._copied = [(x, self.first[name]) for name, x in kept.items()]
        self._copies = [tuple(wp.from_torch(x.view(num_envs, -1)) for x in pair) for pair in self._copied]
        self.touching = torch.zeros(num_envs, dtype=torch.bool, device=device)
        """What `find_contacts` found, [N]."""
        self._touching = wp.from_torch(self.touching)
        self._lent = [self._qpos, self._qvel, self.warm, state, self.sim.ctrl, self.mask, self.start, self.overflow]

    def step(self, substeps: int) -> None:
        """Advance every simulation by `substeps` physics steps; refreshes `sim.state` and the derived fields.

        The derived fields are those the last physics step left, one substep old, as in the CPU engines; with
        `Task.fresh` what depends on positions and velocities alone is computed anew.
        """
        self.advance(substeps)
        if self._contact_forces:
            mjw.rne_postconstraint(self._model, self._data)
        if self._fresh:
            self._kinematics()
            if self._sensors:  # these two leave the sensors of accelerations and forces as they are
                mjw.sensor_pos(self._model, self._data)
                mjw.sensor_vel(self._model, self._data)
        self.read()

    def advance(self, substeps: int) -> None:
        """Make physics steps and nothing else: neither `sim.state` nor the derived fields are brought up to date."""
        for _ in range(substeps):
            mjw.step(self._model, self._data)

    def restart(self) -> None:
        """Put the simulations of `mask` at rest in their rows of `start`, with warm start and forces cleared.

        Derived fields come from `first` where starts are prepared. Else those of *all* simulations are brought to their
        present state where the task reads any; that of the running ones is computed anew by the next `step`.
        """
        self.put_starts()
        if self._derived and not self._copies:
            self._kinematics()
        for x in self._cleared:
            wp.launch(kernels.clear_rows, x.shape, inputs=[self._mask], outputs=[x])
        for x, source in self._copies:
            wp.launch(kernels.copy_rows, x.shape, inputs=[self._mask, source], outputs=[x])
        self.read()

    def put_starts(self) -> None:
        """Clear the simulations of `mask` and write their rows of `start`; computes nothing."""
        d = self._data
        mjw.reset_data(self._model, d, reset=self._mask)
        wp.launch(
            kernels.write_start,
            (self.num_envs, self._size),
            inputs=[self._mask, self._nq, self._start],
            outputs=[d.qpos, d.qvel],
        )

    def find_contacts(self) -> None:
        """Say in `touching` in which simulations something touches where they stand now.

        All are said to touch if the buffer for contacts was too small to tell.
        """
        d = self._data
        mjw.kinematics(self._model, d)
        mjw.collision(self._model, d)
        self._touching.zero_()
        wp.launch(
            kernels.mark_contacts,
            max(d.naconmax, self.num_envs),
            inputs=[d.naconmax, d.ncollision, d.nacon, d.contact.worldid],
            outputs=[self._touching],
        )

    def forward(self) -> None:
        """Compute all that MuJoCo's forward does where the simulations stand; the warm start stays."""
        mjw.forward(self._model, self._data)

    def keep_first(self) -> None:
        """Keep warm starts and derived fields, as they are, in `first`."""
        for x, first in self._copied:
            first.copy_(x)

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[None]:
        """Within, the simulations may be used for anything; afterwards they go on as if nothing had been.

        Only the derived fields stay as they were left, until the next `step`.
        """
        kept = [x.clone() for x in self._lent]
        try:
            yield
        finally:
            for x, mine in zip(self._lent, kept, strict=True):
                x.copy_(mine)

    def _kinematics(self) -> None:
        mjw.kinematics(self._model, self._data)
        mjw.com_pos(self._model, self._data)
        mjw.com_vel(self._model, self._data)

    def read(self) -> None:
        """Bring `sim.state` up to date, after `advance`."""
        d = self._data
        wp.launch(
            kernels.read_state, (self.num_envs, self._size), inputs=[self._nq, d.qpos, d.qvel], outputs=[self._state]
        )

    @contextlib.contextmanager
    def scope(self) -> Iterator[None]:
        """Within, warp works on this engine's device, and on torch's current stream where that is a CUDA device."""
        if self._device.is_cuda:
            # torch orders the work: one and the same stream serves both
            stream: Any = wp.stream_from_torch(torch.cuda.current_stream(self.device))
            with wp.ScopedStream(stream, sync_enter=False):
                yield
        else:
            with wp.ScopedDevice(self._device):
                yield

    def state(self) -> dict[str, NDArray[Any]]:
        """Positions, velocities and warm start, [N, ...] float32: all that the next step depends on."""
        parts = {"qpos": self._qpos, "qvel": self._qvel, "warm": self.warm}
        return {name: x.cpu().numpy().copy() for name, x in parts.items()}

    def set_state(self, state: dict[str, NDArray[Any]]) -> None:
        """Take over what `state` returned."""
        for name, x in (("qpos", self._qpos), ("qvel", self._qvel), ("warm", self.warm)):
            x.copy_(torch.from_numpy(np.ascontiguousarray(state[name])))
        with self.scope():
            self.read()

    def load(self, qpos: NDArray[Any], qvel: NDArray[Any], warm: NDArray[Any]) -> None:
        """Put every simulation into a state [N, nq], [N, nv] with its solver's warm start [N, nv]; for comparisons."""
        self.set_state({k: np.asarray(v, np.float32) for k, v in (("qpos", qpos), ("qvel", qvel), ("warm", warm))})


def _as_torch(x: Any) -> Tensor:
    """The memory of a warp array as a tensor; rotation matrices as rows of nine, the way MuJoCo has them."""
    tensor = wp.to_torch(x)
    return tensor.flatten(-2) if x.dtype == wp.mat33 else tensor


def _refuse_stale_sensors(model: Any) -> None:
    """Raise ValueError for a model with sensors that `WarpEngine.step` cannot bring up to date."""
    kinds = {mujoco.mjtSensor(kind).name.removeprefix("mjSENS_") for kind in model.sensor_type}
    if stale := sorted(kinds & {f"{what}{part}" for what in STALE_SENSORS for part in ("POS", "VEL")}):
        raise ValueError(
            f"the warp engine does not refresh sensors of kind {', '.join(stale)} after a step: simulate this task on "
            "the CPU (backend='cpu')."
        )


def overflow_advice(bits: int, nconmax: int, njmax: int) -> str:
    """What to raise when `bits` (of `mjw.OverflowType`) have been seen; empty when nothing was lost."""
    now = {"nconmax": nconmax, "njmax": njmax}
    left = bits & ~_bits(NO_LOSS)
    cures = []
    for names, option, what in OVERFLOWS:
        if left & _bits(names):
            cures.append(f"{option} (now {now[option]} {what})")
        left &= ~_bits(names)
    if left:
        cures.append(f"the buffers behind overflow bits {left} of mujoco_warp")
    return " and ".join(cures)


def _bits(names: tuple[str, ...]) -> int:
    return sum(int(getattr(mjw.OverflowType, name)) for name in names)
