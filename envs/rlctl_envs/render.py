"""Pictures of environments, on machines without a screen too.

MuJoCo draws through OpenGL, and which way to a picture works (EGL, OSMesa, GLFW) depends on the machine's drivers.
The choice is made by the variable MUJOCO_GL before MuJoCo is first imported, and a wrong one may crash the process: so
`find_backend` tries each in a process of its own, and drawing is best done in one as well (`rlctl video` does).
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlctl_envs.contract import VecEnv

BACKENDS = ("egl", "osmesa", "glfw")
"""In the order in which they are tried."""

Picture = NDArray[np.uint8]

_PROBE = """
import mujoco, numpy
model = mujoco.MjModel.from_xml_string(
    '<mujoco><worldbody><light pos="0 0 3"/><geom type="sphere" size=".2" rgba="1 0 0 1"/></worldbody></mujoco>')
data = mujoco.MjData(model)
mujoco.mj_forward(model, data)
renderer = mujoco.Renderer(model, 48, 64)
renderer.update_scene(data)
picture = renderer.render()
assert picture.shape == (48, 64, 3), picture.shape
assert picture.max() > picture.min(), 'the picture is of one colour'
print('fine')
"""


class NoBackend(RuntimeError):
    """No way to draw works here; the message says what was tried and what each answered."""


def find_backend(wanted: str | None = None, *, seconds: float = 120.0) -> str:
    """The first of `BACKENDS` that draws a ball on this machine, each tried in a process of its own.

    `wanted` (default: the variable MUJOCO_GL) is tried alone. Raises NoBackend.
    """
    wanted = wanted or os.environ.get("MUJOCO_GL") or None
    answers = {}
    for name in BACKENDS if wanted is None else (wanted,):
        answer = _try(name, seconds)
        if answer is None:
            return name
        answers[name] = answer
    heard = "; ".join(f"{k}: {v}" for k, v in answers.items())
    raise NoBackend(
        f"no OpenGL backend draws here ({heard}). Without a screen install "
        "EGL or OSMesa (Debian: apt install libegl1 libgl1-mesa-dri, or libosmesa6)"
        + ("" if wanted is None else f", or unset MUJOCO_GL ({wanted} was asked for) to try all")
    )


def _try(backend: str, seconds: float) -> str | None:
    """None if `backend` draws; else what went wrong, in one line."""
    environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": "" if backend == "glfw" else backend}
    try:
        done = subprocess.run(
            [sys.executable, "-c", _PROBE], capture_output=True, text=True, timeout=seconds, env=environment
        )
    except subprocess.TimeoutExpired:
        return f"no answer within {seconds:g} s"
    if done.returncode == 0 and "fine" in done.stdout:
        return None
    if done.returncode < 0:
        return f"crashed with signal {-done.returncode}"
    lines = [line for line in done.stderr.splitlines() if line.strip()]
    return lines[-1].strip()[:160] if lines else f"exit code {done.returncode}"


def render_options(env_id: str) -> dict[str, Any]:
    """Keyword arguments with which `rlctl_envs.make` gives an environment that can be drawn."""
    from rlctl_envs.registry import task_table

    own = any(env_id in (row["id"], row["name"]) for row in task_table())
    return {} if own else {"render_mode": "rgb_array"}


class Camera:
    """Draws the first copy of an environment as it stands.

    A simulated task is seen by its camera called "track", if its model has one, else by MuJoCo's free camera. Anything
    else draws itself (`env.render()`), in its own size.

    Raises ValueError for an environment that cannot be drawn.
    """

    def __init__(self, env: VecEnv, width: int = 480, height: int = 480) -> None:
        from rlctl_envs.vector import MujocoVecEnv

        self.env = env
        self._renderer: Any = None
        self.steps_per_second: float = _fps(env)
        """How many steps of the environment are one second of its own time."""
        if isinstance(env, MujocoVecEnv):
            import mujoco

            from rlctl_envs.engines import load_model

            self._mujoco = mujoco
            model = load_model(env.task, env.physics)
            model.vis.global_.offwidth = max(int(model.vis.global_.offwidth), width)
            model.vis.global_.offheight = max(int(model.vis.global_.offheight), height)
            self._model, self._data = model, mujoco.MjData(model)
            self._renderer = mujoco.Renderer(model, height, width)
            self._camera: Any = "track"
            if mujoco.mj_name2id(model, mujoco.mjtObj.mjOBJ_CAMERA, "track") < 0:
                self._camera = mujoco.MjvCamera()
                mujoco.mjv_defaultFreeCamera(model, self._camera)

    def picture(self) -> Picture:
        """`[height, width, 3]` of the moment between two steps."""
        from rlctl_envs.vector import MujocoVecEnv

        if self._renderer is None:
            return self._own_picture()
        assert isinstance(self.env, MujocoVecEnv)
        sim = self.env.engine.sim
        self._data.qpos[:], self._data.qvel[:] = sim.qpos[0], sim.qvel[0]
        self._mujoco.mj_forward(self._model, self._data)
        self._renderer.update_scene(self._data, camera=self._camera)
        return np.array(self._renderer.render(), dtype=np.uint8)

    def _own_picture(self) -> Picture:
        inner = getattr(self.env, "_envs", self.env)  # Gymnasium's own vector environment behind the adapter
        try:
            frames: Sequence[Any] | None = inner.render()
        except (NotImplementedError, AttributeError) as e:
            raise ValueError(f"{self.env.id} draws no picture of itself ({type(e).__name__}: {e})") from e
        if frames is None or not len(frames) or frames[0] is None:
            raise ValueError(f"{self.env.id} draws no picture of itself")
        return np.ascontiguousarray(frames[0], dtype=np.uint8)

    def close(self) -> None:
        """Free the renderer."""
        if self._renderer is not None:
            self._renderer.close()


def _fps(env: VecEnv) -> float:
    task = getattr(env, "task", None)
    if task is not None and task.dt:
        return 1.0 / float(task.dt)
    inner = getattr(getattr(env, "_envs", None), "envs", [env])[0]
    metadata: Mapping[str, Any] = getattr(inner, "metadata", None) or {}
    return float(metadata.get("render_fps") or 30.0)
