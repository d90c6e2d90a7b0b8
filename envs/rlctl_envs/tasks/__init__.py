"""Task definitions: what is observed, rewarded and ended, independent of the engine that simulates it."""

from rlctl_envs.tasks.arrays import NUMPY, TORCH, Array, ArrayOps
from rlctl_envs.tasks.base import SimState, Task, build_task
from rlctl_envs.tasks.dm_control import DMC_TASKS
from rlctl_envs.tasks.gymnasium_mujoco import TASKS

__all__ = ["DMC_TASKS", "NUMPY", "TASKS", "TORCH", "Array", "ArrayOps", "SimState", "Task", "build_task"]
