"""The page that shows a mixture policy's components: what it collects, and that it draws."""

from __future__ import annotations

from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

import rlctl_envs
from rlctl import agents
from rlctl.data.rollout import Rollout
from rlctl.errors import UsageError
from rlctl.run import Run
from rlctl.train import collect
from rlctl.types import Agent, Spec

SCRIPT = "plot_primitives"


def agent_for(env: Any, name: str = "pmoe-sac", **settings: Any) -> Agent:
    cfg = agents.get(name).Config(hidden=(16, 16), **settings)
    return agents.make(name, Spec(env.obs_dim, env.act_dim, env.num_envs, env.device, env.episode_len), cfg)


def test_visits_one_episode_per_world(script: ModuleType) -> None:
    env = rlctl_envs.make("Hopper", 3, seed=0)
    agent = agent_for(env, num_components=2)
    seen = script.visit(agent, env)
    lengths = np.bincount(seen.episode)
    assert len(lengths) == 3
    assert lengths.min() > 1
    assert seen.obs.shape == (lengths.sum(), env.obs_dim)
    assert seen.means.shape == (lengths.sum(), 2, env.act_dim)
    np.testing.assert_allclose(seen.weights.sum(1), 1, atol=1e-6)
    pi = agent.pi(torch.from_numpy(seen.obs))  # type: ignore[operator]
    np.testing.assert_allclose(seen.weights, pi.weights.detach().numpy(), atol=1e-6)
    np.testing.assert_allclose(seen.means, pi.components.mean.tanh().detach().numpy(), atol=1e-6)
    single = rlctl_envs.make("Hopper", 1, seed=0)
    alone = script.visit(agent, single)  # the first world of both starts from the same state
    np.testing.assert_array_equal(alone.obs[0], seen.obs[0])
    assert abs(len(alone.obs) - lengths[0]) <= 1


def test_a_policy_that_normalises_is_drawn_as_it_acts(script: ModuleType) -> None:
    """PMOE-PPO after an update: normalised observations, and means clipped as the environment clips actions."""
    env = rlctl_envs.make("Hopper", 4, seed=0)
    agent = agent_for(env, "pmoe-ppo", num_envs=4, horizon=16, minibatch_size=32, steps=1000)
    rollout, run = Rollout(16), Run()
    obs = run.begin(agent, run.stage(agent, "on_policy"), env=env, left=1000)
    for _ in range(16):
        obs = collect(agent, env, obs, rollout, run)
    agent.update(rollout.whole())
    with torch.no_grad():
        agent.pi.mean[-1].bias[:3] = torch.tensor([3.0, -3.0, 0.2])  # type: ignore[index, union-attr]
        weights, means = script.primitives(agent, obs)
        normal = agent.obs_norm(obs)  # type: ignore[operator]
        assert float((normal - obs).abs().max()) > 0.1  # the normaliser has moved
        pi, raw = agent.pi(normal), agent.pi(obs)  # type: ignore[operator]
        assert torch.equal(weights, pi.weights)
        assert not torch.allclose(weights, raw.weights, atol=1e-4)
        assert torch.equal(means, pi.components.mean.clamp(-1, 1))
        assert means[:, 0, :2].tolist() == [[1.0, -1.0]] * 4
        torch.testing.assert_close(agent.act(obs, explore=False)[0].clamp(-1, 1), means[range(4), weights.argmax(1)])


def test_a_policy_without_components_is_refused(script: ModuleType) -> None:
    env = rlctl_envs.make("Hopper", 1, seed=0)
    with pytest.raises(UsageError, match="the policy of SAC is no mixture"):
        script.primitives(agent_for(env, "sac"), torch.zeros(1, env.obs_dim))


def test_principal_plane(script: ModuleType) -> None:
    """Two independent directions, the rest constant: they span the plane, and hold all variance."""
    x = np.random.default_rng(0).normal(size=(500, 2))
    plane, share = script.principal_plane(np.concatenate([x, np.ones((500, 3))], 1))
    assert plane.shape == (500, 2)
    assert share.sum() == pytest.approx(1.0)
    np.testing.assert_allclose(np.corrcoef(plane.T)[0, 1], 0, atol=1e-6)
    rotated = np.linalg.lstsq(plane, x - x.mean(0), rcond=None)[0]
    np.testing.assert_allclose(plane @ rotated, x - x.mean(0), atol=1e-6)


def test_density(script: ModuleType) -> None:
    """One count of eight in a bin leaves a quarter of it in each neighbour; both edges of [-1, 1] belong to it."""
    heights = script.density(np.array([0.505] * 8 + [-1.0, 1.0]))
    assert heights[74:77].tolist() == pytest.approx([2**0.5, 2, 2**0.5])
    assert heights[[0, -1]].tolist() == pytest.approx([0.5**0.5] * 2)
    assert not script.density(np.array([])).any()


@pytest.mark.filterwarnings("error")
def test_draws_means_outside_the_axis(script: ModuleType, tmp_path: Path) -> None:
    """No count in any bin, and no division by their largest."""
    pytest.importorskip("matplotlib")
    seen = script.Primitives(np.eye(4), np.zeros(4, dtype=int), np.full((4, 2), 0.5), np.full((4, 2, 1), 7.0))
    script.draw(seen, "made up", tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000


@pytest.mark.parametrize(("num", "act_dim", "steps"), [(1, 1, 1), (2, 1, 5), (4, 6, 60)])
def test_draws_a_page(script: ModuleType, tmp_path: Path, num: int, act_dim: int, steps: int) -> None:
    pytest.importorskip("matplotlib")
    rng = np.random.default_rng(0)
    weights = rng.random((steps, num))
    seen = script.Primitives(
        rng.normal(size=(steps, 3)),
        np.zeros(steps, dtype=int),
        weights / weights.sum(1, keepdims=True),
        np.tanh(rng.normal(size=(steps, num, act_dim))),
    )
    script.draw(seen, "made up", tmp_path / "page.png")
    assert (tmp_path / "page.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"
    assert (tmp_path / "page.png").stat().st_size > 10_000
