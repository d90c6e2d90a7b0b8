"""ODICE for imitation: no rewards, one trajectory, its own statistics."""

from __future__ import annotations

import pytest
import torch
from agent_helpers import OBS_DIM, as_dataset, batch_for, config, differing, snapshot, tiny, transitions

from rlctl import agents
from rlctl.agents.odice import ODICE
from rlctl.agents.odice_il import ODICEIL, imitate_one_trajectory
from rlctl.data.dataset import Dataset
from rlctl.errors import UsageError
from rlctl.run import Run
from rlctl.train import Job
from rlctl.types import Spec


def three_episodes() -> Dataset:
    """20, 30 and 25 steps, each with observations of its own scale."""
    rows = transitions(torch.Generator().manual_seed(2), 75)
    scale = torch.cat([torch.full((n,), s) for n, s in ((20, 1.0), (30, 10.0), (25, 100.0))])[:, None]
    return Dataset(rows._replace(obs=rows.obs * scale), torch.tensor([20, 50, 75]), id="three")


def run(trajectory: int, steps: int = 3) -> ODICEIL:
    cfg = config("odice-il", {"hidden": (8,), "v_hidden": (8,), "steps": steps, "trajectory": trajectory})
    agent = agents.make(ODICEIL, Spec(OBS_DIM, 2), cfg)
    assert isinstance(agent, ODICEIL)
    imitate_one_trajectory(Job(agent, None, three_episodes(), Run(), cfg))
    return agent


@pytest.mark.parametrize("trajectory", [0, 1, 2])
def test_it_learns_from_the_one_trajectory_named(trajectory: int) -> None:
    agent = run(trajectory)
    assert agent.counters["updates"] == 3
    start, stop = ((0, 20), (20, 50), (50, 75))[trajectory]
    obs = three_episodes().rows.obs[start:stop]
    torch.testing.assert_close(agent.obs_norm.mean, obs.mean(0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(agent.obs_norm.std, obs.std(0, correction=0), rtol=1e-5, atol=1e-5)


def test_a_trajectory_that_is_not_there() -> None:
    with pytest.raises(UsageError, match=r"trajectory=3.*'three' has 3.*0\.\.2"):
        run(3)


def test_one_episode_of_a_dataset() -> None:
    data = three_episodes()
    one = data.episode(1)
    assert len(one) == 30
    assert one.episode_ends.tolist() == [30]
    for name, x in one.rows.tensors().items():
        assert torch.equal(x, data.rows.tensors()[name][20:50])
    assert torch.equal(one.episode_returns(), data.episode_returns()[1:2])
    assert not set(one.sample(100).reward.tolist()) - set(data.rows.reward[20:50].tolist())
    assert torch.equal(one.rows.next_obs[-1], data.rows.next_obs[49])  # the true successor, not the next episode
    for index in (-1, 3):
        with pytest.raises(IndexError, match=r"0\.\.2"):
            data.episode(index)


def test_it_is_odice_on_rewards_of_zero() -> None:
    agent = tiny("odice-il")
    peer = agents.make(ODICE, agent.spec, agent.cfg)
    peer.prepare(as_dataset(transitions(torch.Generator().manual_seed(123), 200)))
    for seed in range(3):
        b = batch_for(agent, seed)
        agent.update(b)
        peer.update(b._replace(reward=torch.zeros_like(b.reward)))
    assert differing(agent, snapshot(peer)) == []


def test_defaults_of_the_official_runs() -> None:
    cfg = ODICEIL.Config()
    assert (cfg.lam, cfg.eta, cfg.v_lr, cfg.actor_lr, cfg.steps) == (0.4, 1.0, 1e-4, 1e-4, 500_000)
    assert (cfg.layer_norm, cfg.tanh_mean, cfg.num_v, cfg.normalize_obs) == (False, True, 2, True)
