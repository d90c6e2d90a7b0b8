"""Normalisers. They are modules of the agent, so they are saved, resumed, frozen and exported with it.

They move only when `update` (or `fit`) is called, which an agent does at the end of its own update. During a rollout,
an evaluation and the whole of an update they stand still: that is why the first PPO ratio is 1.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rlctl import parallel
from rlctl.ops.batches import column_moments
from rlctl.ops.returns import discounted_sums


class RunningMoments(nn.Module):
    """Mean and variance of all rows seen, merged batch by batch (Chan et al. 1979), in float64.

    Where several processes share the update, a batch is the rows of all of them.
    """

    mean: Tensor
    var: Tensor
    count: Tensor

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(shape, dtype=torch.float64))
        self.register_buffer("var", torch.ones(shape, dtype=torch.float64))
        self.register_buffer("count", torch.zeros((), dtype=torch.float64))

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Merge the rows of `x` [..., *shape]."""
        rows = x.reshape(-1, *self.mean.shape).double()
        var, mean = torch.var_mean(rows, 0, correction=0)
        mean, var, n = parallel.merged_moments(mean, var, len(rows))
        total = self.count + n
        shift = mean - self.mean
        # until data has come, `var` is the neutral 1 and weighs nothing
        m2 = self.var * self.count + var * n + shift.square() * self.count * n / total
        self.mean += shift * (n / total)
        self.var.copy_(m2 / total)
        self.count.copy_(total)


class ObsNorm(RunningMoments):
    """(obs - mean) / sqrt(var + 1e-8), clipped to +-`clip`; the identity (but for the clip) until the first data.

    With `enabled=False` it is the identity and stays so.
    """

    def __init__(self, obs_dim: int, clip: float = 10.0, *, enabled: bool = True) -> None:
        super().__init__((obs_dim,))
        self.clip, self.enabled = clip, enabled

    def update(self, x: Tensor) -> None:
        """Merge the rows of `x` [..., O]."""
        if self.enabled:
            super().update(x)

    def forward(self, obs: Tensor) -> Tensor:
        """`[..., O] -> [..., O]`, float32."""
        if not self.enabled:
            return obs
        scale = (self.var + 1e-8).rsqrt().float()
        return ((obs - self.mean.float()) * scale).clamp(-self.clip, self.clip)


class RewardScale(nn.Module):
    """Divides rewards by the spread of the running discounted return, clipped to +-`clip`. No mean is subtracted.

    G_t = gamma G_{t-1} + r_t, restarted after each episode; the divisor is std(G) over everything seen so far.
    With `enabled=False` it is the identity and stays so.
    """

    carry: Tensor

    def __init__(self, num_envs: int, gamma: float, clip: float = 10.0, *, enabled: bool = True) -> None:
        super().__init__()
        self.gamma, self.clip, self.enabled = gamma, clip, enabled
        self.moments = RunningMoments(())
        self.register_buffer("carry", torch.zeros(num_envs))

    def forward(self, reward: Tensor) -> Tensor:
        """`[...] -> [...]`."""
        if not self.enabled:
            return reward
        return (reward * (self.moments.var + 1e-8).rsqrt().float()).clamp(-self.clip, self.clip)

    @torch.no_grad()
    def update(self, reward: Tensor, boundary: Tensor) -> None:
        """Take in one rollout: raw rewards and episode ends (terminated or truncated), both `[T, N]`."""
        if not self.enabled:
            return
        sums, carry = discounted_sums(reward, boundary, self.gamma, self.carry)
        self.carry.copy_(carry)
        self.moments.update(sums)


class FixedNorm(nn.Module):
    """z-score with the mean and std of a dataset: (obs - mean) / (std + eps), clipped to +-`clip` if that is given.

    Until `fit` it is the identity (but for the clip).
    """

    mean: Tensor
    std: Tensor

    def __init__(self, obs_dim: int, eps: float = 1e-3, clip: float | None = None) -> None:
        super().__init__()
        self.eps, self.clip = eps, clip
        self.register_buffer("mean", torch.zeros(obs_dim))
        self.register_buffer("std", torch.full((obs_dim,), 1.0 - eps))

    @torch.no_grad()
    def fit(self, obs: Tensor) -> None:
        """Take mean and (population) std from `obs` [B, O]."""
        mean, std = column_moments(obs)
        self.mean.copy_(mean)
        self.std.copy_(std)

    def forward(self, obs: Tensor) -> Tensor:
        """`[..., O] -> [..., O]`."""
        seen = (obs - self.mean) / (self.std + self.eps)
        return seen if self.clip is None else seen.clamp(-self.clip, self.clip)
