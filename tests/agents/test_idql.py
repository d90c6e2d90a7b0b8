"""IDQL and IFQL: the values of IQL, a policy that only clones, the choice among its draws."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, differing, snapshot, tiny, transitions, xavier_uniform
from torch import nn

from rlctl import agents
from rlctl.agents.idql import IDQL
from rlctl.agents.ifql import IFQLConfig
from rlctl.nets import DiffusionPolicy, FieldResNet, FlowPolicy
from rlctl.ops import minimize, polyak
from rlctl.types import Batch, Spec

both = pytest.mark.parametrize("name", ["idql", "ifql"])


def idql(name: str = "idql", **overrides: Any) -> IDQL:
    agent = tiny(name, **overrides)
    assert isinstance(agent, IDQL)
    return agent


def rows(n: int) -> Batch:
    return transitions(torch.Generator().manual_seed(0), n)


@pytest.mark.parametrize(("expectile", "known"), [(0.7, 1.0916666667), (0.9, 1.3083333333)])
def test_value_loss_by_number(double: None, expectile: float, known: float) -> None:
    """Errors [-1, 0.5, 2] of V below the smaller lagged critic."""
    agent = idql(expectile=expectile)
    agent.q_lagged = Table(torch.tensor([[1.0, 2.0, 3.0], [4.0, 1.5, 5.0]]))  # type: ignore[assignment]
    agent.v = Table(torch.tensor([2.0, 1.0, 1.0]))  # type: ignore[assignment]
    assert float(agent.value_loss(rows(3))) == pytest.approx(known, abs=1e-9)


def test_critic_loss_by_hand(double: None) -> None:
    """y = r + 0.9 (1 - terminated) V(s') = [1.9, 2, 0.3]; no action of the policy is asked for."""
    agent = idql(gamma=0.9)
    agent.v = v = Table(torch.tensor([1.0, 5.0, -3.0]))  # type: ignore[assignment]
    values = torch.tensor([[3.0, 2.5, 2.0], [4.0, 0.0, 3.0]])
    agent.q = Table(values)  # type: ignore[assignment]
    batch = rows(3)._replace(
        reward=torch.tensor([1.0, 2.0, 3.0]),
        terminated=torch.tensor([False, True, False]),
        truncated=torch.tensor([True, False, False]),
    )
    error = values - torch.tensor([1.9, 2.0, 0.3])
    assert float(agent.critic_loss(batch)) == pytest.approx(float(error.square().mean(1).sum()), abs=1e-12)
    assert torch.equal(v.seen[0][0], batch.next_obs)


@both
def test_no_value_has_a_part_in_the_policy(name: str) -> None:
    """Whatever the rewards, the policy is the same."""
    agents = idql(name), idql(name)
    for seed in range(3):
        batch = batch_for(agents[0], seed)
        for agent, scale in zip(agents, (1.0, -7.0), strict=True):
            agent.update(batch._replace(reward=scale * batch.reward))
    assert differing(agents[0].slow, snapshot(agents[1].slow)) == []
    assert differing(agents[0].q, snapshot(agents[1].q))


@both
def test_one_candidate_is_behaviour_cloning(name: str) -> None:
    agent, obs = idql(name, num_candidates=1), torch.randn(5, 3)
    noise = torch.Generator()
    noise.set_state(agent.rng["action"].get_state())
    expected = agent.slow.sample(obs, 1, generator=noise)[:, 0]
    assert torch.equal(agent.act(obs, explore=True)[0], expected)


@both
def test_the_best_candidate_is_taken(name: str) -> None:
    agent, obs = idql(name, num_candidates=16), torch.randn(5, 3)
    noise = torch.Generator()
    noise.set_state(agent.rng["action"].get_state())
    drawn = agent.slow.sample(obs, 16, generator=noise)
    q = agent.q_lagged(obs, drawn).amin(0)
    best = drawn[torch.arange(5), q.argmax(-1)]
    assert torch.equal(agent.act(obs, explore=True)[0], best)


def test_the_implicit_policy_by_number(double: None) -> None:
    """Weights tau above V, 1 - tau below: at tau 0.8 one good candidate of four is drawn with chance 0.8 / 1.4."""
    agent = idql(implicit_policy=True, num_candidates=4, expectile=0.8)
    good = torch.tensor([-1.0, 2.0, -0.5, -3.0]).expand(4000, 4)
    agent.q_lagged = Table(torch.stack([good, good + 1]))  # type: ignore[assignment]
    agent.v = Table(torch.zeros(4000))  # type: ignore[assignment]
    obs = torch.zeros(4000, 3)
    assert agent.weights(agent.adv(obs, torch.zeros(4000, 4, 2)))[0].tolist() == pytest.approx([0.2, 0.8, 0.2, 0.2])
    noise = torch.Generator()
    noise.set_state(agent.rng["action"].get_state())
    candidates = agent.slow.sample(obs, 4, generator=noise)
    chosen = agent.act(obs, explore=True)[0]
    share = float((chosen == candidates[:, 1]).all(-1).double().mean())
    assert share == pytest.approx(0.8 / 1.4, abs=0.03)


def test_how_the_networks_of_ifql_begin() -> None:
    """All Xavier-uniform; the layer norms of critics and V follow their activations."""
    agent = agents.make("ifql", Spec(3, 2), IFQLConfig(hidden=(64, 64), critic_hidden=(64,)))
    assert isinstance(agent, IDQL)
    for net in (agent.slow.policy, agent.q, agent.v):
        assert xavier_uniform(net)
    for member in (*agent.q.members, agent.v.net):
        kinds = [nn.Linear, nn.GELU, nn.LayerNorm, nn.Linear]
        assert [isinstance(m, k) for m, k in zip(member, kinds, strict=True)] == [True] * 4
    assert not any(isinstance(m, nn.LayerNorm) for m in idql("idql").q.modules())


@both
def test_the_order_of_an_update(name: str) -> None:
    agent, twin = idql(name), idql(name)
    for seed in range(2):
        batch = batch_for(agent, seed)
        agent.update(batch)
        for loss, opt in (
            (twin.value_loss, twin.opt_v),
            (twin.critic_loss, twin.opt_q),
            (twin.actor_loss, twin.opt_pi),
        ):
            minimize(loss(batch), opt)
        twin.slow.update(seed + 1)
        polyak(twin.q, twin.q_lagged, twin.cfg.tau)
    assert differing(agent, snapshot(twin)) == []


def test_the_policies_are_those_of_the_papers() -> None:
    policy = idql().slow.policy
    assert isinstance(policy, DiffusionPolicy)
    assert isinstance(policy.net, FieldResNet)
    assert policy.clip_states
    beta = 1 - policy.alpha_bar[1:] / policy.alpha_bar[:-1]
    torch.testing.assert_close(policy.std[:-1], beta.flip(0)[:-1].sqrt())
    assert isinstance(idql("ifql").slow.policy, FlowPolicy)
