"""What offline learners log beside their losses: the numbers that the losses have computed anyway."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from agent_helpers import Table, batch_for, tiny

from rlctl.agents.offline_learner import note

LOGGED = {
    "td3bc": {"value/q", "value/q_pi", "losses/regulariser"},
    "prdc": {"value/q", "value/q_pi", "losses/regulariser"},
    "a2pr": {"value/q", "value/q_pi", "value/v", "losses/regulariser", "value/cloned_share"},
    "rebrac": {"value/q", "value/q_pi", "losses/regulariser"},
    "iql": {"value/q", "value/v", "value/capped_share"},
    "famo2o-iql": {"value/q", "value/q_pi", "value/v", "value/capped_share"},
    "awac": {"value/q", "value/q_pi", "value/capped_share"},
    "odice": {"value/v", "value/cloned_share", "value/capped_share"},
    "odice-il": {"value/v", "value/cloned_share", "value/capped_share"},
    "cql": {"value/q", "value/q_pi", "losses/conservative_gap"},
    "cal-ql": {"value/q", "value/q_pi", "losses/conservative_gap"},
    "famo2o-cql": {"value/q", "value/q_pi", "losses/conservative_gap"},
    "edac": {"value/q", "value/q_pi"},
    "idql": {"value/q", "value/v"},
    "diffusion-ql": {"value/q", "value/q_pi"},
    "fql": {"value/q", "value/q_pi"},
}


@pytest.mark.parametrize("name", LOGGED)
def test_every_update_logs_what_to_find_out_with(name: str) -> None:
    agent, metrics = tiny(name), {}
    for seed in range(4):
        metrics = agent.update(batch_for(agent, seed))
    assert LOGGED[name] <= metrics.keys()
    for x in metrics.values():
        assert x.shape == ()
        assert not x.requires_grad


def logged(name: str, tables: dict[str, torch.Tensor], **overrides: Any) -> dict[str, float]:
    """Metrics of an update whose networks `tables` say the same everywhere; what their losses would move stays."""
    agent: Any = tiny(name, **overrides)
    b = agent.seen(batch_for(agent).map(lambda x: x[:2]))
    for net, out in tables.items():
        setattr(agent, net, Table(out))
    log: dict[str, torch.Tensor] = {}
    if name == "iql":
        q = agent.q_data(b)
        agent.value_loss(b, q, log), agent.actor_loss(b, q, log), agent.critic_loss(b, log)
    else:
        agent.critic_loss(b, log=log), agent.actor_loss(b, log=log)
    return {k: float(x) for k, x in log.items()}


def test_the_numbers_of_td3bc(double: None) -> None:
    """Both critics count at the data's actions, the first at the policy's, as in the losses."""
    q = torch.tensor([[1.0, 2.0], [5.0, 6.0]])
    agent = tiny("td3bc")
    b = batch_for(agent).map(lambda x: x[:2])
    found = logged("td3bc", {"q": q, "pi": b.action + torch.tensor([0.5, -0.1])})
    assert found == pytest.approx({"value/q": 3.5, "value/q_pi": 1.5, "losses/regulariser": (0.25 + 0.01) / 2})


def test_the_numbers_of_iql(double: None) -> None:
    """Advantages [2, 0] at beta 3: exp(6) is over the bound of 100, exp(0) is not."""
    q = torch.tensor([[2.5, 0.5], [3.0, 9.0]])
    found = logged("iql", {"q": q + 1, "q_lagged": q, "v": torch.tensor([0.5, 0.5])}, beta=3.0)
    assert found == pytest.approx({"value/q": 4.75, "value/v": 0.5, "value/capped_share": 0.5})


def test_a_loss_without_a_log_is_the_same() -> None:
    note(None, "value/q", torch.ones(3))
    agent: Any = tiny("td3bc")
    log: dict[str, torch.Tensor] = {}
    b = batch_for(agent)
    assert torch.equal(agent.actor_loss(b), agent.actor_loss(b, log))
    assert log.keys() == {"value/q_pi", "losses/regulariser"}
