"""`rlctl video`: films that show something, or an error that says why not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from cli_helpers import Cli

from rlctl import video
from rlctl.errors import RlctlError, UsageError
from rlctl_envs import make, render
from rlctl_envs.render import Camera, NoBackend, find_backend


def moving(n: int) -> list[np.ndarray]:
    pictures = np.zeros((n, 32, 48, 3), np.uint8)
    for k in range(n):
        pictures[k, :, k : k + 8] = 200
    return list(pictures)


@pytest.mark.parametrize("suffix", [".gif", ".mp4"])
def test_a_film_holds_what_was_drawn(suffix: str, tmp_path: Path) -> None:
    if suffix == ".mp4":
        pytest.importorskip("imageio_ffmpeg")
    import imageio

    file = tmp_path / f"a{suffix}"
    with video.Film(file, 20.0) as film:
        for picture in moving(12):
            film.add(picture)
    frames = [np.asarray(x)[..., :3] for x in imageio.get_reader(file)]
    assert len(frames) == 12
    assert frames[0].shape == (32, 48, 3)
    for k, frame in enumerate(frames):  # compressed, but the bar is where it was
        bright = frame.astype(float).mean((0, 2))
        assert abs(int(bright.argmax()) - (k + 4)) <= 4


def test_pictures_of_one_colour_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(video.Blank, match="one colour"), video.Film(tmp_path / "a.gif", 20.0) as film:
        film.add(np.full((32, 48, 3), 7, np.uint8))


def test_a_film_in_which_nothing_moves_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(video.Blank, match="nothing moves"), video.Film(tmp_path / "a.gif", 20.0) as film:
        for _ in range(3):
            film.add(moving(1)[0])


def test_every_backend_is_tried_and_each_answer_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    answers: dict[str, str | None] = {"egl": "no display", "osmesa": None, "glfw": "never asked"}
    monkeypatch.setattr(render, "_try", lambda name, seconds: answers[name])
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert find_backend() == "osmesa"
    answers["osmesa"] = "crashed with signal 11"
    with pytest.raises(
        NoBackend, match=r"egl: no display; osmesa: crashed with signal 11; glfw: never asked.*apt install"
    ):
        find_backend()
    with pytest.raises(NoBackend, match="unset MUJOCO_GL"):
        find_backend("egl")


def test_a_backend_that_is_none_is_told_by_its_process() -> None:
    with pytest.raises(NoBackend, match="nonsense: "):
        find_backend("nonsense")


@pytest.mark.parametrize(
    ("code", "error", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)", RlctlError, "crashed .SIGSEGV. under egl"),
        ("raise SystemExit(4)", RlctlError, "exit code 4"),
        ("""print('{"error": "no picture", "code": 2}')""", UsageError, "no picture"),
    ],
)
def test_what_the_drawing_process_suffers_is_one_line(
    code: str, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(render, "find_backend", lambda wanted=None: "egl")
    original = subprocess.run
    monkeypatch.setattr(subprocess, "run", lambda command, **kw: original([sys.executable, "-c", code], **kw))
    with pytest.raises(error, match=message):
        video.film(tmp_path, out=tmp_path / "a.gif")


def test_probes_draw_no_picture() -> None:
    env = make("probe:both", 1)
    env.reset(seed=0)
    with pytest.raises(ValueError, match="draws no picture"):
        Camera(env).picture()


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--out", "a.avi"], ".mp4, .gif"),
        (["--size", "8", "480"], "16 to 4096"),
        (["--out", "a.gif", "--backend", "nonsense"], "no OpenGL backend"),
    ],
)
def test_refusals(args: list[str], message: str, cli: Cli, ppo_run: Path) -> None:
    r = cli("video", ppo_run, *args)
    assert r.code == 2
    assert message in r.err


@pytest.mark.slow
@pytest.mark.parametrize("out", ["a.mp4", "a.gif"])
def test_a_run_is_filmed(out: str, cli: Cli, ppo_run: Path, tmp_path: Path) -> None:
    """With whatever backend works here; skipped, with its answers, where none does."""
    import imageio

    try:
        backend = find_backend()
    except NoBackend as e:
        pytest.skip(str(e))
    root = Path(__file__).parents[2]
    os.environ["PYTHONPATH"] = os.pathsep.join([str(root), str(root / "envs"), os.environ.get("PYTHONPATH", "")])
    args = ["video", ppo_run, "--out", out, "--episodes", 2, "--steps", 30, "--size", 160, 120, "--backend", backend]
    result: dict[str, Any] = cli(*map(str, args), "--json").json
    frames = [np.asarray(x)[..., :3] for x in imageio.get_reader(tmp_path / out)]
    assert len(frames) == result["pictures"]
    assert frames[0].shape == (120, 160, 3)
    assert all(f.std() > 5 for f in frames)
    assert not np.array_equal(frames[0], frames[5])
    assert all(n <= 30 for n in result["lengths"])
    assert len(result["returns"]) == 2
