"""MuJoCo's own batch simulator (`mujoco/mjbatch.h`, since 3.17) through its C interface.

The C interface is used rather than `mujoco.batch.Batch` because contact forces (`cfrc_ext`) need
`mj_rnePostConstraint` after the physics steps, which the Python class cannot run, and because a call costs less.
Everything called here is public API.
"""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlctl_envs.engines.base import DIVERGENCE_WARNINGS, Floats, Ids
from rlctl_envs.tasks import SimState

_STAGE_NONE = 0  # mjSTAGE_NONE: compute nothing
_STAGE_VEL = 2  # mjSTAGE_VEL: what depends on positions and velocities
_STAGE_ACC = 3  # mjSTAGE_ACC: a full mj_forward


class BatchUnavailable(RuntimeError):
    """The installed MuJoCo has no usable batch interface."""


class _Config(ctypes.Structure):
    """`mjBatchConfig`."""

    _fields_ = (("nthread", ctypes.c_int), ("persistent", ctypes.c_ubyte))


@functools.cache
def _library() -> ctypes.CDLL:
    """Open the MuJoCo library that the Python module uses and declare the functions called here.

    `CDLL` releases the interpreter lock around each call. Raises BatchUnavailable.
    """
    folder = Path(str(mujoco.__file__)).parent
    candidates = [*folder.glob("libmujoco*.so*"), *folder.glob("libmujoco*.dylib"), *folder.glob("mujoco*.dll")]
    if not candidates:
        raise BatchUnavailable(f"no MuJoCo library in {folder}")
    lib = ctypes.CDLL(str(sorted(candidates)[0]))
    pointer, integer, text = ctypes.c_void_p, ctypes.c_int, ctypes.c_char_p
    signatures: dict[str, tuple[Any, list[Any]]] = {
        "mjb_makeBatch": (pointer, [pointer, integer, pointer, text, integer]),
        "mjb_deleteBatch": (None, [pointer]),
        "mjb_nstate": (integer, [pointer]),
        "mjb_state": (pointer, [pointer]),
        "mjb_stateComponent": (pointer, [pointer, integer, pointer]),
        "mjb_warning": (pointer, [pointer]),
        "mjb_step": (integer, [pointer, pointer, integer, integer, integer]),
        "mjb_forward": (integer, [pointer, pointer, integer, integer]),
        "mjb_reset": (integer, [pointer, pointer, integer, pointer, integer]),
        "mjb_status": (pointer, [pointer]),
        "mjb_output": (pointer, [pointer, text, pointer, pointer]),
        "mjb_apply": (integer, [pointer, pointer, integer, pointer, pointer, integer]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(lib, name, None)
        if function is None:
            raise BatchUnavailable(f"MuJoCo {mujoco.__version__} has no {name}")
        function.restype, function.argtypes = result, arguments
    return lib


def _array(address: int, shape: tuple[int, ...], ctype: Any = ctypes.c_double) -> Any:
    """View memory owned by the batch as a numpy array."""
    kind = ctype * int(np.prod(shape))
    return np.frombuffer(kind.from_address(address), dtype=np.dtype(ctype)).reshape(shape)


class BatchEngine:
    """N simulations in MuJoCo's thread pool; see `Engine`.

    A simulation is a row of `mjSTATE_INTEGRATION`; the rows and the derived fields asked for are numpy views of the
    batch's memory, refreshed after every call. Results do not depend on the number of threads.
    """

    name = "batch"

    def __init__(
        self,
        model: Any,
        num_envs: int,
        threads: int,
        derived: tuple[str, ...] = (),
        *,
        contact_forces: bool = False,
        fresh: bool = False,
        count_contacts: bool = False,
    ) -> None:
        self._lib = lib = _library()
        self.num_envs, self.threads = num_envs, min(threads, num_envs)
        self._contact_forces = contact_forces
        self._step_stage = _STAGE_VEL if fresh else _STAGE_NONE
        # The pass for contact forces needs each simulation's own mjData to survive the step.
        config = _Config(self.threads, int(contact_forces))
        error = ctypes.create_string_buffer(1000)
        self._batch = lib.mjb_makeBatch(model._address, num_envs, ctypes.byref(config), error, len(error))
        if not self._batch:
            raise BatchUnavailable(f"mjb_makeBatch: {error.value.decode(errors='replace')}")
        base = lib.mjb_state(self._batch)
        self._rows: Floats = _array(base, (num_envs, lib.mjb_nstate(self._batch)))

        def columns(component: Any, size: int) -> slice:
            start = (lib.mjb_stateComponent(self._batch, int(component), None) - base) // 8
            return slice(start, start + size)

        qpos = columns(mujoco.mjtState.mjSTATE_QPOS, model.nq)
        qvel = columns(mujoco.mjtState.mjSTATE_QVEL, model.nv)
        ctrl = columns(mujoco.mjtState.mjSTATE_CTRL, model.nu)
        if qpos.stop != qvel.start:
            raise BatchUnavailable("positions and velocities are not adjacent in the state")
        template = mujoco.MjData(model)

        def output(name: str, shape: tuple[int, ...], ctype: Any = ctypes.c_double) -> Any:
            address = lib.mjb_output(self._batch, name.encode(), None, None)
            if not address:
                raise BatchUnavailable(f"no batch output {name!r}")
            return _array(address, (num_envs, *shape), ctype)

        self._derived: dict[str, Floats] = {name: output(name, getattr(template, name).shape) for name in derived}
        self._contacts = output("ncon", (), ctypes.c_int) if count_contacts else None
        self.sim = SimState(
            qpos=self._rows[:, qpos],
            qvel=self._rows[:, qvel],
            state=self._rows[:, qpos.start : qvel.stop],
            ctrl=self._rows[:, ctrl],
            **self._derived,
        )
        count = int(mujoco.mjtWarning.mjNWARNING)
        # mjWarningStat is {int lastinfo; int number}.
        warnings = _array(lib.mjb_warning(self._batch), (num_envs, count, 2), ctypes.c_int)
        self._warnings_flat = warnings.reshape(-1)
        self._diverged = warnings[:, DIVERGENCE_WARNINGS, 1]
        self._status = _array(lib.mjb_status(self._batch), (num_envs,), ctypes.c_int)
        self._rne = ctypes.cast(lib.mj_rnePostConstraint, ctypes.c_void_p)
        self._step = lib.mjb_step
        if lib.mjb_reset(self._batch, None, 0, None, _STAGE_NONE):
            raise BatchUnavailable("mjb_reset failed")

    def step(self, substeps: int) -> Ids | None:
        """Advance every simulation; see `Engine.step`."""
        batch = self._batch
        failed = self._step(batch, None, 0, substeps, self._step_stage)
        if self._contact_forces:
            # mj_rnePostConstraint takes two of the four arguments it is given: the calling conventions of x86-64 and
            # arm64 allow that, and the self-test in `rlctl_envs.engines` would show it if one did not.
            self._lib.mjb_apply(batch, None, 0, self._rne, None, 0)
            self._lib.mjb_forward(batch, None, 0, _STAGE_NONE)  # computes nothing, copies the derived fields out
        if failed or np.count_nonzero(self._warnings_flat):
            return self._find_diverged(failed)
        return None

    def _find_diverged(self, failed: int) -> Ids | None:
        """Simulations that MuJoCo had to reset, or that raised an error in the last step."""
        # `reset` clears a simulation's warnings, and the caller resets what diverged: a count is always a new one.
        bad = (self._diverged != 0).any(axis=1)
        if failed:
            bad |= self._status != 0
        ids = np.flatnonzero(bad).astype(np.int32)
        return ids if len(ids) else None

    def reset(self, ids: Ids, qpos: Floats, qvel: Floats, forward: bool, settle: int = 0) -> None:
        """Put simulations at rest in a given state; see `Engine.reset`."""
        address, count = ids.ctypes.data, len(ids)
        self._lib.mjb_reset(self._batch, address, count, None, _STAGE_NONE)
        if count == self.num_envs:  # all, in order: no need to gather
            self.sim.qpos[...] = qpos
            self.sim.qvel[...] = qvel
        else:
            self.sim.qpos[ids] = qpos
            self.sim.qvel[ids] = qvel
        if settle:
            self._step(self._batch, address, count, settle, _STAGE_NONE)
        if forward:
            # Contact forces stay zero, as after Gymnasium's reset.
            self._lib.mjb_forward(self._batch, address, count, _STAGE_ACC)

    def contacts(self, ids: Ids) -> NDArray[np.int32]:
        """Contacts of some simulations; see `Engine.contacts`."""
        assert self._contacts is not None
        counts: NDArray[np.int32] = self._contacts[ids]
        return counts

    def state(self) -> dict[str, Floats]:
        """Integration state and derived fields; see `Engine.state`."""
        return {"rows": self._rows.copy(), **{name: x.copy() for name, x in self._derived.items()}}

    def set_state(self, state: dict[str, Floats]) -> None:
        """Write integration state and derived fields back; see `Engine.set_state`."""
        self._warnings_flat[:] = 0
        self._rows[:] = state["rows"]
        for name, x in self._derived.items():
            x[:] = state[name]

    def close(self) -> None:
        """Free the batch. The arrays of `sim` must not be used afterwards."""
        if self._batch:
            batch, self._batch = self._batch, None
            # Views of freed memory must not stay reachable from here.
            del self.sim, self._rows, self._derived, self._contacts
            del self._warnings_flat, self._diverged, self._status
            self._lib.mjb_deleteBatch(batch)
