"""The tasks of the DeepMind Control Suite against what dm_control computed (tests/fixtures/dm_control/generate.py)."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from typing import Any

import mujoco
import numpy as np
import pytest
import torch
from dmc_helpers import FROZEN, check_starts, frozen, needs_models

import rlctl_envs
from rlctl_envs.engines import load_model
from rlctl_envs.tasks import DMC_TASKS, NUMPY, TORCH
from rlctl_envs.tasks.dm_control import tolerance
from rlctl_envs.vector import MujocoVecEnv

# Largest difference seen: 5e-13 (the humanoid's joint velocities); pendulum, acrobot and reacher are exact.
CLOSE: dict[str, Any] = {"rtol": 0, "atol": 1e-9}
INTEGRATION = mujoco.mjtState.mjSTATE_INTEGRATION


def make(name: str, num_envs: int, **kwargs: Any) -> MujocoVecEnv:
    env = rlctl_envs.make(f"dmc:{name}", num_envs, seed=0, dtype=torch.float64, **kwargs)
    assert isinstance(env, MujocoVecEnv)
    return env


def place(env: MujocoVecEnv, qpos: Any, qvel: Any, warmstart: Any, goal: Any) -> None:
    """Put every simulation into its own state, the way a checkpoint is restored."""
    env.reset()
    model = load_model(env.task)
    data, state = mujoco.MjData(model), env.state()
    for row, q, v, w in zip(state["engine.rows"], qpos, qvel, warmstart, strict=True):
        data.qpos[:], data.qvel[:], data.qacc_warmstart[:] = q, v, w
        mujoco.mj_getState(model, data, row, INTEGRATION)
    if env.task.goal_dim:
        state["goal"] = goal
    env.set_state(state)


@needs_models
def test_every_task_is_frozen_and_has_the_suites_sizes() -> None:
    assert {path.stem for path in FROZEN.glob("*.npz")} == set(DMC_TASKS)
    assert sum(path.stat().st_size for path in FROZEN.glob("*.npz")) < 500_000
    for name, task in DMC_TASKS.items():
        rows = frozen(name)
        assert task.obs_dim == rows["sizes"].sum() == rows["obs"].shape[-1]
        assert task.act_dim == rows["action"].shape[-1]
        assert task.goal_dim == rows["goal"].shape[-1]
        assert task.episode_len == rows["episode_len"] == 1000
        assert task.frame_skip == rows["substeps"]
        # A comparison says nothing about what stands still.
        moves = np.ptp(rows["obs"], axis=(0, 1)) > 0
        assert moves.all(), (name, np.flatnonzero(~moves))
        assert len(np.unique(rows["reward"])) > 1


@needs_models
@pytest.mark.parametrize("backend", ["batch", "pool"])
@pytest.mark.parametrize("name", DMC_TASKS)
def test_single_steps(name: str, backend: Any) -> None:
    """From each recorded state, one step: all at once, as so many simulations."""
    rows = frozen(name)
    episodes, steps, _ = rows["action"].shape
    n = episodes * steps
    env = make(name, n, backend=backend)
    before = [rows[key][:, :-1].reshape(n, -1) for key in ("qpos", "qvel", "warmstart")]
    place(env, *before, np.repeat(rows["goal"], steps, axis=0))
    _, reward, terminated, truncated, info = env.step(rows["action"].reshape(n, -1))
    np.testing.assert_allclose(info["next_obs"].numpy(), rows["obs"][:, 1:].reshape(n, -1), **CLOSE)
    np.testing.assert_allclose(reward.numpy(), rows["reward"].reshape(n), **CLOSE)
    assert not terminated.any()
    assert not truncated.any()
    env.close()


@needs_models
@pytest.mark.parametrize("name", DMC_TASKS)
def test_free_running_from_a_reset(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first observation, and the recorded episodes from their first states on."""
    rows = frozen(name)
    episodes, steps, _ = rows["action"].shape
    env = make(name, episodes)
    starts = rows["qpos"][:, 0], rows["qvel"][:, 0]
    # A start that was posed may touch something, and one that was recorded has fallen already.
    monkeypatch.setattr(env.task, "sample_start", lambda *_: starts)
    monkeypatch.setattr(env.task, "sample_goal", lambda *_: rows["goal"])
    monkeypatch.setattr(type(env.task), "clear_start", False)
    monkeypatch.setattr(type(env.task), "settle_steps", 0)
    obs, _ = env.reset()
    np.testing.assert_allclose(obs.numpy(), rows["obs"][:, 0], **CLOSE)
    for step in range(steps):
        obs, reward, *_ = env.step(rows["action"][:, step])
        np.testing.assert_allclose(obs.numpy(), rows["obs"][:, step + 1], **CLOSE)
        np.testing.assert_allclose(reward.numpy(), rows["reward"][:, step], **CLOSE)
    env.close()


@needs_models
def test_the_cheetah_falls_as_the_suites_does() -> None:
    """Two seconds of falling from the same draws, the odd first step included."""
    rows = frozen("cheetah-run")
    shares, fallen = rows["fall_draw"], rows["fall_obs"]
    env = make("cheetah-run", len(shares))

    class Draws:
        def uniform(self, low: float, high: float, size: tuple[int, ...]) -> np.ndarray:
            out = np.full(size, 0.5)
            out[:, 3:] = shares  # the first three coordinates, the root's, have no range
            return out

    env._np_random = Draws()  # type: ignore[assignment]
    np.testing.assert_allclose(env.reset()[0].numpy(), fallen, **CLOSE)
    env.task._first_velocity = 0 * env.task._first_velocity  # type: ignore[attr-defined]
    assert np.abs(env.reset()[0].numpy() - fallen).max() > 1e-6, "without that step it would be another fall"
    env.close()


@needs_models
@pytest.mark.parametrize("name", DMC_TASKS)
def test_start_distribution(name: str) -> None:
    """Every coordinate of start states, targets and first observations against frozen quantiles."""
    n = 500 if name == "cheetah-run" else 4000
    env = make(name, n)
    obs, _ = env.reset()
    sim = env.engine.sim
    goal = sim.goal if env.task.goal_dim else np.zeros((n, 0))
    check_starts(name, np.concatenate([sim.qpos, sim.qvel, goal, obs.numpy()], axis=1))
    if env.task.clear_start:
        assert (env.engine.contacts(env._all_ids) == 0).all()
    env.close()


@needs_models
def test_clear_starts_are_redrawn_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only the simulations that touch draw again, and a task that cannot start says so."""
    env = make("finger-spin", 64)
    asked: list[int] = []
    draw = env.task.sample_start

    def count(xp: Any, draws: Any, n: int, *rest: Any) -> Any:
        asked.append(n)
        return draw(xp, draws, n, *rest)

    monkeypatch.setattr(env.task, "sample_start", count)
    env.reset()
    assert asked[0] == 64
    assert asked == sorted(asked, reverse=True)
    assert 0 < asked[1] < 64
    monkeypatch.setattr(env.task, "sample_start", lambda xp, d, n, *_: (np.zeros((n, 3)), np.zeros((n, 3))))
    monkeypatch.setattr("rlctl_envs.vector._MAX_DRAWS", 20)
    with pytest.raises(RuntimeError, match="dmc:finger-spin: no start without contact in 20 draws"):
        env.reset()
    env.close()


@needs_models
def test_targets_change_with_the_episode_and_survive_a_checkpoint() -> None:
    env = make("reacher-easy", 4, episode_len=5)
    env.reset()
    goals = [env.engine.sim.goal.copy()]
    env.stagger()  # ages 0, 1, 2, 3
    for step in range(1, 5):
        obs, *_ = env.step(np.zeros((4, 2)))
        goals.append(env.engine.sim.goal.copy())
        changed = (goals[-1] != goals[-2]).any(1)
        assert changed.tolist() == [step == 5 - age for age in range(4)]
    finger = env.engine.sim.geom_xpos[:, env.task._finger, :2]  # type: ignore[attr-defined]
    np.testing.assert_allclose(obs[:, 2:4].numpy(), goals[-1] - finger, atol=1e-12)
    state = env.state()
    other = make("reacher-easy", 4, episode_len=5)
    other.set_state(state)
    np.testing.assert_array_equal(other.engine.sim.goal, goals[-1])
    with pytest.raises(ValueError, match="missing \\['goal'\\]"):
        other.set_state({key: x for key, x in state.items() if key != "goal"})
    env.close()
    other.close()


@needs_models
def test_time_limit_and_no_early_end() -> None:
    env = make("walker-walk", 2)
    env.reset()
    rng = np.random.default_rng(0)
    total = np.zeros(2)
    for step in range(1, 1001):
        obs, reward, terminated, truncated, info = env.step(rng.uniform(-1, 1, (2, 6)))
        total += reward.numpy()
        assert not terminated.any()
        assert truncated.tolist() == [step == 1000] * 2
    assert (obs != info["next_obs"]).any(1).all()
    assert ((total > 0) & (total < 1000)).all()
    env.close()


@pytest.mark.parametrize("xp", [NUMPY, TORCH])
def test_tolerance(xp: Any) -> None:
    """By hand, from its definition: 1 within the bounds, `at_margin` at the margin, shapes in between."""

    def value(x: float, *args: Any) -> float:
        return float(tolerance(xp, np.array([x]) if xp is NUMPY else torch.tensor([x]).double(), *args)[0])

    for shape in ("gaussian", "linear", "quadratic"):
        assert [value(x, 1.0, 2.0, 0.5, 0.2, shape) for x in (1.0, 1.5, 2.0)] == [1.0] * 3
        for x in (0.5, 2.5):
            assert value(x, 1.0, 2.0, 0.5, 0.2, shape) == pytest.approx(0.2)
    assert value(2.25, 1.0, 2.0, 0.5, 0.2, "linear") == pytest.approx(0.6)
    assert value(2.25, 1.0, 2.0, 0.5, 0.2, "quadratic") == pytest.approx(0.8)
    assert value(2.25, 1.0, 2.0, 0.5, 0.0625, "gaussian") == pytest.approx(0.5)  # 0.0625^(1/4)
    assert value(9.0, 1.0, 2.0, 0.5, 0.2, "linear") == value(9.0, 1.0, 2.0, 0.5, 0.2, "quadratic") == 0.0
    assert [value(x, 1.0, 2.0) for x in (0.999, 1.0, 2.0, 2.001)] == [0.0, 1.0, 1.0, 0.0]
    assert [value(x, 1.0, float("inf"), 1.0, 0.0, "linear") for x in (1e9, 0.25, -7.0)] == [1.0, 0.25, 0.0]


def test_names() -> None:
    for name in ("dmc:finger-turn_easy", "dmc:Finger-Turn-Easy", "DMC:finger_turn_easy"):
        assert rlctl_envs.canonical(name) == "dmc:finger-turn_easy"
    with pytest.raises(rlctl_envs.UnknownTask, match="did you mean 'dmc:hopper-stand'"):
        rlctl_envs.make("dmc:hopper-stnd")
    rows = {row["id"]: row for row in rlctl_envs.task_table()}
    assert len([env_id for env_id in rows if env_id.startswith("dmc:")]) == 20
    assert rows["dmc:humanoid-run"]["obs_dim"] == 67


def test_the_missing_extra_is_named_once(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "dm_control" else find(name, *a))
    with pytest.raises(ValueError, match=r"^the dmc: tasks .* not installed: pip install 'rlctl\[dmc\]'$"):
        rlctl_envs.make("dmc:hopper-stand")


@needs_models
def test_dm_control_is_never_imported_and_nothing_warns() -> None:
    """In a process of its own: another test may have imported a library that does."""
    code = (
        "import sys, numpy as np, rlctl_envs\n"
        "env = rlctl_envs.make('dmc:cheetah-run', num_envs=2)\n"
        "env.reset(); env.step(np.zeros((2, 6))); env.close()\n"
        "assert 'dm_control' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
