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
from rlctl.errors import UsageError
from rlctl.types import Agent, Spec

SCRIPT = "plot_primitives"


def agent_for(env: Any, name: str = "pmoe-sac", **settings: Any) -> Agent:
    cfg = agents.get(name).Config(hidden=(16, 16), **settings)
    return agents.make(name, Spec(env.obs_dim, env.act_dim, 1, env.device, env.episode_len), cfg)


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
