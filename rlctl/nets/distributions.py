"""Action distributions. Scalars per sample are `[...]`: log-probabilities are summed over action dimensions.

Every sampler takes `noise` (a standard-normal tensor of the action's shape, for tests and common random numbers) or a
`generator` to draw it from. Units: nats.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import softplus

LOG_2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def standard_normal(like: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """`noise` itself if given, else a draw of the shape of `like`."""
    if noise is not None:
        return noise
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Normal:
    """Diagonal Gaussian: `mean` [..., A], `log_std` broadcastable to it."""

    mean: Tensor
    log_std: Tensor

    @property
    def mode(self) -> Tensor:
        """The deterministic action [..., A]."""
        return self.mean

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised draw [..., A]."""
        return self.mean + self.log_std.exp() * standard_normal(self.mean, noise, generator)

    def log_prob(self, action: Tensor) -> Tensor:
        """log N(action; mean, std), [...]."""
        z = (action - self.mean) * (-self.log_std).exp()
        log_norm = self.log_std.sum(-1) + HALF_LOG_2PI * self.mean.shape[-1]
        return -0.5 * z.square().sum(-1) - log_norm

    def sample_log_prob(
        self, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A reparameterised draw [..., A] and its log-density [...]."""
        action = self.sample(noise, generator)
        return action, self.log_prob(action)

    def entropy(self) -> Tensor:
        """Differential entropy [...]."""
        entropy = self.log_std.sum(-1) + (HALF_LOG_2PI + 0.5) * self.mean.shape[-1]
        return entropy.expand(self.mean.shape[:-1])

    def detach(self) -> Normal:
        """A copy that no gradient reaches and no later update of the policy's parameters changes."""
        return Normal(self.mean.detach().clone(), self.log_std.detach().clone())

    def kl(self, other: Normal) -> Tensor:
        """KL(self || other), [...], in closed form."""
        var_ratio = (2 * (self.log_std - other.log_std)).exp()
        shift = ((self.mean - other.mean) * (-other.log_std).exp()).square()
        return 0.5 * (var_ratio + shift - 1 - var_ratio.log()).sum(-1)


@dataclass(frozen=True)
class TanhNormal:
    """tanh of a diagonal Gaussian; the density is that of the squashed action in (-1, 1)^A.

    log pi(tanh u) = log N(u) - sum_i log(1 - tanh(u_i)^2), the last log as 2 (log 2 - u - softplus(-2u)), which stays
    exact where `log(1 - a^2 + 1e-6)` is off by more than a nat (|u| around 8).
    Source: Haarnoja et al. 2018, arXiv:1801.01290, appendix C.
    """

    mean: Tensor
    log_std: Tensor

    @property
    def mode(self) -> Tensor:
        """tanh of the Gaussian's mean: the deterministic action [..., A] (not the squashed density's maximiser)."""
        return self.mean.tanh()

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised draw [..., A]."""
        return (self.mean + self.log_std.exp() * standard_normal(self.mean, noise, generator)).tanh()

    def sample_log_prob(
        self, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A reparameterised draw [..., A] and its log-density [...]. The pre-tanh value is kept, never recovered."""
        eps = standard_normal(self.mean, noise, generator)
        u = self.mean + self.log_std.exp() * eps
        # log N(u) and the log-Jacobian in one sum: this is the inner loop of every off-policy agent
        log_prob = (-0.5 * eps.square() - self.log_std + 2 * (u + softplus(-2 * u))).sum(-1)
        return u.tanh(), log_prob - (HALF_LOG_2PI + 2 * LOG_2) * self.mean.shape[-1]

    def log_prob(self, action: Tensor, eps: float = 1e-6) -> Tensor:
        """Log-density [...] of squashed actions [..., A], clamped to +-(1 - eps) so that atanh stays finite."""
        return self.log_prob_pre_tanh(action.clamp(-1 + eps, 1 - eps).atanh())

    def log_prob_pre_tanh(self, u: Tensor) -> Tensor:
        """Log-density [...] of the action tanh(u), from u [..., A]."""
        z = (u - self.mean) * (-self.log_std).exp()
        per_dim = -0.5 * z.square() - self.log_std + 2 * (u + softplus(-2 * u))
        return per_dim.sum(-1) - (HALF_LOG_2PI + 2 * LOG_2) * self.mean.shape[-1]

    def detach(self) -> TanhNormal:
        """A copy that no gradient reaches and no later update of the policy's parameters changes."""
        return TanhNormal(self.mean.detach().clone(), self.log_std.detach().clone())

    def kl(self, other: TanhNormal) -> Tensor:
        """KL(self || other), [...]: tanh is one-to-one, so it is the KL of the two Gaussians."""
        return Normal(self.mean, self.log_std).kl(Normal(other.mean, other.log_std))
