"""The engine contract, and how a task's model is loaded."""

from __future__ import annotations

from typing import Any, Literal, Protocol, TypeAlias

import mujoco
import numpy as np
from numpy.typing import NDArray

from rlctl_envs.tasks import SimState, Task

Floats: TypeAlias = NDArray[np.float64]
Ids: TypeAlias = NDArray[np.int32]
Physics: TypeAlias = Literal["published", "native"]

# MuJoCo raises one of these when it finds a state not finite or beyond 1e10, and then resets that simulation by itself.
DIVERGENCE_WARNINGS = slice(int(mujoco.mjtWarning.mjWARN_BADQPOS), int(mujoco.mjtWarning.mjWARN_BADQACC) + 1)


class Engine(Protocol):
    """N simulations of one model.

    `sim` holds live float64 arrays; `sim.ctrl` is written by the caller before `step`. An engine is used from one
    thread at a time.
    """

    name: str
    num_envs: int
    threads: int
    sim: SimState

    def step(self, substeps: int) -> Ids | None:
        """Advance every simulation by `substeps` physics steps; return those that diverged, None if none did.

        A diverged simulation holds some valid state (MuJoCo's own reset), not a continuation of its trajectory.
        """

    def reset(self, ids: Ids, qpos: Floats, qvel: Floats, forward: bool, settle: int = 0) -> None:
        """Put simulations `ids` [K] into the given state [K, nq], [K, nv], with warm start and forces cleared.

        `ids` is contiguous and ascending.
        `settle` physics steps without control follow; `forward` then computes the derived fields.
        """

    def contacts(self, ids: Ids) -> NDArray[np.int32]:
        """Contacts [K] of simulations `ids` at their last forward computation (engines made with `count_contacts`)."""

    def state(self) -> dict[str, Floats]:
        """Everything a bit-identical continuation depends on, as copies."""

    def set_state(self, state: dict[str, Floats]) -> None:
        """Take over what `state` returned, from an engine of either kind."""

    def close(self) -> None:
        """Free the simulations. May be called twice."""


def quiet_mujoco_log() -> None:
    """Keep MuJoCo from writing MUJOCO_LOG.TXT into the working folder and warnings onto the console.

    Process-wide, because MuJoCo's log settings are; left alone where somebody has already changed them. Nothing is
    lost: divergence, the one warning that matters in a running simulation, is counted and logged by `VecEnv`.
    """
    config_type = getattr(mujoco, "MjLogConfig", None)
    if config_type is None:  # before MuJoCo 4: warnings have a single hook
        if mujoco.get_mju_user_warning() is None:
            mujoco.set_mju_user_warning(_ignore)
        return
    config = config_type.get()
    if config.logto_file and config.logfile == "MUJOCO_LOG.TXT":
        config.logto_file = False
        config.logto_console = False
        config.set()


def _ignore(message: str) -> None:
    """Take a warning and do nothing with it."""


def load_model(task: Task, physics: Physics = "published") -> Any:
    """Compile the task's `mujoco.MjModel`.

    physics="published" restores the contact margins that published curves and data sets were made with: since 3.5
    MuJoCo adds the margins of two touching geoms where it used to take the larger, so a model that gives every geom
    the same margin has to halve it. "native" leaves the model as the installed package has it.

    Raises ValueError for another `physics`.
    """
    if physics not in ("published", "native"):
        raise ValueError(f"physics is {physics!r}; it is 'published' or 'native'.")
    quiet_mujoco_log()
    model = task.compile_model()
    if physics == "published" and margins_add():
        margins = np.unique(model.geom_margin)
        if len(margins) == 1 and margins[0] != 0.0:
            model.geom_margin[:] *= 0.5
    if not task.islands:
        # Bit-identical for the tasks that ask for it, and 3 to 5 % faster.
        model.opt.disableflags |= int(getattr(mujoco.mjtDisableBit, "mjDSBL_ISLAND", 0))
    return model


def margins_add() -> bool:
    """Whether the installed MuJoCo adds the contact margins of two geoms (3.5 and later)."""
    major, minor = (int(part) for part in mujoco.__version__.split(".")[:2])
    return (major, minor) >= (3, 5)
