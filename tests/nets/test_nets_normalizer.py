"""Normalisers: merged moments are those of all the data, and nothing but `update` or `fit` moves them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rlctl.nets import ObsNorm, RewardScale
from rlctl.nets.normalizer import FixedNorm, RunningMoments
from rlctl.ops import column_moments


def frozen(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def unchanged(module: torch.nn.Module, before: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(v, before[k]) for k, v in module.state_dict().items())


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=6), seed=st.integers(0, 1000), offset=st.floats(-1e3, 1e3)
)
def test_merged_moments_are_those_of_the_concatenation(sizes: list[int], seed: int, offset: float) -> None:
    rng = np.random.default_rng(seed)
    parts = [rng.normal(offset * i, 1 + i, (n, 3)) for i, n in enumerate(sizes)]
    moments = RunningMoments((3,))
    for part in parts:
        moments.update(torch.from_numpy(part))
    data = np.concatenate(parts)
    np.testing.assert_allclose(moments.mean.numpy(), data.mean(0), rtol=1e-10, atol=1e-10)
    np.testing.assert_allclose(moments.var.numpy(), data.var(0), rtol=1e-10, atol=1e-10)
    assert float(moments.count) == len(data)


def test_moments_take_any_leading_dimensions_and_scalars() -> None:
    x = torch.randn(4, 5, 3, generator=torch.Generator().manual_seed(0))
    a, b, c = RunningMoments((3,)), RunningMoments((3,)), RunningMoments(())
    a.update(x)
    b.update(x.reshape(20, 3))
    c.update(x)
    assert torch.equal(a.mean, b.mean)
    np.testing.assert_allclose(float(c.var), x.double().numpy().var(), rtol=1e-12)
    assert c.mean.shape == ()


def test_moments_survive_a_mean_far_from_zero() -> None:
    """A billion plus a small spread: what a float32 sum of squares loses."""
    rng = np.random.default_rng(0)
    data = 1e9 + rng.normal(0, 2.0, (5000, 1))
    moments = RunningMoments((1,))
    for part in np.split(data, 10):
        moments.update(torch.from_numpy(part))
    np.testing.assert_allclose(moments.var.numpy(), data.var(0), rtol=1e-6)


def test_obs_norm() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.normal([5, -3], [2, 0.1], (64, 2)), rng.normal([7, -3], [1, 0.2], (32, 2))
    norm = ObsNorm(2)
    x = torch.tensor([[5.0, -3.0], [500.0, -3.01]])
    assert torch.equal(norm(x), x.clamp(-10, 10))  # before any data: the identity but for the clip
    norm.update(torch.from_numpy(first).float())
    norm.update(torch.from_numpy(second).float())
    data = np.concatenate([first, second]).astype(np.float32).astype(np.float64)
    expected = np.clip((x.numpy() - data.mean(0)) / np.sqrt(data.var(0) + 1e-8), -10, 10)
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-4, atol=1e-4)
    assert norm(x).dtype == torch.float32
    assert float(norm(x).max()) == 10.0


def test_obs_norm_of_a_constant_is_zero() -> None:
    norm = ObsNorm(1)
    for _ in range(5):
        norm.update(torch.full((8, 1), 0.25))
    assert norm(torch.full((3, 1), 0.25)).tolist() == [[0.0]] * 3


@pytest.mark.parametrize("train", [True, False])
def test_only_update_moves_them(train: bool) -> None:
    obs_norm, scale, fixed = ObsNorm(3), RewardScale(4, 0.99), FixedNorm(3)
    obs_norm.update(torch.randn(8, 3))
    scale.update(torch.randn(8, 4), torch.zeros(8, 4, dtype=torch.bool))
    fixed.fit(torch.randn(8, 3))
    for module, x in ((obs_norm, torch.randn(5, 3)), (scale, torch.randn(5, 4)), (fixed, torch.randn(5, 3))):
        module.train(train)
        before = frozen(module)
        module(x)
        module(10 * x)
        assert unchanged(module, before)


def slow_scale(rollouts: list[tuple[np.ndarray, np.ndarray]], gamma: float) -> float:
    """Variance of the running discounted return over all rollouts, world by world."""
    seen = []
    for n in range(rollouts[0][0].shape[1]):
        g = 0.0
        for reward, boundary in rollouts:
            for t in range(len(reward)):
                g = gamma * g + float(reward[t, n])
                seen.append(g)
                if boundary[t, n]:
                    g = 0.0
    return float(np.var(seen))


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.99])
def test_reward_scale_equals_the_loop_and_carries_across_rollouts(gamma: float) -> None:
    rng = np.random.default_rng(0)
    rollouts = [(rng.normal(1, 2, (6, 3)), rng.random((6, 3)) < 0.2) for _ in range(4)]
    scale = RewardScale(3, gamma).double()
    for k, (reward, boundary) in enumerate(rollouts):
        scale.update(torch.from_numpy(reward), torch.from_numpy(boundary))
        var = slow_scale(rollouts[: k + 1], gamma)
        assert float(scale.moments.var) == pytest.approx(var, rel=1e-12)
        x = torch.tensor([0.5, -0.25, 1e6], dtype=torch.float64)
        expected = np.clip(x.numpy() / np.sqrt(var + 1e-8), -10, 10)
        np.testing.assert_allclose(scale(x).numpy(), expected, rtol=1e-6)


def test_reward_scale_subtracts_no_mean_and_is_the_identity_before_data() -> None:
    scale = RewardScale(2, 0.9)
    x = torch.tensor([0.0, 1.0, -2.0, 50.0])
    torch.testing.assert_close(scale(x), torch.tensor([0.0, 1.0, -2.0, 10.0]))
    scale.update(torch.full((20, 2), 3.0), torch.zeros(20, 2, dtype=torch.bool))
    assert float(scale(torch.zeros(1))) == 0.0
    assert float(scale(torch.ones(1))) > 0


def test_normalisers_are_saved_with_the_agent() -> None:
    scale, other = RewardScale(2, 0.9), RewardScale(2, 0.9)
    scale.update(torch.randn(5, 2), torch.rand(5, 2) < 0.2)
    other.load_state_dict(scale.state_dict())
    reward, boundary = torch.randn(5, 2), torch.rand(5, 2) < 0.2
    scale.update(reward, boundary)
    other.update(reward, boundary)
    assert unchanged(other, frozen(scale))
    assert {"mean", "var", "count"} == set(ObsNorm(3).state_dict())


def test_fixed_norm_takes_blocks_of_rows() -> None:
    """A number of rows that no block divides, far from 0: as in one piece, to 1e-12."""
    data = torch.randn(1000, 3, generator=torch.Generator().manual_seed(0)) + torch.tensor([0.0, 100.0, -1e4])
    std, mean = torch.std_mean(data.double(), 0, correction=0)
    for block in (7, 1000, 4096):
        ours = column_moments(data, block)
        torch.testing.assert_close(ours, (mean, std), rtol=1e-12, atol=1e-12)
    norm = FixedNorm(3)
    norm.fit(data)
    assert torch.equal(norm.mean, mean.float())
    assert torch.equal(norm.std, std.float())


def test_fixed_norm() -> None:
    data = np.random.default_rng(0).normal([5, -3], [2, 0.1], (100, 2)).astype(np.float32)
    norm = FixedNorm(2)
    x = torch.from_numpy(data[:7])
    torch.testing.assert_close(norm(x), x)
    norm.fit(torch.from_numpy(data))
    wide = data.astype(np.float64)
    expected = (wide[:7] - wide.mean(0)) / (wide.std(0) + 1e-3)
    np.testing.assert_allclose(norm(x).numpy(), expected, rtol=1e-4, atol=1e-4)
    norm.fit(torch.ones(10, 2))
    assert norm(torch.ones(3, 2)).tolist() == [[0.0, 0.0]] * 3  # a number that never changes
    bounded = FixedNorm(2, clip=10.0)
    assert bounded(torch.tensor([-12.0, 3.0])).tolist() == [-10.0, 3.0]
    bounded.fit(torch.zeros(10, 2))
    assert bounded(torch.tensor([5.0, -0.001])).tolist() == pytest.approx([10.0, -1.0])  # 5000 without the bound
