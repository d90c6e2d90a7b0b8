"""Trust-region policy optimisation.

Source: Schulman et al. 2015, arXiv:1502.05477 (constrained problem: eq. 14; conjugate gradient and line search:
appendix C), advantages of arXiv:1506.02438.
Differs: the divergence is KL(new || old) by default, as in the packages whose results we compare with; the paper's
KL(old || new) is `kl="old_new"` (the same Fisher matrix, another acceptance test). It is summed over action dimensions,
as in the paper; sb3-contrib averages over them: its 0.01 nats and its damping are `act_dim` times as much here.
Advantages are standardised over the rollout, observations and rewards normalised, and the Fisher matrix is damped, as
in those packages. A truncation bootstraps from the value of the true successor. Every backtracking candidate is
evaluated (see `rlctl.ops.trust_region.backtrack`).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl import parallel
from rlctl.agents.actor_critic import (
    ActorCriticConfig,
    Rows,
    explained_variance,
    fit_value,
    rows_of,
    standardized,
    step_taken,
)
from rlctl.nets import GaussianPolicy, Normal, ObsNorm, RewardScale, ValueNet
from rlctl.ops import adam
from rlctl.ops.trust_region import backtrack, fisher_vector_product, flat, natural_step
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class TRPOConfig(ActorCriticConfig):
    """Defaults: those of the field (a step of 0.01 nats from 2048 transitions)."""

    delta: Positive = 0.01
    """Trust region: bound of the mean KL divergence of one update, in nats."""
    kl: Literal["new_old", "old_new"] = "new_old"
    """Direction of that divergence: KL(new || old) or KL(old || new)."""
    cg_iterations: Count = 15
    """Iterations of conjugate gradient."""
    damping: NonNegative = 0.1
    """Added to the diagonal of the Fisher matrix."""
    shrink: Fraction = 0.8
    """Factor between backtracking candidates."""
    backtracks: Count = 10
    """Backtracking candidates, the full step included."""
    v_lr: Positive = 1e-3
    """Adam's learning rate of the value network."""
    v_epochs: Count = 10
    """Passes of the value network over each rollout."""
    v_minibatch_size: Count = 128
    """Transitions per value step."""


class TRPO(Agent):
    """Natural-gradient step inside a KL ball, with separate policy and value networks."""

    regime = "on_policy"
    decides_together = True
    Config = TRPOConfig
    cfg: TRPOConfig

    def __init__(self, spec: Spec, cfg: TRPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt_v = adam(self.v.parameters(), c.v_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def moved_by_hand(self) -> Iterable[nn.Parameter]:
        """The policy: its step comes from a line search, not from an optimiser."""
        return self.pi.parameters()

    def surrogate(self, pi: Normal, rows: Rows, adv: Tensor) -> Tensor:
        """E[r A] of the distribution `pi` at the rows, to be maximised; at the old one it has the policy gradient."""
        return ((pi.log_prob(rows.action) - rows.logp_old).exp() * adv).mean()

    def divergence(self, pi: Normal, old: Normal) -> Tensor:
        """Mean KL divergence (nats) between `pi` and `old`, a detached copy of it, in the configured direction."""
        return (pi.kl(old) if self.cfg.kl == "new_old" else old.kl(pi)).mean()

    def policy_step(self, rows: Rows) -> Metrics:
        """The largest step of the backtracking that keeps the divergence and raises the surrogate, or none at all."""
        c, params = self.cfg, list(self.pi.parameters())
        adv = standardized(rows.adv)
        pi = self.pi(rows.obs)
        old, surrogate = pi.detach(), self.surrogate(pi, rows, adv)
        gradient = parallel.mean(flat(torch.autograd.grad(surrogate, params, retain_graph=True)))
        product = fisher_vector_product(self.divergence(pi, old), params, c.damping)
        step = natural_step(product, gradient, c.delta, c.cg_iterations)

        def accept() -> Tensor:
            new = self.pi(rows.obs)
            better = parallel.mean(self.surrogate(new, rows, adv)) > parallel.mean(surrogate)
            return better & (parallel.mean(self.divergence(new, old)) <= c.delta)

        scale = backtrack(params, step, accept, c.shrink, c.backtracks)
        with torch.no_grad():
            new = self.pi(rows.obs)
            return {
                "losses/policy": -self.surrogate(new, rows, adv),
                "policy/kl": self.divergence(new, old),
                "policy/step_scale": scale,
            }

    def update(self, batch: Batch) -> Metrics:
        """One policy step on the whole rollout `[T, N]`, then the value network, then the normalisers."""
        c = self.cfg
        self.counters["updates"] += 1
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        metrics = self.policy_step(rows)
        metrics["losses/value"] = fit_value(
            self.v, self.opt_v, rows, c.v_epochs, c.v_minibatch_size, self.rng["sample"]
        )
        metrics |= step_taken(self.pi, rows) | self.pi.summary()
        metrics["value/explained_variance"] = explained_variance(rows)
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
