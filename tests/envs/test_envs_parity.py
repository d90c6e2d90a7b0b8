"""Every MuJoCo task against the installed Gymnasium, free running, episode ends included."""

from __future__ import annotations

import importlib.util
from collections import deque
from typing import Any

import gymnasium
import mujoco
import numpy as np
import pytest
import torch

from rlctl_envs.engines import load_model, margins_add
from rlctl_envs.tasks import DMC_TASKS, NUMPY, TASKS, TORCH, SimState
from rlctl_envs.vector import MujocoVecEnv

N = 3
STEPS = 220
EVERY_TASK = TASKS | DMC_TASKS
needs_models = pytest.mark.skipif(importlib.util.find_spec("dm_control") is None, reason="needs the extra dmc")


class Playback:
    """A start distribution that hands out the states Gymnasium drew, in order."""

    def __init__(self) -> None:
        self.starts: deque[tuple[np.ndarray, np.ndarray]] = deque()

    def add(self, env: gymnasium.Env[Any, Any]) -> None:
        data: Any = env.unwrapped.data  # type: ignore[attr-defined]
        self.starts.append((data.qpos.copy(), data.qvel.copy()))

    def __call__(self, xp: Any, draws: Any, n: int, qpos0: Any, qvel0: Any) -> tuple[np.ndarray, np.ndarray]:
        taken = [self.starts.popleft() for _ in range(n)]
        return np.stack([q for q, _ in taken]), np.stack([v for _, v in taken])


@pytest.mark.parametrize(("backend", "action_type"), [("batch", "float64"), ("batch", "float32"), ("pool", "float64")])
@pytest.mark.parametrize("name", TASKS)
def test_matches_gymnasium(name: str, backend: Any, action_type: str) -> None:
    theirs = [gymnasium.make(f"{name}-v5", disable_env_checker=True) for _ in range(N)]
    ours = MujocoVecEnv(TASKS[name](), N, backend=backend, threads=2, physics="native", dtype=torch.float64)
    assert ours.episode_len == theirs[0].spec.max_episode_steps  # type: ignore[union-attr]
    assert ours.obs_dim == theirs[0].observation_space.shape[0]  # type: ignore[index]
    playback = Playback()
    ours.task.sample_start = playback  # type: ignore[method-assign]

    first = [env.reset(seed=i)[0] for i, env in enumerate(theirs)]
    for env in theirs:
        playback.add(env)
    obs, _ = ours.reset()
    np.testing.assert_array_equal(obs.numpy(), np.stack(first))

    # The model's own bounds: Gymnasium's space rounds them to float32.
    low, high = theirs[0].unwrapped.model.actuator_ctrlrange.T  # type: ignore[attr-defined]
    rng, ends = np.random.default_rng(1), 0
    for _ in range(STEPS):
        action = np.clip(rng.normal(0, 0.6, (N, ours.act_dim)), -1, 1).astype(action_type)
        scaled = action * ((high - low) / 2).astype(action_type) + ((high + low) / 2).astype(action_type)
        results = [env.step(scaled[i]) for i, env in enumerate(theirs)]
        now = [result[0] for result in results]
        for i, env in enumerate(theirs):
            if results[i][2] or results[i][3]:
                now[i], _ = env.reset()
                playback.add(env)
                ends += 1
        obs, reward, terminated, truncated, info = ours.step(action)
        np.testing.assert_array_equal(info["next_obs"].numpy(), np.stack([r[0] for r in results]))
        np.testing.assert_array_equal(obs.numpy(), np.stack(now))
        np.testing.assert_allclose(reward.numpy(), [r[1] for r in results], rtol=0, atol=1e-12)
        assert terminated.tolist() == [r[2] for r in results]
        assert truncated.tolist() == [r[3] for r in results]
    if TASKS[name]().terminates or ours.episode_len < STEPS:
        assert ends > 0 or name == "Ant", "the comparison never saw an episode end"
    ours.close()


@pytest.mark.parametrize("name", TASKS)
def test_settings_match_gymnasium(name: str) -> None:
    """Non-default settings mean what they mean in Gymnasium's constructor."""
    settings: dict[str, Any] = {
        key: 0.37
        for key in (
            "forward_reward_weight", "ctrl_cost_weight", "healthy_reward", "contact_cost_weight",
            "impact_cost_weight", "reward_dist_weight", "reward_near_weight", "reward_control_weight",
        )
        if hasattr(TASKS[name], key)
    }  # fmt: skip
    others = {
        "exclude_current_positions_from_observation": False,
        "terminate_when_unhealthy": False,
        "include_cvel_in_observation": False,
        "healthy_z_range": (0.5, 1.2),
        "contact_force_range": (-0.5, 0.7),
    }
    settings.update((key, value) for key, value in others.items() if hasattr(TASKS[name], key))
    if not settings:
        pytest.skip("nothing to set but the noise")
    theirs = gymnasium.make(f"{name}-v5", disable_env_checker=True, **settings)
    ours = MujocoVecEnv(TASKS[name](**settings), 1, physics="native", dtype=torch.float64)
    playback = Playback()
    ours.task.sample_start = playback  # type: ignore[method-assign]
    first, _ = theirs.reset(seed=0)
    playback.add(theirs)
    np.testing.assert_array_equal(ours.reset()[0][0].numpy(), first)
    high = theirs.unwrapped.model.actuator_ctrlrange[:, 1]  # type: ignore[attr-defined]
    rng = np.random.default_rng(0)
    for _ in range(30):
        action = rng.uniform(-1, 1, (1, ours.act_dim))
        expected = theirs.step(action[0] * high)
        if expected[2]:
            playback.add(theirs)
        _, reward, terminated, _, info = ours.step(action)
        np.testing.assert_array_equal(info["next_obs"][0].numpy(), expected[0])
        assert abs(reward.item() - expected[1]) <= 1e-12
        assert terminated.item() == expected[2]
        if expected[2]:
            break
    ours.close()


@pytest.mark.parametrize("name", [*TASKS, *(pytest.param(n, marks=needs_models) for n in DMC_TASKS)])
def test_torch_and_numpy_agree(name: str) -> None:
    """The task functions give the same on torch tensors as on numpy arrays."""
    env = MujocoVecEnv(EVERY_TASK[name](), 4, seed=0, dtype=torch.float64)
    env.reset()
    for _ in range(5):
        env.step(np.full((4, env.act_dim), 0.3))
    sim, task = env.engine.sim, env.task
    names = SimState.__slots__
    tensors = SimState(*(None if getattr(sim, f) is None else torch.tensor(getattr(sim, f)) for f in names))
    action = np.full((4, env.act_dim), 0.2)

    def evaluate(xp: Any, s: SimState, a: Any, out: Any) -> tuple[Any, Any]:
        task.write_obs(xp, s, out)
        after = task.progress(xp, s)
        return out, task.reward(xp, s, a, None if after is None else after - 0.1, after, task.healthy(xp, s))

    obs, reward = evaluate(NUMPY, sim, action, np.zeros((4, env.obs_dim)))
    for constant in task.constants:
        setattr(task, constant, torch.tensor(getattr(task, constant)))
    torch_obs, torch_reward = evaluate(TORCH, tensors, torch.tensor(action), torch.zeros(4, env.obs_dim).double())
    np.testing.assert_allclose(torch_obs.numpy(), obs, atol=1e-14)
    np.testing.assert_allclose(torch_reward.numpy(), reward, atol=1e-12)
    env.close()


@pytest.mark.parametrize("name", TASKS)
def test_published_margins(name: str) -> None:
    """A model that gives every geom one margin has it halved where MuJoCo adds margins; others are left alone."""
    task = TASKS[name]()
    stock = mujoco.MjModel.from_xml_path(str(task.model_path())).geom_margin
    expected = {"Hopper": 0.001, "Ant": 0.01, "Humanoid": 0.001, "HumanoidStandup": 0.001, "Pusher": 0.002}
    np.testing.assert_array_equal(stock, expected.get(name, 0.0))
    np.testing.assert_array_equal(load_model(task, "native").geom_margin, stock)
    factor = 0.5 if margins_add() else 1.0
    np.testing.assert_array_equal(load_model(task, "published").geom_margin, factor * stock)


def test_published_physics_moves_hopper_and_not_cheetah() -> None:
    def rollout(name: str, physics: Any) -> torch.Tensor:
        env = MujocoVecEnv(TASKS[name](), 4, seed=0, physics=physics, dtype=torch.float64)
        env.reset()
        seen = [env.step(np.full((4, env.act_dim), -0.5))[4]["next_obs"] for _ in range(40)]
        env.close()
        return torch.stack(seen)

    assert torch.equal(rollout("HalfCheetah", "native"), rollout("HalfCheetah", "published"))
    assert torch.equal(rollout("Hopper", "native"), rollout("Hopper", "published")) is not margins_add()


@pytest.mark.parametrize(
    "name",
    [
        *(name for name, task in TASKS.items() if not task.islands),
        *(pytest.param(name, marks=needs_models) for name, task in DMC_TASKS.items() if not task.islands),
    ],
)
def test_islands_off_changes_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def rollout() -> torch.Tensor:
        env = MujocoVecEnv(EVERY_TASK[name](), 4, seed=0, dtype=torch.float64)
        env.reset()
        rng = np.random.default_rng(0)
        seen = [env.step(rng.uniform(-1, 1, (4, env.act_dim)))[4]["next_obs"] for _ in range(60)]
        env.close()
        return torch.stack(seen)

    without = rollout()
    monkeypatch.setattr(EVERY_TASK[name], "islands", True)
    assert torch.equal(rollout(), without)


@pytest.mark.parametrize("name", ["Hopper", "Walker2d", "Ant", "Humanoid"])
def test_health_at_its_bounds(name: str) -> None:
    """The health test agrees with Gymnasium's exactly at, and a rounding step beside, every bound."""
    theirs: Any = gymnasium.make(f"{name}-v5", disable_env_checker=True).unwrapped
    theirs.reset(seed=0)
    task = TASKS[name]()
    task.bind(theirs.model)
    height = 2 if name in ("Ant", "Humanoid") else 1
    bounds = [(height, z) for z in (0.2, 0.7, 0.8, 1.0, 2.0)]
    if height == 1:
        bounds += [(2, angle) for angle in (-1.0, -0.2, 0.2, 1.0)] + [(4, 100.0), (4, -100.0)]
        bounds += [(theirs.model.nq + 1, 100.0), (theirs.model.nq, -100.0), (0, 1e6)]
    base = np.concatenate([theirs.init_qpos, 0 * theirs.init_qvel])
    base[height] = {"Hopper": 1.2, "Walker2d": 1.2, "Ant": 0.6, "Humanoid": 1.4}[name]
    answers = set()
    for column, bound in bounds:
        for value in (bound, np.nextafter(bound, -np.inf), np.nextafter(bound, np.inf)):
            state = base.copy()
            state[column] = value
            theirs.data.qpos[:], theirs.data.qvel[:] = state[: theirs.model.nq], state[theirs.model.nq :]
            sim = SimState(
                qpos=state[None, : theirs.model.nq], qvel=state[None, theirs.model.nq :], state=state[None], ctrl=None
            )
            assert bool(task.healthy(NUMPY, sim)[0]) == bool(theirs.is_healthy), (column, value)
            answers.add(bool(theirs.is_healthy))
    assert answers == {True, False}


def test_pendulums_fall_at_their_bounds() -> None:
    """The two pendulums have no health test of their own to compare with: Gymnasium's step writes it inline."""
    pole = TASKS["InvertedPendulum"]()
    pole.bind(load_model(pole))
    angle = np.array([0.2, -0.2, np.nextafter(0.2, 1), np.nextafter(-0.2, -1), np.nan])
    state = np.zeros((5, 4))
    state[:, 1] = angle
    sim = SimState(qpos=state[:, :2], qvel=state[:, 2:], state=state, ctrl=None)
    assert pole.healthy(NUMPY, sim).tolist() == [True, True, False, False, False]
    tip = np.zeros((2, 1, 3))
    tip[:, 0, 2] = 1.0, np.nextafter(1.0, 2)
    sim = SimState(qpos=None, qvel=None, state=None, ctrl=None, site_xpos=tip)
    assert TASKS["InvertedDoublePendulum"]().healthy(NUMPY, sim).tolist() == [False, True]
