"""Columns on request, and reward transforms."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from dataset_files import Write, episode
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from rlctl.agents.td3bc import TD3BC, TD3BCConfig
from rlctl.config import build
from rlctl.data import Mix, RewardTransform, Ring, columns
from rlctl.data.dataset import Dataset, load_dataset
from rlctl.data.reward import return_range
from rlctl.errors import UsageError
from rlctl.types import Batch, Spec


def dataset(reward: list[float], ends: list[int], terminated: list[int] = (), view: Any = "exact") -> Dataset:  # type: ignore[assignment]
    m = len(reward)
    obs = torch.arange(float(m))[:, None]
    term = torch.zeros(m, dtype=torch.bool)
    term[list(terminated)] = True
    trunc = torch.zeros(m, dtype=torch.bool)
    trunc[[e - 1 for e in ends]] = True
    rows = Batch(obs, -obs, torch.tensor(reward), obs + 1, term, trunc & ~term)
    return Dataset(rows, torch.tensor(ends), id="t", view=view)


# ------------------------------------------------------------------------------------------------------------- columns
def test_monte_carlo_fixtures() -> None:
    """Section 6, F6: a success, and a failed sparse trajectory."""
    success = dataset([-5.0, -5.0, 5.0], [3], [2]).require("mc_return", gamma=0.99)
    np.testing.assert_allclose(success.rows.extra["mc_return"], [-5.0495, -0.05, 5.0], atol=1e-5)
    failure = dataset([-5.0] * 700, [700]).require("mc_return", gamma=0.99, extend_truncated=True)
    np.testing.assert_allclose(failure.rows.extra["mc_return"], np.full(700, -500.0), rtol=1e-5)
    # only what was cut goes on for ever
    ended = dataset([-5.0] * 3, [3], [2]).require("mc_return", gamma=0.99, extend_truncated=True)
    np.testing.assert_allclose(ended.rows.extra["mc_return"], [-14.8505, -9.95, -5.0], rtol=1e-6)


def test_monte_carlo_of_transformed_rewards() -> None:
    """The critic's scale: 0 and 1 become -5 and 5."""
    data = dataset([0.0, 0.0, 1.0], [3], [2]).require("mc_return", gamma=0.99, reward=RewardTransform("10r-5"))
    np.testing.assert_allclose(data.rows.extra["mc_return"], [-5.0495, -0.05, 5.0], atol=1e-5)
    assert data.rows.reward.tolist() == [0, 0, 1]


@settings(max_examples=50, deadline=None)
@given(
    steps=st.lists(st.integers(1, 9), min_size=1, max_size=7),
    gamma=st.sampled_from([0.0, 0.5, 0.97]),
    seed=st.integers(0, 99),
)
def test_columns_against_a_slow_reference(steps: list[int], gamma: float, seed: int) -> None:
    ends = torch.tensor(steps).cumsum(0)
    m = int(ends[-1])
    reward = torch.randn(m, generator=torch.Generator().manual_seed(seed))
    action = torch.arange(2.0 * m).reshape(m, 2)
    time, following, known, total, goes = [], [], [], [], []
    for n, end in zip(steps, ends.tolist(), strict=True):
        for t in range(n):
            row = end - n + t
            time.append(t)
            following.append(action[min(row + 1, end - 1)])
            known.append(t < n - 1)
            total.append(float(reward[end - n : end].double().sum()))
            goes.append(sum(gamma**k * float(reward[row + k]) for k in range(end - row)))
    assert columns.timestep(ends).tolist() == time
    got, has = columns.next_action(action, ends)
    torch.testing.assert_close(got, torch.stack(following))
    assert has.tolist() == known
    np.testing.assert_allclose(columns.episode_return(reward, ends), total, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(columns.mc_return(reward, ends, gamma), goes, rtol=1e-5, atol=1e-6)


def test_columns_come_with_every_batch_and_leave_the_fingerprint_alone() -> None:
    data = dataset([1.0, 2, 3, 4], [2, 4])
    before = data.sha256
    assert data.require("timestep", "next_action", "episode_return") is data
    batch = data.sample(50)
    assert set(batch.extra) == {"timestep", "next_action", "has_next_action", "episode_return"}
    first = batch.extra["timestep"] == 0
    torch.testing.assert_close(batch.extra["next_action"][first], batch.action[first] - 1)
    assert torch.equal(batch.extra["has_next_action"], first)
    del data.__dict__["sha256"]
    assert data.sha256 == before


def test_column_errors() -> None:
    data = dataset([1.0, 2], [2])
    with pytest.raises(ValueError, match="no column 'mc_returns': did you mean 'mc_return'"):
        data.require("mc_returns")
    with pytest.raises(ValueError, match="needs gamma"):
        data.require("mc_return")
    with pytest.raises(ValueError, match="gamma < 1"):
        data.require("mc_return", gamma=1.0, extend_truncated=True)


# -------------------------------------------------------------------------------------------------------------- reward
@pytest.mark.parametrize(
    ("name", "zero", "one"),
    [
        ("none", 0, 1),
        ("r-1", -1, 0),  # IQL
        ("4r-2", -2, 2),  # CQL
        ("10r-5", -5, 5),  # Cal-QL
        ("10000r-1", -1, 9999),  # PRDC
        ("100r", 0, 100),  # ReBRAC
        ("3r-3", -3, 0),  # ODICE
        ("10r+5", 5, 15),
        (".5r+.25", 0.25, 0.75),
    ],
)
def test_formulas(name: str, zero: float, one: float) -> None:
    transform = RewardTransform(name)
    seen = transform(torch.tensor([0.0, 1.0]))
    assert seen.tolist() == [zero, one]
    assert transform.inverse(seen).tolist() == [0, 1]
    assert transform.describe().startswith(f"{name}: ")


@pytest.mark.parametrize("name", ["", "10", "r*2", "return_range", "r--1", "10r-"])
def test_unknown_transforms(name: str) -> None:
    with pytest.raises(ValueError, match="no reward transform"):
        RewardTransform(name)
    with pytest.raises(UsageError, match=r"reward=.*no reward transform"):
        build(TD3BCConfig, {"reward": name}, "the config of td3bc")


def test_return_range_and_standardise() -> None:
    data = dataset([1.0, 2, 3, 4, 10], [2, 4, 5])  # returns 3, 7, 10
    t = RewardTransform("return-range")
    t.fit(data)
    np.testing.assert_allclose(t(data.rows.reward), data.rows.reward.numpy() * 1000 / 7, rtol=1e-6)
    assert t.describe() == "return-range: 142.857147 * r + 0"
    t = RewardTransform("standardise")
    t.fit(data)
    seen = t(data.rows.reward)
    assert float(seen.mean()) == pytest.approx(0, abs=1e-6)
    assert float(seen.std(correction=0)) == pytest.approx(1, abs=1e-6)
    for name in ("return-range", "standardise"):
        with pytest.raises(ValueError, match="do not vary"):
            RewardTransform(name).fit(dataset([1.0, 1], [1, 2]))
        with pytest.raises(ValueError, match="do not vary"):  # but for the rounding
            RewardTransform(name).fit(dataset([100.0, 100 + 5e-6], [1, 2]))


def test_return_range_of_published_code() -> None:
    """Windows of terminal-or-limit over the filtered rows; a rest that neither ends nor fills a window is left out."""

    def slow(reward: list[float], terminated: set[int], window: int) -> tuple[float, float]:
        returns, total, length = [], 0.0, 0
        for i, r in enumerate(reward):
            total, length = total + r, length + 1
            if i in terminated or length == window:
                returns.append(total)
                total, length = 0.0, 0
        return min(returns), max(returns)

    rng = np.random.default_rng(0)
    for _ in range(50):
        m = int(rng.integers(5, 40))
        reward = rng.normal(size=m).astype(np.float32).tolist()
        terminated = sorted(set(rng.integers(0, m, 4).tolist()))
        data = dataset(reward, sorted({t + 1 for t in terminated} | {m}), terminated, view="d4rl_compat")
        np.testing.assert_allclose(return_range(data, 4), slow(reward, set(terminated), 4), rtol=1e-5, atol=1e-6)
    with pytest.raises(ValueError, match="neither a terminal nor"):
        return_range(dataset([1.0, 2], [2], view="d4rl_compat"))
    # the windows slide where an episode that timed out lacks a row
    sliding = dataset([1.0] * 9 + [2.0] * 9, [9, 18], view="d4rl_compat")
    assert return_range(sliding, 10) == (11.0, 11.0)


def test_offline_and_online_rewards_reach_the_critic_on_one_scale(write_d4rl: Write) -> None:
    """The transform is the agent's: rows of the dataset and of a replay ring, both raw, are seen alike."""
    data = load_dataset(str(write_d4rl("x.hdf5", [episode(0, 5), episode(1, 9, "terminated")])))
    agent = TD3BC(Spec(*data.spec_dims), TD3BCConfig(hidden=(8,), reward="return-range"))
    agent.prepare(data)
    ring = Ring(14)
    ring.add(data.whole())
    seen: list[Tensor] = []
    loss = agent.critic_loss

    def watched(b: Batch, **kw: Any) -> Tensor:
        seen.append(b.reward)
        return loss(b, **kw)

    agent.critic_loss = watched  # type: ignore[method-assign,assignment]
    batch = Mix(data, ring, 0.5).sample(20)
    agent.update(batch)
    scale = 1000 / float(data.episode_returns().max() - data.episode_returns().min())
    torch.testing.assert_close(seen[0], batch.reward * scale)
    # and it is part of the checkpoint
    assert float(agent.state_dict()["reward.scale"]) == pytest.approx(scale)


def test_reward_transform_is_the_identity_by_default(tmp_path: Path) -> None:
    data = dataset([1.0, 2, 3, 4], [2, 4])
    agent = TD3BC(Spec(1, 1), TD3BCConfig(hidden=(4,)))
    agent.prepare(data)
    torch.testing.assert_close(agent.reward(data.rows.reward), data.rows.reward)


def test_the_return_of_an_episode_counts_the_row_that_the_view_drops(tmp_path: Path) -> None:
    """Two episodes of three steps cut by a timeout, whose last successors nobody knows."""
    reward = np.array([1, 2, 4, 8, 16, 32], np.float32)
    rows = np.arange(6.0, dtype=np.float32)[:, None]
    flags = {"terminals": np.zeros(6, bool), "timeouts": np.array([0, 0, 1, 0, 0, 1], bool)}
    np.savez(tmp_path / "a.npz", observations=rows, actions=rows / 10, rewards=reward, **flags)  # type: ignore[arg-type]
    data = load_dataset(str(tmp_path / "a.npz")).require("episode_return", "mc_return", gamma=0.5)
    assert data.rows.reward.tolist() == [1, 2, 8, 16]
    assert data.rows.extra["episode_return"].tolist() == [7, 7, 56, 56]
    assert data.rows.extra["mc_return"].tolist() == [2, 2, 16, 16]  # up to the last row that is kept
