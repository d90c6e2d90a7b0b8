"""What the on-policy agents share: the settings of a Gaussian policy beside a value network, and a rollout as their
losses see it. Not an algorithm."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rlctl import parallel
from rlctl.nets.distributions import k3
from rlctl.nets.mlp import Activation
from rlctl.ops import gae, minibatches, minimize
from rlctl.train import OnPolicyConfig
from rlctl.types import Batch, Fraction, Metrics, Widths

LOG_RATIOS = (-1e4, 20.0)
"""Bounds of log r in what `step_taken` reports: exp overflows from 88 on, and a metric that is infinite ends a run as
diverged, although a method whose loss bounds the ratio by itself (SPO) can go on from there."""


@dataclass(frozen=True)
class ActorCriticConfig(OnPolicyConfig):
    """Separate policy and value networks, normalised inputs."""

    hidden: Widths = (64, 64)
    """Widths of the hidden layers of policy and value network (nothing is shared)."""
    activation: Activation = "tanh"
    """Activation of both networks: relu, tanh, elu, silu, gelu or mish."""
    log_std: float = 0.0
    """Initial log standard deviation of the actions, one free parameter per dimension."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    lam: Fraction = 0.95
    """lambda of the generalised advantage estimates."""
    normalize_obs: bool = True
    """Standardise observations with running statistics (clipped to +-10)."""
    normalize_reward: bool = True
    """Divide rewards by the running spread of the discounted return (clipped to +-10)."""


class Rows(NamedTuple):
    """A rollout as the losses see it, `[B, ...]`, all of it from before the update."""

    obs: Tensor
    """Normalised."""
    action: Tensor
    logp_old: Tensor
    v_old: Tensor
    adv: Tensor
    ret: Tensor
    """Value target: lambda-return."""


@torch.no_grad()
def rows_of(
    batch: Batch,
    pi: Callable[[Tensor], Any],
    v: Callable[[Tensor], Tensor],
    obs_norm: Callable[[Tensor], Tensor],
    reward_scale: Callable[[Tensor], Tensor],
    gamma: float,
    lam: float,
) -> Rows:
    """The rollout `batch` [T, N] as rows [T * N], with advantages, value targets and the acting policy's log-density.

    Nothing has moved since the rollout was collected, so this is what acting would have recorded.
    """
    obs = obs_norm(batch.obs)
    v_old = v(obs)
    reward, next_v = reward_scale(batch.reward), v(obs_norm(batch.next_obs))
    adv = gae(reward, v_old, next_v, batch.terminated, batch.truncated, gamma, lam)
    logp_old = pi(obs).log_prob(batch.action)
    return Rows(*[x.flatten(0, 1) for x in (obs, batch.action, logp_old, v_old, adv, adv + v_old)])


def check_minibatches(rows: int, minibatch_size: int, *, standardize: bool, unit: str = "transitions") -> None:
    """Refuse minibatches that a rollout of `rows` can't be cut into, or too small to `standardize` advantages within.

    Raises:
        ValueError: saying which of the two.
    """
    if rows % minibatch_size:
        raise ValueError(f"minibatch_size={minibatch_size} does not divide a rollout of {rows} {unit}")
    if minibatch_size == 1 and standardize:
        raise ValueError("minibatch_size=1 has no spread to normalise advantages by: take larger minibatches")


def clipped_surrogate(ratio: Tensor, adv: Tensor, clip: float | Tensor) -> Tensor:
    """-E[min(r A, clip(r) A)] over a minibatch `[B]`, r clipped to [1 - clip, 1 + clip] (arXiv:1707.06347, eq. 7).

    `clip` is one number, or one for each sample, `[B]`.
    """
    bounded = ratio.clamp(1 - clip, 1 + clip)  # type: ignore[arg-type]
    return -torch.minimum(ratio * adv, bounded * adv).mean()


def standardized(adv: Tensor, eps: float = 1e-8) -> Tensor:
    """(A - mean) / (std + eps) over a batch `[B]`, and over all processes that share the update."""
    std, mean = parallel.std_mean(adv)
    return (adv - mean) / (std + eps)


@torch.no_grad()
def step_taken(pi: Callable[[Tensor], Any], rows: Rows, band: float = 0.2) -> Metrics:
    """How far the policy `pi` has moved from the one that collected `rows`.

    approx_kl estimates KL(old || new) by E[r - 1 - log r] (nats), clip_fraction is the share of samples whose ratio r
    has left [1 - band, 1 + band], ratio_deviation is E|r - 1|. All three stay finite: log r counts within LOG_RATIOS.
    """
    log_ratio = (pi(rows.obs).log_prob(rows.action) - rows.logp_old).clamp(*LOG_RATIOS)
    off = (log_ratio.exp() - 1).abs()
    return {
        "policy/approx_kl": k3(log_ratio).mean(),
        "policy/clip_fraction": (off > band).float().mean(),
        "policy/ratio_deviation": off.mean(),
    }


def fit_value(
    v: nn.Module,
    opt: torch.optim.Optimizer,
    rows: Rows,
    epochs: int,
    minibatch_size: int,
    generator: torch.Generator,
    *,
    clip: float = 0.0,
    max_grad_norm: float | None = None,
) -> Tensor:
    """Regress the value network on the value targets, `epochs` passes of minibatches; returns the mean loss.

    E[(V - R)^2], or with `clip` E[max((V - R)^2, (V_old + clamp(V - V_old, +-clip) - R)^2)].
    """
    log: list[Tensor] = []
    for _ in range(epochs):
        for m in minibatches(rows, minibatch_size, generator):
            loss = minimize(value_loss(v(m.obs), m, clip), opt, max_grad_norm)
            log.append(loss)
    return torch.stack(log).mean()


def value_loss(v: Tensor, m: Rows, clip: float = 0.0) -> Tensor:
    """The loss of `fit_value` at predictions `v` [B]."""
    error = (v - m.ret).square()
    if clip:
        near = m.v_old + (v - m.v_old).clamp(-clip, clip)
        error = torch.maximum(error, (near - m.ret).square())
    return error.mean()


def explained_variance(rows: Rows) -> Tensor:
    """1 - Var(ret - V) / Var(ret), of the value network before the update; 1 is perfect, 0 no better than a mean."""
    return 1 - rows.adv.var() / (rows.ret.var() + 1e-8)
