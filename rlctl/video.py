"""Film a trained agent: `record` in this process, `film` in one of its own.

OpenGL drivers may crash, and MuJoCo takes its backend from the environment before it is first imported. So `film` looks
for a backend that works and starts a process with it: a crash there becomes one line here.
"""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from rlctl.errors import RlctlError, UsageError

if TYPE_CHECKING:
    from rlctl.types import Agent
    from rlctl_envs import VecEnv
    from rlctl_envs.render import Camera, Picture

FORMATS = (".mp4", ".gif")
SMOOTH = {".mp4": 50.0, ".gif": 25.0}
"""Pictures per second that a film has about at most; faster environments are shown every k-th step, in real time."""


class Blank(RlctlError):
    """What was drawn is no film: pictures of one colour, or all the same."""


def film(run_dir: Path, *, backend: str | None = None, **options: Any) -> dict[str, Any]:
    """`record` in a process of its own, with an OpenGL backend that works here (or with `backend`).

    Raises UsageError where nothing can be drawn, and RlctlError with the reason where the process failed.
    """
    from rlctl_envs.render import NoBackend, find_backend

    out = Path(options["out"])
    check_target(out)
    try:
        backend = find_backend(backend)
    except NoBackend as e:
        raise UsageError(str(e)) from e
    options = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
    platform = "" if backend == "glfw" else backend
    environment = os.environ | {"MUJOCO_GL": backend, "PYOPENGL_PLATFORM": platform}
    environment.setdefault("SDL_VIDEODRIVER", "dummy")  # environments that draw by pygame need no screen either
    command = [sys.executable, "-m", "rlctl.video", json.dumps({"run_dir": str(run_dir), **options})]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode < 0:
        name = signal.Signals(-done.returncode).name
        raise RlctlError(f"the process that draws crashed ({name}) under {backend}: try another --backend")
    last = done.stdout.strip().rpartition("\n")[2]
    if done.returncode != 0 or not last.startswith("{"):
        raise RlctlError(f"the process that draws ended with exit code {done.returncode} under {backend}")
    result: dict[str, Any] = json.loads(last)
    if "error" in result:
        raise (UsageError if result["code"] == 2 else RlctlError)(result["error"])
    return result | {"backend": backend}


def check_target(out: Path) -> None:
    """UsageError for a file that cannot be written: its ending, a missing package."""
    if out.suffix not in FORMATS:
        raise UsageError(f"{out}: a film is one of {', '.join(FORMATS)}")
    if out.suffix == ".mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("an .mp4 needs the package imageio-ffmpeg: pip install 'rlctl[video]'; a .gif does without")


def record(
    run_dir: Path,
    out: Path,
    *,
    checkpoint: str = "latest",
    episodes: int = 1,
    steps: int | None = None,
    seed: int = 0,
    size: tuple[int, int] = (480, 480),
    stochastic: bool = False,
    progress: Callable[[int], None] = lambda steps: None,
) -> dict[str, Any]:
    """Film `episodes` episodes (of at most `steps` steps each) of a run's agent into `out`, in real time.

    The environment is that of the run's evaluations; `size` is (width, height). Returns what was filmed: returns and
    lengths of the episodes, number of pictures, pictures per second. Raises Blank, and leaves no file, if a picture is
    of one colour or nothing moves.
    """
    import rlctl_envs
    from rlctl import experiment
    from rlctl_envs.render import Camera, render_options

    check_target(out)
    agent, settings = experiment.load_agent(run_dir, checkpoint)
    env_id, options = experiment.evaluated_in(run_dir, settings)
    env = rlctl_envs.make(env_id, 1, seed=seed, device=agent.spec.device, **options, **render_options(env_id))
    camera = None
    temp = out.with_name(f".tmp-{out.name}")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        camera = Camera(env, *size)
        stride = max(round(camera.steps_per_second / SMOOTH[out.suffix]), 1)
        fps = camera.steps_per_second / stride
        returns: list[float] = []
        lengths: list[int] = []
        with Film(temp, fps) as writer:
            for k in range(episodes):
                rewards: list[float] = []
                for picture, reward in _play(
                    agent, env, camera, seed + k, stochastic, steps or env.episode_len, stride
                ):
                    if picture is not None:
                        writer.add(picture)
                    rewards.append(reward)
                    progress(len(rewards))
                returns.append(sum(rewards))
                lengths.append(len(rewards) - 1)
        temp.replace(out)
    finally:
        temp.unlink(missing_ok=True)
        if camera is not None:
            camera.close()
        env.close()
    return {
        "file": str(out),
        "env": env_id,
        "checkpoint": checkpoint,
        "pictures": writer.count,
        "fps": fps,
        "every": stride,
        "returns": returns,
        "lengths": lengths,
    }


@torch.no_grad()
def _play(
    agent: Agent, env: VecEnv, camera: Camera, seed: int, stochastic: bool, steps: int, stride: int
) -> Iterator[tuple[Picture | None, float]]:
    """An episode: its start (reward 0), then its steps; every `stride`-th comes with a picture.

    The state an episode ended in cannot be drawn: by then the environment has begun the next one.
    """
    agent.eval()
    with agent.borrowed_rng(seed):
        obs, _ = env.reset(seed=seed)
        yield camera.picture(), 0.0
        for step in range(1, steps + 1):
            action, _ = agent.act(obs, explore=stochastic)
            obs, reward, terminated, truncated, _ = env.step(action)
            done = bool(terminated[0] | truncated[0])
            yield camera.picture() if step % stride == 0 and not done else None, float(reward[0])
            if done:
                return


class Film:
    """Writes pictures into a file, and looks at each: one colour, or nothing that moves, is `Blank`."""

    def __init__(self, file: Path, fps: float) -> None:
        import imageio

        self.count = 0
        self._first: Picture | None = None
        self._moves = False
        if file.suffix == ".gif":
            self._writer: Any = imageio.get_writer(file, format="GIF", duration=round(100 / fps) * 10, loop=0)
        else:
            self._writer = imageio.get_writer(
                file, format="FFMPEG", fps=fps, codec="libx264", quality=7, macro_block_size=2, ffmpeg_log_level="error"
            )

    def __enter__(self) -> Film:
        return self

    def add(self, picture: Picture) -> None:
        """One more picture [H, W, 3]."""
        if picture.min() == picture.max():
            raise Blank(f"picture {self.count} is of one colour: nothing was drawn; try another --backend")
        if self._first is None:
            self._first = picture.copy()
        self._moves |= not np.array_equal(picture, self._first)
        self._writer.append_data(picture[: picture.shape[0] // 2 * 2, : picture.shape[1] // 2 * 2])
        self.count += 1

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        self._writer.close()
        if kind is None and self.count > 1 and not self._moves:
            raise Blank(f"all {self.count} pictures are the same: nothing moves")


def main() -> None:
    """The process that `film` starts: arguments as JSON in, the result as JSON on the last line of stdout."""
    from rich.progress import Progress

    options = json.loads(sys.argv[1])
    quiet = options.pop("quiet", False)
    for key in ("run_dir", "out"):
        options[key] = Path(options[key])
    try:
        with Progress(transient=True, disable=quiet or not sys.stderr.isatty()) as bar:
            task = bar.add_task("filming", total=None)
            result = record(**options, progress=lambda n: bar.update(task, completed=n))
    except (RlctlError, ValueError) as e:
        result = {"error": str(e), "code": getattr(e, "exit_code", 2)}
    except ImportError as e:
        result = {"error": f"the environment cannot be drawn: {e}", "code": 1}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
