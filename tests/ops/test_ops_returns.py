"""Advantages and returns: hand numbers, and a slow reference that cuts the data into trajectories."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from rlctl.ops import gae
from rlctl.ops.returns import discounted_sums

REWARD, VALUE, LAST = [1.0, 2.0, 3.0, 4.0], [0.5, 1.0, -0.5, 2.0], 1.5


def column(values: list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def flags(*at: int, length: int = 4) -> Tensor:
    out = torch.zeros(length, 1, dtype=torch.bool)
    out[list(at)] = True
    return out


def reference(
    reward: Tensor, value: Tensor, next_value: Tensor, terminated: Tensor, truncated: Tensor, gamma: float, lam: float
) -> Tensor:
    """The defining sum A_t = sum_k (gamma lam)^k delta_{t+k}, trajectory by trajectory."""
    out = torch.zeros_like(reward)
    horizon, worlds = reward.shape
    for n in range(worlds):
        cuts = [t + 1 for t in range(horizon) if terminated[t, n] or truncated[t, n]]
        starts = [0, *cuts]
        ends = [*cuts, horizon]
        for lo, hi in zip(starts, ends, strict=True):
            deltas = []
            for t in range(lo, hi):
                bootstrap = 0.0 if terminated[t, n] else float(next_value[t, n])
                deltas.append(float(reward[t, n]) + gamma * bootstrap - float(value[t, n]))
            for i in range(len(deltas)):
                out[lo + i, n] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return out


@pytest.mark.parametrize(
    ("next_value", "terminated", "truncated", "expected"),
    [
        ([1.0, -0.5, 2.0, LAST], flags(), flags(), [9.7114397864, 8.7415627712, 8.7576425, 3.485]),
        ([1.0, -0.5, 2.0, LAST], flags(1), flags(), [2.4305, 1.0, 8.7576425, 3.485]),
        ([1.0, 0.7, 2.0, LAST], flags(), flags(1), [3.0822665, 1.693, 8.7576425, 3.485]),
        # both at once: it is a termination
        ([1.0, 0.7, 2.0, LAST], flags(1), flags(1), [2.4305, 1.0, 8.7576425, 3.485]),
    ],
    ids=["no boundary", "terminated", "truncated", "terminated and truncated"],
)
def test_gae_hand_numbers(
    next_value: list[float], terminated: Tensor, truncated: Tensor, expected: list[float]
) -> None:
    adv = gae(column(REWARD), column(VALUE), column(next_value), terminated, truncated, 0.99, 0.95)
    torch.testing.assert_close(adv, column(expected), rtol=0, atol=1e-10)


@given(
    horizon=st.integers(1, 12),
    worlds=st.integers(1, 4),
    gamma=st.floats(0, 1),
    lam=st.floats(0, 1),
    ends=st.floats(0, 0.6),
    seed=st.integers(0, 10_000),
)
def test_gae_equals_the_sum_over_trajectories(
    horizon: int, worlds: int, gamma: float, lam: float, ends: float, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    reward, value, next_value = torch.randn(3, horizon, worlds, generator=g, dtype=torch.float64)
    terminated, truncated = torch.rand(2, horizon, worlds, generator=g) < ends
    args = (reward, value, next_value, terminated, truncated, gamma, lam)
    torch.testing.assert_close(gae(*args), reference(*args), rtol=1e-12, atol=1e-12)


def test_gae_ends_of_lambda() -> None:
    """lambda 0 is the TD error; lambda 1 the discounted return (with bootstrap) minus the value."""
    g = torch.Generator().manual_seed(0)
    reward, value = torch.randn(2, 6, 3, generator=g, dtype=torch.float64)
    next_value = torch.cat([value[1:], torch.ones(1, 3, dtype=torch.float64)])
    no = torch.zeros(6, 3, dtype=torch.bool)
    torch.testing.assert_close(gae(reward, value, next_value, no, no, 0.9, 0.0), reward + 0.9 * next_value - value)
    ret = torch.ones(3, dtype=torch.float64)
    returns = []
    for t in reversed(range(6)):
        ret = reward[t] + 0.9 * ret
        returns.append(ret)
    torch.testing.assert_close(gae(reward, value, next_value, no, no, 0.9, 1.0), torch.stack(returns[::-1]) - value)


def test_gae_keeps_dtype_and_leaves_its_arguments_alone() -> None:
    args = [torch.randn(5, 2) for _ in range(3)]
    flags_ = [torch.rand(5, 2) < 0.3 for _ in range(2)]
    before = [x.clone() for x in (*args, *flags_)]
    assert gae(*args, *flags_, 0.99, 0.95).dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip((*args, *flags_), before, strict=True))


@pytest.mark.parametrize("wrong", range(5))
def test_gae_refuses_unequal_shapes(wrong: int) -> None:
    args = [*(torch.zeros(4, 2) for _ in range(3)), *(torch.zeros(4, 2, dtype=torch.bool) for _ in range(2))]
    args[wrong] = args[wrong][:, :1]
    with pytest.raises(ValueError, match=r"five arrays of one shape \[T, N\].*\(4, 1\)"):
        gae(*args, 0.99, 0.95)


def slow_sums(reward: Tensor, boundary: Tensor, gamma: float, start: Tensor) -> tuple[Tensor, Tensor]:
    out, carry = torch.zeros_like(reward), start.clone()
    for n in range(reward.shape[1]):
        g = float(start[n])
        for t in range(len(reward)):
            g = gamma * g + float(reward[t, n])
            out[t, n] = g
            g = 0.0 if boundary[t, n] else g
        carry[n] = g
    return out, carry


def test_discounted_sums_hand_numbers() -> None:
    sums, carry = discounted_sums(column([1.0, 2.0, 3.0, 4.0]), flags(1), 0.5, torch.tensor([8.0], dtype=torch.float64))
    assert sums[:, 0].tolist() == [5.0, 4.5, 3.0, 5.5]
    assert carry.tolist() == [5.5]


@given(
    horizon=st.integers(1, 10),
    worlds=st.integers(1, 3),
    gamma=st.floats(0, 1),
    cut=st.integers(0, 9),
    seed=st.integers(0, 10_000),
)
def test_discounted_sums_equal_the_loop_and_can_be_split_anywhere(
    horizon: int, worlds: int, gamma: float, cut: int, seed: int
) -> None:
    g = torch.Generator().manual_seed(seed)
    reward = torch.randn(horizon, worlds, generator=g, dtype=torch.float64)
    boundary = torch.rand(horizon, worlds, generator=g) < 0.3
    start = torch.randn(worlds, generator=g, dtype=torch.float64)
    sums, carry = discounted_sums(reward, boundary, gamma, start)
    slow, slow_carry = slow_sums(reward, boundary, gamma, start)
    torch.testing.assert_close(sums, slow)
    torch.testing.assert_close(carry, slow_carry)
    cut = cut % horizon
    first, between = discounted_sums(reward[:cut], boundary[:cut], gamma, start)
    second, after = discounted_sums(reward[cut:], boundary[cut:], gamma, between)
    assert torch.equal(torch.cat([first, second]), sums)
    assert torch.equal(after, carry)
