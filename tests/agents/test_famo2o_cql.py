"""FamO2O on CQL: which beta goes where, its losses by number, the official range, CQL as what is left of beta 1."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import (
    ACT_DIM,
    OBS_DIM,
    Table,
    batch_for,
    differing,
    recorded_inputs,
    silence,
    snapshot,
    tiny,
)
from torch import nn

from rlctl.agents.cql import CQL
from rlctl.agents.famo2o_cql import FamO2OCQL
from rlctl.nets import TanhGaussianPolicy
from rlctl.ops import adam
from rlctl.ops.balance import encoded
from rlctl.types import Batch


def famo2o(**overrides: Any) -> FamO2OCQL:
    agent = tiny("famo2o-cql", **overrides)
    assert isinstance(agent, FamO2OCQL)
    return agent


def told(b: Batch, beta: float = 1.0, balance: float = 1.0) -> Batch:
    like = torch.ones_like(b.reward)
    return b._replace(extra={"beta": beta * like, "balance": balance * like})


def test_range_and_the_official_one() -> None:
    x = torch.tensor([[-1.0], [-0.5], [1.0]])
    assert famo2o().span(x).tolist() == [0.5, 0.75, 1.5]
    assert famo2o(official_range=True).span(x).tolist() == [-0.5, 0.0, 1.5]
    with pytest.raises(ValueError, match="the second is smaller"):
        famo2o(beta_min=2.0, beta_max=1.0)


def test_actor_loss_by_number(double: None) -> None:
    """alpha 0.5, log-densities [1, 3], smaller values [1, -2], beta 1.5: 0.5 * 2 - 1.5 * (-0.5)."""
    agent = famo2o(alpha=0.5)
    agent.q = Table(torch.tensor([[1.0, 4.0], [3.0, -2.0]]))  # type: ignore[assignment]
    batch = told(batch_for(agent).map(lambda x: x[:2]), beta=1.5)
    loss = agent.actor_loss(batch, batch.action, torch.tensor([1.0, 3.0]))
    assert float(loss.detach()) == pytest.approx(1.75)
    balance = agent.balance_loss(batch, torch.ones(2))
    assert float(balance.detach()) == pytest.approx(0.5)


def test_with_beta_one_the_policy_s_loss_is_cql_s(double: None) -> None:
    agent = famo2o()
    batch = told(batch_for(agent))
    action, logp = agent.here(batch).sample_log_prob(generator=agent.rng["sample"])
    assert torch.equal(agent.actor_loss(batch, action, logp), CQL.actor_loss(agent, batch, action, logp))


@torch.no_grad()
def as_cql(agent: FamO2OCQL) -> CQL:
    """CQL with the same weights; the universal policy made blind to its coefficient."""
    c = agent.cfg
    shared = ("hidden", "layer_norm", "cql_weight", "simultaneous", "bc_share", "actor_lr", "critic_lr", "alpha_lr")
    other = tiny("cql", **{k: getattr(c, k) for k in shared})
    assert isinstance(other, CQL)
    other.pi = TanhGaussianPolicy(OBS_DIM, ACT_DIM, c.hidden, log_std_offset=-1.0)
    other.opt_pi = adam(other.pi.parameters(), c.actor_lr)
    for name in ("q", "q_lagged"):
        getattr(other, name).load_state_dict(getattr(agent, name).state_dict())
    weights = agent.pi.state_dict()
    first = next(k for k in weights if k.endswith("weight"))
    weights[first][:, OBS_DIM:] = 0.0
    other.pi.load_state_dict(weights | {first: weights[first][:, :OBS_DIM].clone()})
    return other


def test_a_single_beta_of_one_is_cql(double: None) -> None:
    """A whole update, from the draws on that CQL makes too; the six extra inputs of the policy aside."""
    agent = famo2o(beta_min=1.0, beta_max=1.0)
    other, batch, start = as_cql(agent), batch_for(agent), snapshot(agent)
    inner, rng = agent.balance_loss, agent.rng["sample"]

    def last_draw_of_its_own(*args: Any) -> torch.Tensor:
        loss = inner(*args)
        other.rng["sample"].set_state(rng.get_state())
        return loss

    agent.balance_loss = last_draw_of_its_own  # type: ignore[method-assign]
    agent.update(batch)
    other.update(batch)
    assert {"pi", "q", "log_alpha"} <= {k.split(".")[0] for k in differing(agent, start)}
    ours, theirs = agent.state_dict(), other.state_dict()
    assert {k.split(".")[0] for k in ours.keys() - theirs.keys()} == {"balance"}
    for k, x in theirs.items():
        mine = ours[k][:, :OBS_DIM] if ours[k].shape != x.shape else ours[k]
        torch.testing.assert_close(mine, x, rtol=1e-9, atol=1e-12, msg=lambda m, k=k: f"{k}: {m}")


def test_which_coefficient_the_policy_is_told() -> None:
    """At s that of the batch, at s' the balance policy's choice in s, for backup and penalty alike."""
    agent = famo2o()
    batch = told(batch_for(agent), beta=0.6, balance=1.4)
    seen = recorded_inputs(agent.pi)
    at_obs = torch.cat([batch.obs, encoded(batch.extra["beta"])], -1)
    at_next = torch.cat([batch.next_obs, encoded(batch.extra["balance"])], -1)
    agent.backup_of(batch)
    assert torch.equal(seen[-1][0], at_next)
    seen.clear()
    agent.candidates(batch)
    assert torch.equal(seen[0][0], at_next)
    assert torch.equal(seen[1][0], at_obs)


@pytest.mark.parametrize("online", [False, True])
def test_where_beta_comes_from(online: bool) -> None:
    """A uniform draw on data alone, the balance policy's online; the balance policy's is kept for s' either way."""
    agent = famo2o()
    agent.counters["env_steps"] = int(online)
    given: list[Batch] = []
    inner = agent.actor_loss
    agent.actor_loss = lambda b, *rest: (given.append(b), inner(b, *rest))[1]  # type: ignore[method-assign]
    agent.update(batch_for(agent))
    beta, balance = given[0].extra["beta"], given[0].extra["balance"]
    assert torch.equal(beta, balance) == online
    for x in (beta, balance):
        assert 0.5 <= float(x.min()) < float(x.max()) <= 1.5
        assert not x.requires_grad


OWNERS = {
    "balance_loss": {"balance"},
    "actor_loss": {"pi"},
    "alpha_loss": {"log_alpha"},
    "critic_loss": {"q", "q_lagged"},
    "conservative_loss": {"q", "q_lagged"},
}


@pytest.mark.parametrize("loss", OWNERS)
def test_each_loss_moves_its_own_networks(loss: str) -> None:
    """A whole update in which the other losses are times 0."""
    agent = famo2o()
    silence(agent, [name for name in OWNERS if name != loss])
    before = snapshot(agent)
    agent.update(batch_for(agent))
    assert {k.split(".")[0] for k in differing(agent, before)} == OWNERS[loss]


def test_networks_are_those_of_the_official_code() -> None:
    """LayerNorm before the activations of the critics; last layers of variance 0.01 / fan-in; log-std from -1."""
    agent = famo2o(hidden=(64, 64), critic_hidden=(64, 64))
    kinds = [type(m).__name__ for m in agent.q.members[0].children()]
    assert kinds == ["Linear", "LayerNorm", "ReLU"] * 2 + ["Linear"]
    for net in (agent.pi.net, agent.balance.net, agent.q.members[1]):
        last = list(net.children())[-1]  # type: ignore[union-attr]
        assert isinstance(last, nn.Linear)
        bound = (0.03 / 64) ** 0.5
        assert 0.8 * bound < float(last.weight.detach().abs().max()) <= bound
        assert not last.bias.any()
    log_std = agent.balance(torch.randn(20, 3)).log_std.detach()
    assert float((log_std + 1).abs().max()) < 0.2
