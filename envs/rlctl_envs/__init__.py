"""Vectorised MuJoCo tasks, probe environments and a Gymnasium adapter: torch tensors in and out.

`make("Hopper", num_envs=64)` is the way in; `VecEnv` documents the contract every environment keeps.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlctl_envs.contract import NonFiniteAction, VecEnv
from rlctl_envs.registry import UnknownTask, canonical, make, register_with_gymnasium, simulated_task, task_table

if TYPE_CHECKING:
    from rlctl_envs.vector import MujocoVecEnv
    from rlctl_envs.warp_vector import WarpVecEnv

__all__ = [
    "MujocoVecEnv",
    "NonFiniteAction",
    "UnknownTask",
    "VecEnv",
    "WarpVecEnv",
    "canonical",
    "make",
    "simulated_task",
    "task_table",
]

register_with_gymnasium()


def __getattr__(name: str) -> Any:
    # Loads MuJoCo, which a listing of the tasks should not have to.
    if name == "MujocoVecEnv":
        from rlctl_envs.vector import MujocoVecEnv

        return MujocoVecEnv
    if name == "WarpVecEnv":
        from rlctl_envs.warp_vector import WarpVecEnv

        return WarpVecEnv
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
