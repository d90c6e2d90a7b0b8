"""Advantages and returns."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates, `[T, N]` from `[T, N]`.

    delta_t = r_t + gamma (1 - terminated_t) V(s'_t) - V(s_t)
    A_t     = delta_t + gamma lam (1 - (terminated_t or truncated_t)) A_{t+1}

    A termination removes the bootstrap and cuts the sum. A truncation only cuts the sum: the bootstrap stays, from the
    true successor s'_t (`next_value` must be its value, never that of a reset observation).
    The value target (the lambda-return) is `gae(...) + value`.

    Source: Schulman et al. 2016, arXiv:1506.02438, eq. 16; the truncation rule is Pardo et al. 2018, arXiv:1712.00378.
    """
    if not (reward.shape == value.shape == next_value.shape == terminated.shape == truncated.shape):
        shapes = [tuple(x.shape) for x in (reward, value, next_value, terminated, truncated)]
        raise ValueError(f"gae needs five arrays of one shape [T, N], got {shapes}")
    delta = reward + gamma * next_value * ~terminated - value
    decay = torch.full_like(reward, gamma * lam) * ~(terminated | truncated)
    adv = torch.empty_like(delta)
    last = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        last = torch.addcmul(delta[t], decay[t], last, out=adv[t])
    return adv


def discounted_sums(reward: Tensor, boundary: Tensor, gamma: float, start: Tensor) -> tuple[Tensor, Tensor]:
    """Forward discounted reward sums G_t = gamma G_{t-1} + r_t, `[T, N]`, and the carry for the next call, `[N]`.

    G restarts at zero after a step with `boundary` (terminated or truncated); `start` [N] is the carry of the call
    before. This is the running return whose spread scales rewards in `RewardScale`.
    """
    sums = torch.empty_like(reward)
    carry = start
    for t in range(len(reward)):
        sums[t] = carry * gamma + reward[t]
        carry = sums[t] * ~boundary[t]
    return sums, carry
