"""Action distributions. Scalars per sample are `[...]`: log-probabilities are summed over action dimensions.

Every sampler takes `noise` (a standard-normal tensor of the action's shape, for tests and common random numbers) or a
`generator` to draw it from. Units: nats. What each one can be asked (`a`: an action [..., A]):

| operation | Normal | TanhNormal | NormalMixture | TanhNormalMixture |
|---|---|---|---|---|
| `sample`, `mode`, `detach` | yes | yes | yes | yes |
| `log_prob(a)` | exact | exact | exact, by logsumexp | exact, by logsumexp |
| `log_prob(a, reduce=False)`, per dimension | yes | yes | no: a mixture is no product over dimensions | no |
| draws with a pathwise gradient | yes | yes | of a component (`components`, `select`) | of a component |
| `p.kl(q)`, from p to q; `q.kl(p)` the other way | closed form | closed form | `mc_kl` | `mc_kl` |
| `entropy()` | closed form | `mc_entropy` | `mc_entropy` | `mc_entropy` |

The functions `kl(p, q)` = KL(p || q) and `entropy(p)` take the closed form where there is one, the Monte-Carlo estimate
elsewhere. `k3(log q - log p)` estimates KL(p || q) from log-probabilities that are already at hand.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Generic, Self, TypeVar

import torch
from torch import Tensor
from torch.nn.functional import softplus

from rlctl.ops.selection import picked, reached, uniform_for

LOG_2 = math.log(2.0)
HALF_LOG_2PI = 0.5 * math.log(2.0 * math.pi)


def standard_normal(like: Tensor, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """`noise` itself if given, else a draw of the shape of `like`."""
    if noise is not None:
        return noise
    return torch.randn(like.shape, generator=generator, dtype=like.dtype, device=like.device)


@dataclass(frozen=True)
class Normal:
    """Diagonal Gaussian: `mean` [..., A], `log_std` [A] or [..., A], one per dimension.

    Raises:
        ValueError: `log_std` has another number of dimensions of the action than `mean`.
    """

    mean: Tensor
    log_std: Tensor

    def __post_init__(self) -> None:
        # a log_std [..., 1] would broadcast in a draw, and count once instead of A times in a density
        if self.log_std.shape[-1:] != self.mean.shape[-1:]:
            raise ValueError(
                f"mean {tuple(self.mean.shape)} and log_std {tuple(self.log_std.shape)} differ in the last dimension: "
                "expand log_std to the dimensions of the action"
            )

    @property
    def mode(self) -> Tensor:
        """The deterministic action [..., A]."""
        return self.mean

    @property
    def unsquashed(self) -> Normal:
        """Itself: it is not squashed."""
        return self

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised draw [..., A]."""
        return self.mean + self.log_std.exp() * standard_normal(self.mean, noise, generator)

    def log_prob(self, action: Tensor, reduce: bool = True) -> Tensor:
        """log N(action; mean, std), [...]; with `reduce=False` that of each dimension, [..., A]."""
        z = (action - self.mean) * (-self.log_std).exp()
        if not reduce:
            return -0.5 * z.square() - self.log_std - HALF_LOG_2PI
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

    @property
    def unsquashed(self) -> Normal:
        """The Gaussian of which this is the tanh."""
        return Normal(self.mean, self.log_std)

    def sample(self, noise: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """A reparameterised draw [..., A]."""
        return (self.mean + self.log_std.exp() * standard_normal(self.mean, noise, generator)).tanh()

    def sample_pre_tanh(
        self, noise: Tensor | None = None, generator: torch.Generator | None = None, reduce: bool = True
    ) -> tuple[Tensor, Tensor]:
        """A reparameterised u [..., A] and the log-density [...] of the action tanh(u) ([..., A] if not `reduce`)."""
        eps = standard_normal(self.mean, noise, generator)
        u = self.mean + self.log_std.exp() * eps
        return u, self._log_density(eps, u, reduce)

    def sample_log_prob(
        self, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """A reparameterised draw [..., A] and its log-density [...]. The pre-tanh value is kept, never recovered."""
        u, log_prob = self.sample_pre_tanh(noise, generator)
        return u.tanh(), log_prob

    def log_prob(self, action: Tensor, reduce: bool = True, eps: float = 1e-6) -> Tensor:
        """Log-density [...] of squashed actions [..., A], clamped to +-(1 - eps) so that atanh stays finite.

        With `reduce=False` that of each dimension, [..., A].
        """
        return self.log_prob_pre_tanh(action.clamp(-1 + eps, 1 - eps).atanh(), reduce)

    def log_prob_pre_tanh(self, u: Tensor, reduce: bool = True) -> Tensor:
        """Log-density [...] of the action tanh(u), from u [..., A]; with `reduce=False` of each dimension, [..., A]."""
        return self._log_density((u - self.mean) * (-self.log_std).exp(), u, reduce)

    def _log_density(self, z: Tensor, u: Tensor, reduce: bool) -> Tensor:
        # log N(u) and the log-Jacobian in one sum: this is the inner loop of every off-policy agent
        per_dim = -0.5 * z.square() - self.log_std + 2 * (u + softplus(-2 * u))
        constant = HALF_LOG_2PI + 2 * LOG_2
        return per_dim.sum(-1) - constant * self.mean.shape[-1] if reduce else per_dim - constant

    def spread(self, num: int) -> TanhNormal:
        """`num` copies of it side by side: draws are [num, ..., A], their log-densities [num, ...]."""
        return TanhNormal(self.mean.expand(num, *self.mean.shape), self.log_std)

    def detach(self) -> TanhNormal:
        """A copy that no gradient reaches and no later update of the policy's parameters changes."""
        return TanhNormal(self.mean.detach().clone(), self.log_std.detach().clone())

    def kl(self, other: TanhNormal) -> Tensor:
        """KL(self || other), [...]: tanh is one-to-one, so it is the KL of the two Gaussians."""
        return self.unsquashed.kl(other.unsquashed)


# ------------------------------------------------------------------------------------------------------------ mixtures
def take(x: Tensor, index: Tensor) -> Tensor:
    """Entry `index` [...] of the component axis of `x`: [..., K] -> [...], [..., K, A] -> [..., A]."""
    if x.dim() == index.dim() + 1:
        return x.gather(-1, index.unsqueeze(-1)).squeeze(-1)
    return picked(x, index)


C = TypeVar("C", Normal, TanhNormal)


@dataclass(frozen=True)
class Mixture(Generic[C]):
    """sum_k w_k p_k: gate `logits` [..., K]; `components` is one distribution whose mean is [..., K, A].

    The choice of a component has no pathwise derivative, so `sample` carries no gradient. What does: draws of single
    components, from `components` (of all, [..., K, A]) or `select(k)`; and `log_prob`, in gate and components.
    """

    logits: Tensor
    components: C

    @property
    def num(self) -> int:
        """Number of components K."""
        return self.logits.shape[-1]

    @property
    def log_weights(self) -> Tensor:
        """log w, [..., K]."""
        return self.logits.log_softmax(-1)

    @property
    def weights(self) -> Tensor:
        """w, [..., K]: they sum to 1."""
        return self.logits.softmax(-1)

    @property
    def mode(self) -> Tensor:
        """The deterministic action [..., A]: that of the component with the largest weight."""
        return self.select(self.logits.argmax(-1)).mode

    def choose(self, uniform: Tensor | None = None, generator: torch.Generator | None = None) -> Tensor:
        """Components k ~ w, [...] (int64), by inverting their distribution function at `uniform` [...] in [0, 1).

        A component without alternative is chosen without a random number.
        """
        if self.num == 1:
            return torch.zeros(self.logits.shape[:-1], dtype=torch.int64, device=self.logits.device)
        return reached(self.weights.cumsum(-1), uniform_for(self.logits, uniform, generator))

    def select(self, index: Tensor) -> C:
        """Component `index` [...] of each row, a distribution over [..., A]."""
        c = self.components
        return type(c)(take(c.mean, index), take(c.log_std.expand_as(c.mean), index))

    @torch.no_grad()
    def sample(
        self,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> Tensor:
        """A draw [..., A], without gradient: k ~ w by `uniform` [...], then of component k by `noise` [..., A]."""
        return self.select(self.choose(uniform, generator)).sample(noise, generator)

    def component_log_probs(self, action: Tensor) -> Tensor:
        """Log-density of each component by itself, [..., K], at `action` [..., A]."""
        return self.components.log_prob(action.unsqueeze(-2))

    def log_prob(self, action: Tensor) -> Tensor:
        """log sum_k w_k p_k(action), [...]."""
        return (self.log_weights + self.component_log_probs(action)).logsumexp(-1)

    def responsibilities(self, action: Tensor) -> Tensor:
        """Posterior of the component, w_k p_k(action) / sum_j w_j p_j(action), [..., K]."""
        return (self.log_weights + self.component_log_probs(action)).softmax(-1)

    def detach(self) -> Self:
        """A copy that no gradient reaches and no later update of the policy's parameters changes."""
        return type(self)(self.logits.detach().clone(), self.components.detach())


class NormalMixture(Mixture[Normal]):
    """A mixture of diagonal Gaussians."""

    @property
    def unsquashed(self) -> NormalMixture:
        """Itself: it is not squashed."""
        return self

    def sample_log_prob(
        self,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A draw [..., A], without gradient, and its log-density [...] under the mixture."""
        action = self.sample(noise, generator, uniform)
        return action, self.log_prob(action)


class TanhNormalMixture(Mixture[TanhNormal]):
    """A mixture of squashed Gaussians, which is the tanh of the mixture of the Gaussians."""

    @property
    def unsquashed(self) -> NormalMixture:
        """The mixture of Gaussians of which this is the tanh."""
        return NormalMixture(self.logits, self.components.unsquashed)

    def log_prob_pre_tanh(self, u: Tensor) -> Tensor:
        """Log-density [...] of the action tanh(u) under the mixture, from u [..., A]."""
        return (self.log_weights + self.components.log_prob_pre_tanh(u.unsqueeze(-2))).logsumexp(-1)

    def sample_log_prob(
        self,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
        uniform: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """A draw [..., A], without gradient, and its log-density [...] under the mixture."""
        with torch.no_grad():
            u, _ = self.select(self.choose(uniform, generator)).sample_pre_tanh(noise, generator)
        return u.tanh(), self.log_prob_pre_tanh(u)


# ------------------------------------------------------------------------------------------------ kl and entropy of any
Distribution = Normal | TanhNormal | NormalMixture | TanhNormalMixture
SQUASHED = (TanhNormal, TanhNormalMixture)


def kl(p: Distribution, q: Distribution, num: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """KL(p || q) [...], in closed form where there is one, else by `mc_kl` with `num` draws."""
    if isinstance(p, Normal) and isinstance(q, Normal):
        return p.kl(q)
    if isinstance(p, TanhNormal) and isinstance(q, TanhNormal):
        return p.kl(q)
    return mc_kl(p, q, num, generator=generator)


def entropy(p: Distribution, num: int = 16, generator: torch.Generator | None = None) -> Tensor:
    """Differential entropy [...] of the action, in closed form for a Normal, else by `mc_entropy` with `num` draws."""
    return p.entropy() if isinstance(p, Normal) else mc_entropy(p, num, generator=generator)


def k3(log_ratio: Tensor) -> Tensor:
    """exp(x) - 1 - x of x = log q(a) - log p(a): over a ~ p its mean is KL(p || q), and no value is negative.

    Source: Schulman 2020, "Approximating KL divergence", joschu.net/blog/kl-approx.html.
    """
    return log_ratio.expm1() - log_ratio


def mc_kl(
    p: Distribution,
    q: Distribution,
    num: int = 16,
    noise: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """KL(p || q) [...], estimated: sum_k w_k E_{a ~ p_k}[k3(log q(a) - log p(a))] with `num` draws of each p_k.

    `noise` is `[K, num, ..., A]` (K = 1 for what is no mixture). Unbiased, never negative, with unbiased gradients in
    both arguments (gate included, since w multiplies each component's own draws); at p = q value and gradient are 0
    exactly. Meant for neighbours, such as a policy before and after an update: the variance grows with q / p, without
    bound where q has wider tails than p. Squashed distributions are compared before squashing, which changes nothing.
    TypeError if one is squashed and the other is not: then there is none.
    """
    if isinstance(p, SQUASHED) != isinstance(q, SQUASHED):
        raise TypeError(f"no KL between {type(p).__name__} and {type(q).__name__}: one is squashed, the other is not")
    base, other = _as_mixture(p.unsquashed), q.unsquashed
    u = _draw_each(base, num, noise, generator)
    return _expected(base, k3(other.log_prob(u) - base.log_prob(u)))


def mc_entropy(
    p: Distribution, num: int = 16, noise: Tensor | None = None, generator: torch.Generator | None = None
) -> Tensor:
    """Entropy [...] of the action, estimated: -sum_k w_k E_{a ~ p_k}[log p(a)] with `num` draws of each component.

    `noise` is `[K, num, ..., A]` (K = 1 for what is no mixture). Unbiased, and so is its gradient, gate included.
    """
    base = _as_mixture(p.unsquashed)
    u = _draw_each(base, num, noise, generator)
    log_prob = p.log_prob_pre_tanh(u) if isinstance(p, SQUASHED) else p.log_prob(u)
    return -_expected(base, log_prob)


def _as_mixture(p: Normal | NormalMixture) -> NormalMixture:
    if isinstance(p, NormalMixture):
        return p
    mean = p.mean.unsqueeze(-2)
    return NormalMixture(mean.new_zeros(mean.shape[:-1]), Normal(mean, p.log_std.unsqueeze(-2)))


def _draw_each(p: NormalMixture, num: int, noise: Tensor | None, generator: torch.Generator | None) -> Tensor:
    """Draws of every component, [K, num, ..., A], with pathwise gradients."""
    mean = p.components.mean.movedim(-2, 0).unsqueeze(1)
    log_std = p.components.log_std.expand_as(p.components.mean).movedim(-2, 0).unsqueeze(1)
    return mean + log_std.exp() * standard_normal(mean.expand(-1, num, *mean.shape[2:]), noise, generator)


def _expected(p: NormalMixture, values: Tensor) -> Tensor:
    """sum_k w_k mean(values of component k): `[K, num, ...] -> [...]`."""
    return (p.weights.movedim(-1, 0) * values.mean(1)).sum(0)
