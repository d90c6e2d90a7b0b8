"""Cal-QL: the floored gap by number, CQL as what is left without a floor, returns-to-go as its critics see them."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any

import pytest
import torch
from agent_helpers import Table, as_dataset, batch_for, differing, snapshot, tiny, transitions

from rlctl import agents
from rlctl.agents.cal_ql import CalQL
from rlctl.agents.cql import CQL, CQLConfig
from rlctl.data.dataset import Dataset
from rlctl.types import Batch


def cal_ql(**overrides: Any) -> CalQL:
    agent = tiny("cal-ql", **overrides)
    assert isinstance(agent, CalQL)
    return agent


def with_return(b: Batch, g: float) -> Batch:
    return b._replace(extra={**b.extra, "mc_return": torch.full_like(b.reward, g)})


@pytest.mark.parametrize(("floor", "known"), [(1.8, 3.1981958611), (-math.inf, 2.8919092898)])
def test_gap_by_number(double: None, floor: float, known: float) -> None:
    """A = 2: [1, 2] from the box untouched; [0, 2.5] from pi(s') and [.5, 1.5] from pi(s) floored; the data's not."""
    agent = cal_ql(num_actions=2)
    box = -2 * math.log(2)
    density = torch.tensor([[box, box, -0.5, 0.2, -1.0, 0.3]])
    agent.candidates = lambda b, noise=None: (torch.zeros(1, 6, 2), density)  # type: ignore[method-assign]
    agent.q = Table(torch.tensor([1.0, 2.0, 0.0, 2.5, 0.5, 1.5]).expand(2, 1, 6))  # type: ignore[assignment]
    batch = with_return(transitions(torch.Generator(), 1), floor)
    gap = agent.gap(batch, torch.tensor([[1.2], [1.2]]))
    assert gap.tolist() == pytest.approx([known, known], abs=1e-9)


def test_without_a_floor_it_is_cql_bit_for_bit() -> None:
    """Returns of -inf, or calibration switched off, against CQL of the same settings, over whole updates."""
    agent, off = cal_ql(lagrange_gap=0.5), cal_ql(lagrange_gap=0.5, calibrate=False)
    known = {f.name for f in fields(CQLConfig)}
    cfg = CQLConfig(**{k: v for k, v in vars(agent.cfg).items() if k in known})
    base = agents.make(CQL, agent.spec, cfg)
    for seed in range(5):
        batch = batch_for(agent, seed)
        for a, b in ((agent, with_return(batch, -math.inf)), (off, batch), (base, batch)):
            a.update(b)
    assert differing(agent, snapshot(base)) == []
    assert differing(off, snapshot(base)) == []
    agent.update(batch_for(agent, 9))
    base.update(batch_for(agent, 9))
    assert differing(agent, snapshot(base))


def test_under_a_high_floor_policy_actions_push_nothing(double: None) -> None:
    agent = cal_ql()
    batch = with_return(batch_for(agent), 1e6)
    actions, _ = agent.candidates(batch)
    actions.requires_grad_()
    values = agent.drawn_values(batch, actions)
    assert values.shape == (2, 32, 9)
    assert bool((values[..., 3:] == 1e6).all())
    (g,) = torch.autograd.grad(values.sum(), actions)
    assert bool((g[:, 3:] == 0).all())
    assert bool((g[:, :3] != 0).any())


def episode(rewards: list[float], cut: bool) -> Dataset:
    n = len(rewards)
    last = torch.arange(n) == n - 1
    rows = transitions(torch.Generator().manual_seed(0), n)
    flags = {"terminated": last & (not cut), "truncated": last & cut}
    return as_dataset(rows._replace(reward=torch.tensor(rewards), **flags))


def test_returns_are_of_the_rewards_the_critics_see() -> None:
    """Success [-5, -5, 5] after 10r - 5, gamma 0.99; a failure that was cut is worth -5 / (1 - gamma) all along."""
    agent = cal_ql(gamma=0.99, reward="10r-5", sparse=True)
    success, failure = episode([0.0, 0.0, 1.0], cut=False), episode([0.0] * 4, cut=True)
    for data, known in ((success, [-5.0495, -0.05, 5.0]), (failure, [-500.0] * 4)):
        agent.prepare(data)
        assert data.rows.extra["mc_return"].tolist() == pytest.approx(known, abs=1e-4)
    dense = cal_ql(gamma=0.5, reward="2r")
    cut = episode([1.0, 1.0, 1.0], cut=True)
    dense.prepare(cut)
    assert cut.rows.extra["mc_return"].tolist() == pytest.approx([3.5, 3.0, 2.0])


@pytest.mark.parametrize(("calibrate_online", "same"), [(True, False), (False, True)])
def test_calibration_online_is_a_choice(calibrate_online: bool, same: bool) -> None:
    agent, bare = cal_ql(calibrate_online=calibrate_online), cal_ql(calibrate=False)
    batch = with_return(batch_for(agent), 10.0)
    for a in (agent, bare):
        a.counters["env_steps"] = 1
        a.update(batch)
    assert (differing(agent, snapshot(bare)) == []) == same


def test_it_needs_its_column() -> None:
    agent = cal_ql()
    batch = batch_for(agent)
    with pytest.raises(ValueError, match="no column 'mc_return'"):
        agent.update(batch._replace(extra={}))
