"""Behaviour cloning: the loss by number, a perfect fit, the best episodes, both heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, as_dataset, batch_for, snapshot, tiny, transitions
from torch import Tensor

from rlctl import agents
from rlctl.agents.bc import BC, BCConfig
from rlctl.agents.td3bc import TD3BC
from rlctl.data.dataset import Dataset
from rlctl.run import Run
from rlctl.train import Job
from rlctl.types import Batch, Spec


def bc(**overrides: Any) -> BC:
    agent = tiny("bc", **overrides)
    assert isinstance(agent, BC)
    return agent


def test_loss_by_number(double: None) -> None:
    """Distances [.2, -.4], [-.5, 0], [0, -1]: 1.45 / 6."""
    agent = bc()
    agent.pi = Table(torch.tensor([[0.2, -0.4], [0.0, 0.5], [1.0, -1.0]]))  # type: ignore[assignment]
    action = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    batch = transitions(torch.Generator().manual_seed(0), 3)._replace(action=action)
    assert float(agent.actor_loss(batch)) == pytest.approx(0.4833333333 / 2, abs=1e-9)


def test_it_is_td3bc_without_the_value_term(double: None) -> None:
    agent, other = bc(), tiny("td3bc", alpha=0.0)
    assert isinstance(other, TD3BC)
    agent.pi.load_state_dict(other.pi.state_dict())
    batch = batch_for(agent)
    got = torch.autograd.grad(agent.actor_loss(batch), list(agent.pi.parameters()))
    for a, b in zip(got, torch.autograd.grad(other.actor_loss(batch), list(other.pi.parameters())), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-15)


@pytest.mark.parametrize("head", ["deterministic", "gaussian"])
def test_one_constant_action_is_learned_exactly(head: str) -> None:
    agent = bc(head=head, actor_lr=1e-2)
    batch = batch_for(agent)
    batch = batch._replace(action=torch.tensor([0.3, -0.7]).expand(32, 2))
    for _ in range(300):
        agent.update(batch)
    torch.testing.assert_close(
        agent.act(batch.obs, False)[0], batch.action, rtol=0, atol=0.02 if head == "deterministic" else 0.15
    )
    if head == "deterministic":
        assert float(agent.actor_loss(batch._replace(obs=agent.obs_norm(batch.obs))).detach()) < 1e-4


def test_the_gaussian_head_maximises_the_likelihood(double: None) -> None:
    agent = bc(head="gaussian")
    batch = batch_for(agent)
    loss = agent.actor_loss(batch)
    torch.testing.assert_close(loss, -agent.pi(batch.obs).log_prob(batch.action).mean())
    # an action at the edge of the box counts as 1 - 1e-5, by the density of the tanh of a Gaussian
    edge, pi = torch.full((32, 2), 1 - 1e-5), agent.pi(batch.obs).unsquashed
    density = torch.distributions.Normal(pi.mean, pi.log_std.exp()).log_prob(edge.atanh()) - (1 - edge.square()).log()
    torch.testing.assert_close(agent.actor_loss(batch._replace(action=torch.ones(32, 2))), -density.sum(-1).mean())


# ------------------------------------------------------------------------------------------------------- best episodes
def five_episodes() -> Dataset:
    """Lengths 4, 1, 3, 2, 5; returns 1, 9, 9, 0, 5; the observation tells the episode, the action its return."""
    lengths, returns = torch.tensor([4, 1, 3, 2, 5]), torch.tensor([1.0, 9.0, 9.0, 0.0, 5.0])
    episode = torch.arange(5).repeat_interleave(lengths)
    n = len(episode)
    rows = Batch(
        obs=episode[:, None].expand(n, 3).float(),
        action=(returns / 10)[episode][:, None].expand(n, 2).clone(),
        reward=(returns / lengths)[episode],
        next_obs=torch.zeros(n, 3),
        terminated=torch.zeros(n, dtype=torch.bool),
        truncated=torch.zeros(n, dtype=torch.bool),
    )
    return Dataset(rows, lengths.cumsum(0), id="five")


def learn(data: Dataset, **settings: Any) -> tuple[BC, list[Tensor]]:
    """Train as a run would; also the observations of every batch."""
    cfg = BCConfig(steps=30, batch_size=64, hidden=(16,), actor_lr=1e-2, normalize_obs=False, **settings)
    agent = agents.make(BC, Spec(3, 2), cfg)
    assert isinstance(agent, BC)
    seen: list[Tensor] = []
    update = agent.update

    def spy(b: Batch) -> Any:
        seen.append(b.obs[:, 0])
        return update(b)

    agent.update = spy  # type: ignore[method-assign]
    schedule = BC.schedule
    assert schedule is not None
    schedule(Job(agent, None, data, Run(), cfg))
    assert len(seen) == 30
    return agent, seen


def test_the_best_share_alone_is_imitated() -> None:
    _, seen = learn(five_episodes(), best_share=0.4)
    assert torch.cat(seen).unique().tolist() == [1.0, 2.0]
    _, seen = learn(five_episodes())
    assert torch.cat(seen).unique().tolist() == [0.0, 1.0, 2.0, 3.0, 4.0]


def test_statistics_are_those_of_the_episodes_imitated() -> None:
    data = five_episodes()
    agent = agents.make(BC, Spec(3, 2), BCConfig(hidden=(8,), best_share=0.4))
    assert isinstance(agent, BC)
    best = data.best_episodes(0.4)
    agent.prepare(best)
    assert agent.obs_norm.mean.tolist() == pytest.approx([(1 + 3 * 2) / 4] * 3)


def test_data_with_other_episodes_than_asked_for_is_refused() -> None:
    agent = agents.make(BC, Spec(3, 2), BCConfig(hidden=(8,), best_share=0.4))
    with pytest.raises(ValueError, match=r"best_share=0.4 .* data.best_episodes\(0.4\)"):
        agent.prepare(five_episodes())
    with pytest.raises(ValueError, match=r"best_share=1\.0"):
        bc().prepare(as_dataset(transitions(torch.Generator(), 20)).best_episodes(0.5))


def test_it_sees_observations_and_actions_alone() -> None:
    results = []
    for scale in (1.0, -7.0):
        agent = bc()
        for seed in range(3):
            b = batch_for(agent, seed)
            b = b._replace(reward=scale * b.reward, next_obs=scale * b.next_obs)
            agent.update(b if scale == 1 else b._replace(terminated=~b.terminated, truncated=~b.truncated))
        results.append(snapshot(agent))
    assert all(torch.equal(results[0][k], results[1][k]) for k in results[0])
