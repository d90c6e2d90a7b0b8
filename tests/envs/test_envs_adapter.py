"""Gymnasium environments behind the VecEnv contract."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch

import rlctl_envs
from rlctl_envs.adapters.gymnasium import GymnasiumVecEnv


class TwoPart(gymnasium.Env[Any, Any]):
    """Dict observation; a clock that ends at 3 with an observation of its own."""

    observation_space = gymnasium.spaces.Dict(
        {"b": gymnasium.spaces.Box(-9, 9, (2,)), "a": gymnasium.spaces.Box(-9, 9, (1, 1))}
    )
    action_space = gymnasium.spaces.Box(np.array([[0.0, -2.0]]), np.array([[4.0, 2.0]]), dtype=np.float64)

    def __init__(self, fail_at: int = -1) -> None:
        self.fail_at = fail_at

    def _obs(self) -> dict[str, Any]:
        return {"b": np.array([self.t, 2.0], np.float32), "a": np.array([[7.0]], np.float32)}

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> Any:
        super().reset(seed=seed)
        self.t = 0.0
        return self._obs(), {}

    def step(self, action: Any) -> Any:
        self.t += 1
        if self.t == self.fail_at:
            raise ZeroDivisionError("the environment is broken")
        assert action.shape == (1, 2)
        return self._obs(), float(action[0, 0]), self.t == 3, False, {}


@pytest.fixture(autouse=True)
def _registered(monkeypatch: pytest.MonkeyPatch) -> Any:
    # Worker processes import this file by name ("module:Id").
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    path = os.environ.get("PYTHONPATH", "")
    monkeypatch.setenv("PYTHONPATH", f"{Path(__file__).parent}{os.pathsep}{path}")
    sys.modules.setdefault("test_envs_adapter", sys.modules[__name__])
    yield


gymnasium.register("TwoPart-v0", entry_point="test_envs_adapter:TwoPart", max_episode_steps=50)


def test_pendulum_matches_gymnasium() -> None:
    env = rlctl_envs.make("pendulum-v1", 3, seed=4)
    assert (env.id, env.obs_dim, env.act_dim, env.episode_len) == ("Pendulum-v1", 3, 1, 200)
    assert not env.can_checkpoint
    singles = [gymnasium.make("Pendulum-v1") for _ in range(3)]
    first = [single.reset(seed=4 + i)[0] for i, single in enumerate(singles)]
    np.testing.assert_array_equal(env.reset()[0].numpy(), np.stack(first))
    rng = np.random.default_rng(0)
    for step in range(200):
        action = rng.uniform(-1, 1, (3, 1)).astype(np.float32)
        expected = [single.step(2.0 * action[i]) for i, single in enumerate(singles)]
        obs, reward, terminated, truncated, info = env.step(torch.from_numpy(action))
        np.testing.assert_array_equal(info["next_obs"].numpy(), np.stack([e[0] for e in expected]))
        np.testing.assert_allclose(reward.numpy(), [e[1] for e in expected], rtol=1e-6)
        assert truncated.tolist() == [step == 199] * 3
        assert not terminated.any()
    assert not torch.equal(obs, info["next_obs"])
    assert torch.equal(env.current_obs, obs)
    with pytest.raises(NotImplementedError, match="cannot be checkpointed"):
        env.state()
    env.close()
    env.close()


def test_mountain_car() -> None:
    env = rlctl_envs.make("MountainCarContinuous-v0", 2, seed=0, episode_len=20, dtype=torch.float64)
    env.reset()
    for step in range(1, 41):
        obs, _, _, truncated, info = env.step(torch.ones(2, 1))
        assert bool(truncated.all()) is (step % 20 == 0)
        assert torch.equal((obs != info["next_obs"]).any(1), truncated)
    env.close()


def test_dict_observations_are_flattened_and_odd_actions_rescaled() -> None:
    env = rlctl_envs.make("TwoPart-v0", 2)
    assert (env.obs_dim, env.act_dim) == (3, 2)
    assert env.reset()[0].tolist() == [[7, 0, 2]] * 2
    assert env.step([[-1, 0], [1, 9]])[1].tolist() == [0, 4]  # type: ignore[arg-type]
    assert env.step(torch.tensor([[0.5, 0], [0, 0]]))[1].tolist() == [3, 2]
    obs, _, terminated, _, info = env.step(torch.zeros(2, 2))
    assert terminated.all()
    assert info["next_obs"].tolist() == [[7, 3, 2]] * 2
    assert obs.tolist() == [[7, 0, 2]] * 2
    with pytest.raises(ValueError, match="environment 1 is not finite"):
        env.step(torch.tensor([[0, 0], [float("nan"), 0]]))
    env.close()


def test_environments_that_do_not_fit() -> None:
    with pytest.raises(ValueError, match=r"CartPole-v1: actions are Discrete\(2\)"):
        rlctl_envs.make("CartPole-v1")
    with pytest.raises(ValueError, match="only Box"):
        rlctl_envs.make("FrozenLake-v1")
    with pytest.raises(ValueError, match="workers is 2"):
        rlctl_envs.make("Pendulum-v1", 3, workers=2)


def test_error_in_this_process_keeps_its_type() -> None:
    env = rlctl_envs.make("TwoPart-v0", 2, fail_at=2)
    env.reset()
    env.step(torch.zeros(2, 2))
    with pytest.raises(ZeroDivisionError, match="broken"):
        env.step(torch.zeros(2, 2))


@pytest.mark.timeout(60)
def test_workers_agree_and_a_killed_one_is_an_error() -> None:
    env = rlctl_envs.make("Pendulum-v1", 2, seed=0, workers=2)
    assert isinstance(env, GymnasiumVecEnv)
    sync = rlctl_envs.make("Pendulum-v1", 2, seed=0)
    assert torch.equal(env.reset()[0], sync.reset()[0])
    for _ in range(201):
        ours, theirs = env.step(torch.full((2, 1), 0.3)), sync.step(torch.full((2, 1), 0.3))
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[4]["next_obs"], theirs[4]["next_obs"])
    os.kill(env._envs.processes[1].pid, signal.SIGKILL)  # type: ignore[union-attr]
    start = time.monotonic()
    with pytest.raises(RuntimeError, match="worker 1 died with signal SIGKILL"):
        env.step(torch.zeros(2, 1))
    assert time.monotonic() - start < 20
    with pytest.raises(RuntimeError, match="closed"):
        env.step(torch.zeros(2, 1))
    env.close()


@pytest.mark.timeout(60)
@pytest.mark.filterwarnings("ignore:.*:UserWarning:gymnasium")  # Gymnasium prints the worker's traceback as warnings
def test_error_in_a_worker_is_reported() -> None:
    env = rlctl_envs.make("test_envs_adapter:TwoPart-v0", 1, workers=1, fail_at=2)
    env.reset()
    env.step(torch.zeros(1, 2))
    with pytest.raises(RuntimeError, match=r"ZeroDivisionError.*broken"):
        env.step(torch.zeros(1, 2))
    env.close()
