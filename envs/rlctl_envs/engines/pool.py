"""One `mujoco.MjData` per simulation and a Python thread pool: slower, but nothing except MuJoCo's Python API."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlctl_envs.engines.base import DIVERGENCE_WARNINGS, Floats, Ids
from rlctl_envs.tasks import SimState

_INTEGRATION = int(mujoco.mjtState.mjSTATE_INTEGRATION)


class PoolEngine:
    """N `MjData` objects stepped by Python threads (`mj_step` releases the interpreter lock); see `Engine`."""

    name = "pool"

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
        self.num_envs, self.threads = num_envs, min(threads, num_envs)
        self._model, self._contact_forces, self._fresh = model, contact_forces, fresh
        self._data = [mujoco.MjData(model) for _ in range(num_envs)]
        state = np.zeros((num_envs, model.nq + model.nv))
        self._derived = {name: np.zeros((num_envs, *getattr(self._data[0], name).shape)) for name in derived}
        self.sim = SimState(
            qpos=state[:, : model.nq],
            qvel=state[:, model.nq :],
            state=state,
            ctrl=np.zeros((num_envs, model.nu)),
            **self._derived,
        )
        self._warnings = np.zeros((num_envs, int(mujoco.mjtWarning.mjNWARNING)), dtype=np.int32)
        outputs = {"qpos": self.sim.qpos, "qvel": self.sim.qvel, **self._derived}
        # Views looked up once: an attribute of MjData costs as much as copying it.
        self._copies = [
            [(x[i], getattr(data, name)) for name, x in outputs.items()] + [(self._warnings[i], data.warning.number)]
            for i, data in enumerate(self._data)
        ]
        self._controls = [data.ctrl for data in self._data]
        edges = np.linspace(0, num_envs, self.threads + 1).astype(int)
        self._shares = [range(low, high) for low, high in itertools.pairwise(edges)]
        self._executor = ThreadPoolExecutor(self.threads - 1) if self.threads > 1 else None
        for i in range(num_envs):
            self._copy_out(i)

    def _copy_out(self, i: int) -> None:
        """Refresh the arrays of simulation i."""
        for target, source in self._copies[i]:
            target[...] = source

    def _step_share(self, share: range, substeps: int) -> list[int]:
        """Step the simulations of one thread; return those that raised an error."""
        step: Callable[..., None] = mujoco.mj_step
        model, failed = self._model, []
        for i in share:
            data = self._data[i]
            self._controls[i][:] = self.sim.ctrl[i]
            try:
                step(model, data, substeps)
                if self._contact_forces:
                    mujoco.mj_rnePostConstraint(model, data)
                if self._fresh:
                    mujoco.mj_step1(model, data)
            except mujoco.FatalError:
                failed.append(i)
            self._copy_out(i)
        return failed

    def step(self, substeps: int) -> Ids | None:
        """Advance every simulation; see `Engine.step`."""
        if self._executor is None:
            failed = self._step_share(self._shares[0], substeps)
        else:
            others = [self._executor.submit(self._step_share, share, substeps) for share in self._shares[1:]]
            failed = self._step_share(self._shares[0], substeps)
            for other in others:
                failed += other.result()
        if not failed and not np.count_nonzero(self._warnings):
            return None
        bad = (self._warnings[:, DIVERGENCE_WARNINGS] != 0).any(axis=1)
        bad[failed] = True
        ids = np.flatnonzero(bad).astype(np.int32)
        return ids if len(ids) else None

    def reset(self, ids: Ids, qpos: Floats, qvel: Floats, forward: bool, settle: int = 0) -> None:
        """Put simulations at rest in a given state; see `Engine.reset`."""
        for row, i in enumerate(ids):
            data = self._data[i]
            mujoco.mj_resetData(self._model, data)
            data.qpos[:] = qpos[row]
            data.qvel[:] = qvel[row]
            if settle:
                mujoco.mj_step(self._model, data, settle)
            if forward:
                mujoco.mj_forward(self._model, data)
            self.sim.ctrl[i] = 0.0
            self._copy_out(i)

    def contacts(self, ids: Ids) -> NDArray[np.int32]:
        """Contacts of some simulations; see `Engine.contacts`."""
        return np.array([self._data[i].ncon for i in ids], dtype=np.int32)

    def state(self) -> dict[str, Floats]:
        """Integration state and derived fields; see `Engine.state`."""
        rows = np.zeros((self.num_envs, mujoco.mj_stateSize(self._model, _INTEGRATION)))
        for row, data in zip(rows, self._data, strict=True):
            mujoco.mj_getState(self._model, data, row, _INTEGRATION)
        return {"rows": rows, **{name: x.copy() for name, x in self._derived.items()}}

    def set_state(self, state: dict[str, Floats]) -> None:
        """Write integration state and derived fields back; see `Engine.set_state`."""
        for i, data in enumerate(self._data):
            mujoco.mj_resetData(self._model, data)
            mujoco.mj_setState(self._model, data, np.ascontiguousarray(state["rows"][i]), _INTEGRATION)
            self.sim.ctrl[i] = data.ctrl
            self._copy_out(i)
        # What a task reads before the next step is what the interrupted run left, not what MuJoCo would recompute.
        for name, x in self._derived.items():
            x[:] = state[name]

    def close(self) -> None:
        """Stop the threads."""
        if self._executor is not None:
            self._executor.shutdown()
            self._executor = None
