"""Mirror descent policy optimisation, on-policy.

Source: Tomar et al. 2020, arXiv:2005.09814 (on-policy update: eq. 7 and algorithm 1).
Differs: the step size anneals as t_k = 1 - k/K for k = 0..K-1, so it runs from 1 to 1/K and is never 0 (the released
code's runs from 1 + 1/K to 2/K); the old policy is the one that collected the rollout from the first iteration on (the
released code compares its first one with an unrelated random network); the learning rate stays what it is, as in the
released code, where the paper's "loaded" variant lowers it; a truncation bootstraps from the value of the true
successor.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

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
from rlctl.ops import adam, minimize
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class MDPOConfig(ActorCriticConfig):
    """Defaults: those of the paper's "loaded" variant, but for its falling learning rate (see the module's `Differs:`)
    and its 2048 steps being 8 worlds x 256."""

    policy_steps: Count = 10
    """m: gradient steps per iteration, each on the whole rollout."""
    lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""
    v_lr: Positive = 3e-4
    """Adam's learning rate of the value network."""
    v_epochs: Count = 5
    """Passes of the value network over each rollout."""
    v_minibatch_size: Count = 128
    """Transitions per value step."""
    v_clip: NonNegative = 0.2
    """Predictions count only within this distance of the old ones; 0 for a plain squared error."""


class MDPO(Agent):
    """Surrogate minus a KL term whose weight grows over the run, maximised by several full-batch steps."""

    regime = "on_policy"
    Config = MDPOConfig
    cfg: MDPOConfig

    def __init__(self, spec: Spec, cfg: MDPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt_pi = adam(self.pi.parameters(), c.lr, eps=1e-5)
        self.opt_v = adam(self.v.parameters(), c.v_lr, eps=1e-5)
        self.total_updates = -(-c.steps // (spec.num_envs * c.horizon))

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def step_size(self) -> float:
        """t_k = 1 - k/K, at least 1/K also past the planned end of the run."""
        return max(1.0 - self.counters["updates"] / self.total_updates, 1.0 / self.total_updates)

    def policy_loss(self, rows: Rows, adv: Tensor, old: Normal, step_size: float) -> Tensor:
        """-E[r A] + (1 / t_k) E_s KL(pi(.|s) || pi_old(.|s)), over the rollout `[B]`."""
        pi = self.pi(rows.obs)
        ratio = (pi.log_prob(rows.action) - rows.logp_old).exp()
        return -(ratio * adv).mean() + pi.kl(old).mean() / step_size

    def update(self, batch: Batch) -> Metrics:
        """`policy_steps` steps on the whole rollout `[T, N]`, then the value network, then the normalisers."""
        c = self.cfg
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        adv, old = standardized(rows.adv), self.pi(rows.obs).detach()
        for _ in range(c.policy_steps):
            policy_loss = minimize(self.policy_loss(rows, adv, old, self.step_size()), self.opt_pi, c.max_grad_norm)
        self.counters["updates"] += 1
        generator, norm = self.rng["sample"], c.max_grad_norm
        v_loss = fit_value(
            self.v, self.opt_v, rows, c.v_epochs, c.v_minibatch_size, generator, clip=c.v_clip, max_grad_norm=norm
        )
        metrics = {"losses/policy": policy_loss, "losses/value": v_loss} | step_taken(self.pi, rows)
        metrics |= self.pi.summary() | {"value/explained_variance": explained_variance(rows)}
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
