"""What offline learners share: regression to an expectile, weights of weighted cloning, pessimism of critics."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

SampledBackup = Literal["max-min", "min-max"]
MAX_WEIGHT = 100.0
"""Bound of the weights of advantage-weighted cloning."""


def expectile_loss(u: Tensor, tau: float) -> Tensor:
    """mean |tau - 1[u < 0]| u^2 over all entries of u = target - prediction; half the mean square at tau = 1/2.

    Its minimiser is the tau-expectile of the targets: their mean at 1/2, their maximum as tau -> 1.
    Source: Kostrikov et al. 2022, arXiv:2110.06169, eq. 5 (Newey & Powell 1987).
    """
    return (torch.where(u < 0, 1 - tau, tau) * u.square()).mean()


def awr_weight(adv: Tensor, beta: float | Tensor, bound: float = MAX_WEIGHT) -> Tensor:
    """min(exp(beta A), bound), of the shape of `adv`, without gradient: how much a transition counts in cloning.

    `beta`, one number or one per transition (no gradient reaches it), is an inverse temperature, 1 / lambda where a
    paper divides. 0 is plain cloning.
    Source: Peng et al. 2019, arXiv:1910.00177 (advantage-weighted regression, weights clipped).
    """
    beta = beta.detach() if isinstance(beta, Tensor) else beta
    return (beta * adv.detach()).exp().clamp(max=bound)


def conservative_gap(
    q: Tensor, q_data: Tensor, log_density: Tensor | None = None, temperature: float = 1.0, floor: float | None = None
) -> Tensor:
    """T log sum_k exp((Q(s, a_k) - log mu(a_k)) / T) - Q(s, a_data), [..., B]; at least `floor`, if given.

    `q` [..., B, K] at the K actions a_k, `log_density` [B, K] that of the distribution each a_k was drawn from (None
    leaves it out), `q_data` [..., B]. Nats cancel: what remains is a difference of values, the same for Q + constant.
    No log K is subtracted. Source: Kumar et al. 2020, arXiv:2006.04779, eq. 4 and appendix F.
    """
    entries = q if log_density is None else q - log_density
    gap = temperature * (entries / temperature).logsumexp(-1) - q_data
    return gap if floor is None else gap.clamp(min=floor)


def sampled_backup(q: Tensor, how: SampledBackup) -> Tensor:
    """One value [B] of those of E critics at K sampled actions, `q` [E, B, K].

    `max-min`: each critic's best action, then the smallest critic; `min-max`: each action's smallest critic, then the
    best action. The first is at least the second.
    """
    return q.amax(-1).amin(0) if how == "max-min" else q.amin(0).amax(-1)


def ensemble_diversity(slopes: Tensor) -> Tensor:
    """1 / (E - 1) mean_b sum_{i != j} <u_i, u_j> with u_i = g_i / |g_i|: action gradients [E, B, A] of E >= 2 critics.

    E where all point the same way, 0 where they are orthogonal, negative where they cancel (-E / (E - 1) at least).
    Source: An et al. 2021, arXiv:2110.01548, section 4.
    """
    u = normalize(slopes, dim=-1, eps=1e-10)
    # sum_{i != j} <u_i, u_j> = |sum_i u_i|^2 - sum_i |u_i|^2: no table of E^2 pairs
    pairs = u.sum(0).square().sum(-1) - u.square().sum((0, -1))
    return pairs.mean() / (len(slopes) - 1)
