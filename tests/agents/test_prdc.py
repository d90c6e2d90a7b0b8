"""PRDC: keys, the regulariser by hand, its limits in beta, what an update touches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import (
    ACT_DIM,
    OBS_DIM,
    NoHostReads,
    Table,
    as_dataset,
    batch_for,
    differing,
    recorded_inputs,
    snapshot,
    tiny,
    transitions,
)
from torch import Tensor

from rlctl import agents
from rlctl.agents.prdc import PRDC, PRDCConfig
from rlctl.agents.td3bc import TD3BC, TD3BCConfig
from rlctl.types import Batch, Spec

SIZES: dict[str, Any] = {"hidden": (16, 16), "batch_size": 32}


def rows(seed: int = 0, n: int = 300) -> Batch:
    return transitions(torch.Generator().manual_seed(seed), n)


def prdc(data: Batch | None = None, **overrides: Any) -> PRDC:
    agent = agents.make(PRDC, Spec(OBS_DIM, ACT_DIM), PRDCConfig(**(SIZES | overrides)))
    assert isinstance(agent, PRDC)
    agent.prepare(as_dataset(rows() if data is None else data))
    return agent


def slow_nearest_action(agent: PRDC, data: Batch, obs: Tensor, action: Tensor, k: int = 1) -> Tensor:
    """By a loop over queries, in float64; `obs` z-scored."""
    beta, state = agent.cfg.beta, agent.obs_norm(data.obs)
    out = []
    for s, a in zip(obs.double(), action.detach().double(), strict=True):
        distance = beta**2 * (s - state).square().sum(-1) + (a - data.action).square().sum(-1)
        out.append(data.action[distance.argsort()[k - 1]])
    return torch.stack(out)


@pytest.mark.parametrize("neighbours", ["tree", "matrix"])
@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 2.0, 7.5])
def test_the_nearest_pair_of_the_data(neighbours: str, beta: float) -> None:
    """Observations are z-scored before they are weighed, in the table as in the question."""
    data = rows()
    data = data._replace(obs=data.obs * torch.tensor([9.0, 0.1, 1.0]) + 5)
    agent = prdc(data, beta=beta, neighbours=neighbours)
    obs, action = agent.obs_norm(data.obs[50:90]), rows(1, 40).action
    assert torch.equal(agent.nearest_action(obs, action), slow_nearest_action(agent, data, obs, action))


@pytest.mark.parametrize("neighbours", ["tree", "matrix"])
def test_k_means_the_kth_alone(neighbours: str) -> None:
    data = rows()
    agent = prdc(data, k=3, neighbours=neighbours)
    obs, action = agent.obs_norm(data.obs[:20]), rows(1, 20).action
    found = agent.nearest_action(obs, action)
    assert torch.equal(found, slow_nearest_action(agent, data, obs, action, k=3))
    assert not torch.equal(found, slow_nearest_action(agent, data, obs, action))


def test_the_key_by_number() -> None:
    agent = prdc(beta=7.5)
    key = agent.key(torch.tensor([[0.6, 0.2, -1.0]]), torch.tensor([[0.45, 0.5]]))
    torch.testing.assert_close(key, torch.tensor([[4.5, 1.5, -7.5, 0.45, 0.5]]))


# ---------------------------------------------------------------------------------------------------------- actor loss
def test_actor_loss_and_its_gradient_by_hand(double: None) -> None:
    """Value term as in TD3+BC (lambda 1.25), regulariser 2 (pi - a_nn) / (B A), nothing through the neighbour."""
    agent = prdc(alpha=2.5)
    q = torch.tensor([[1.0, -2.0, 3.0], [9.0, 9.0, 9.0]]).requires_grad_()
    action = torch.tensor([[0.2, -0.4], [0.0, 0.5], [1.0, -1.0]]).requires_grad_()
    near = torch.tensor([[0.0, 0.0], [0.5, 0.5], [1.0, 0.0]])
    agent.q, agent.pi = Table(q), Table(action)  # type: ignore[assignment]
    agent.nearest_action = lambda obs, a, row=None: near  # type: ignore[method-assign]
    loss = agent.actor_loss(rows(3, 3))
    assert float(loss.detach()) == pytest.approx(-0.5916666667, abs=1e-10)
    g_q, g_action = torch.autograd.grad(loss, [q, action])
    torch.testing.assert_close(g_q, torch.tensor([[-1.25 / 3] * 3, [0.0] * 3]))
    torch.testing.assert_close(g_action, 2 * (action.detach() - near) / 6)


def regulariser(agent: PRDC, b: Batch) -> float:
    """What is left of the actor's loss when the critics say nothing."""
    agent.q = Table(torch.zeros(2, len(b.reward)))  # type: ignore[assignment]
    return float(agent.actor_loss(b).detach())


def test_a_pair_of_the_data_costs_nothing() -> None:
    """The policy's actions put into the data, in the batch's states: the distance to the data is 0."""
    agent, data = prdc(), rows()
    obs = agent.obs_norm(data.obs)
    with torch.no_grad():
        data = data._replace(action=agent.pi(obs))
    agent.prepare(as_dataset(data))
    b = data._replace(obs=obs).map(lambda x: x[:32])
    assert regulariser(agent, b) == pytest.approx(0.0, abs=1e-12)
    assert regulariser(prdc(), b) > 1e-4  # other data, same states


def test_with_beta_zero_actions_alone_count() -> None:
    agent, data = prdc(beta=0.0), rows()
    with torch.no_grad():
        data.action[7] = agent.pi(agent.obs_norm(data.obs[:1]))[0]  # the action of state 0, stored in another state
    agent.prepare(as_dataset(data))
    b = data._replace(obs=agent.obs_norm(data.obs)).map(lambda x: x[:1])
    assert regulariser(agent, b) == pytest.approx(0.0, abs=1e-12)
    far = prdc(data, beta=50.0)
    assert regulariser(far, b) > 1e-4


@pytest.mark.parametrize("neighbours", ["shortlist", "tree", "matrix"])
def test_large_beta_is_td3bc_bit_for_bit(neighbours: str) -> None:
    """On states that occur once, the nearest pair is the batch's own: same weights after many updates."""
    data = rows()
    ours = prdc(data, beta=1e4, neighbours=neighbours)
    theirs = agents.make(TD3BC, Spec(OBS_DIM, ACT_DIM), TD3BCConfig(**SIZES))
    theirs.prepare(as_dataset(data))
    g = torch.Generator().manual_seed(8)
    for _ in range(10):
        index = torch.randint(300, (32,), generator=g)
        b = data.map(lambda x: x[index])._replace(extra={"row": index})  # noqa: B023 - called at once
        metrics, expected = ours.update(b), theirs.update(b)
        assert metrics.keys() == expected.keys()
        assert all(torch.equal(metrics[k], expected[k]) for k in metrics)
    assert differing(ours, snapshot(theirs)) == []
    moderate = prdc(data, beta=0.5)
    for _ in range(2):
        moderate.update(data.map(lambda x: x[:32]))
    assert differing(moderate.pi, snapshot(prdc(data, beta=1e4).pi))


def test_a_small_beta_differs_from_td3bc() -> None:
    data, losses = rows(), []
    for beta in (0.5, 1e4):
        agent = prdc(data, beta=beta)
        losses.append(regulariser(agent, data._replace(obs=agent.obs_norm(data.obs))))
    assert losses[0] < losses[1]  # a wider choice of neighbours can only bring the data nearer


# -------------------------------------------------------------------------------------------------------------- update
def test_the_matrix_search_reads_nothing_on_the_host() -> None:
    agent = tiny("prdc", neighbours="matrix")
    assert agent.host_reads == ""
    batches = [batch_for(agent, seed) for seed in range(4)]
    with NoHostReads():
        for b in batches:
            agent.update(b)


@pytest.mark.parametrize("neighbours", ["shortlist", "tree", "matrix"])
def test_more_neighbours_than_rows_are_refused_before_training(neighbours: str) -> None:
    prdc(rows(n=20), neighbours=neighbours, k=20)
    with pytest.raises(ValueError, match=r"k=21: .* has 20 rows"):
        prdc(rows(n=20), neighbours=neighbours, k=21)


def test_the_tree_says_that_it_reads() -> None:
    assert "tree" in tiny("prdc", neighbours="tree").host_reads


def test_both_searches_learn_the_same() -> None:
    ours, theirs = prdc(neighbours="tree"), prdc(neighbours="matrix")
    for seed in range(4):
        b = rows(seed, 32)
        ours.update(b), theirs.update(b)
    assert differing(ours, snapshot(theirs)) == []


def test_the_search_is_asked_on_actor_steps_alone() -> None:
    """It is the expensive part: every `policy_every`-th update."""
    agent = prdc(policy_every=3)
    asked = []
    inner = agent.nearest_action
    agent.nearest_action = lambda *args: asked.append(agent.counters["updates"]) or inner(*args)  # type: ignore
    for seed in range(7):
        agent.update(rows(seed, 32))
    assert asked == [3, 6]


def test_every_network_sees_z_scored_observations() -> None:
    data = rows()
    data = data._replace(obs=data.obs * 20 + 7, next_obs=data.next_obs * 20 + 7)
    agent = prdc(data)
    seen = {n: recorded_inputs(getattr(agent, n)) for n in ("pi", "q", "pi_lagged", "q_lagged")}
    b = data.map(lambda x: x[:32])
    agent.update(b), agent.update(b)
    mean, std = data.obs.mean(0), data.obs.std(0, correction=0) + 1e-3
    for name, x in (("pi", b.obs), ("q", b.obs), ("pi_lagged", b.next_obs), ("q_lagged", b.next_obs)):
        for inputs in seen[name]:
            torch.testing.assert_close(inputs[0], (x - mean) / std, rtol=1e-3, atol=1e-3)
    agent.act(b.obs, explore=False)
    torch.testing.assert_close(seen["pi"][-1][0], (b.obs - mean) / std, rtol=1e-3, atol=1e-3)


def test_without_normalisation_raw_observations_are_indexed() -> None:
    data = rows()
    agent = prdc(data, normalize_obs=False, beta=1.0)
    obs, action = data.obs[:20] + 0.3, rows(1, 20).action
    distance = (torch.cat([obs, action], -1)[:, None] - torch.cat([data.obs, data.action], -1)).square().sum(-1)
    assert torch.equal(agent.nearest_action(obs, action), data.action[distance.argmin(-1)])


def test_update_before_prepare_is_an_error() -> None:
    agent = agents.make(PRDC, Spec(OBS_DIM, ACT_DIM), PRDCConfig(**SIZES, policy_every=1))
    with pytest.raises(RuntimeError, match="prepare"):
        agent.update(rows(0, 8))


def test_the_index_is_no_part_of_the_checkpoint() -> None:
    assert {k.split(".")[0] for k in prdc().state_dict()} == {"pi", "q", "pi_lagged", "q_lagged", "obs_norm", "reward"}


def test_the_lists_change_nothing_but_the_time() -> None:
    """Batches of a dataset, which carry their rows, and rows of an environment among them: the tree's weights."""
    data = as_dataset(rows())
    ours, theirs = (
        agents.make(PRDC, Spec(OBS_DIM, ACT_DIM), PRDCConfig(**SIZES, neighbours=n)) for n in ("auto", "tree")
    )
    for agent in (ours, theirs):
        agent.prepare(data)
    assert type(ours.index).__name__ == "Shortlist"  # type: ignore[union-attr]
    _, extra = ours.act(torch.zeros(8, OBS_DIM), explore=True)
    assert extra["row"].tolist() == [-1] * 8
    for seed in range(6):
        b = data.sample(32)
        b.extra["row"][:8] = -1  # type: ignore[index]
        online = b._replace(obs=torch.cat([rows(seed, 8).obs, b.obs[8:]]))
        ours.update(online)
        theirs.update(online)
    assert differing(ours, snapshot(theirs)) == []
    assert data.requests == {}  # an environment's episodes have no row to be asked for
