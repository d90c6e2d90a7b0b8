"""Simple policy optimisation: PPO's loop with a quadratic penalty on the ratio instead of a clip.

Source: Xie et al. 2025 (ICML), arXiv:2401.16025 (objective: E[r A - |A| (r - 1)^2 / (2 eps)]).
Differs: the value loss is not clipped and a truncation bootstraps from the value of the true successor, as in our PPO;
the log-ratio is clamped to +-10, where the square would overflow; the released code halves the squared value error
before it weights it with 0.5, ours (like our PPO) does not: `vf_coef=0.25` is its weight. The policy network is the
smaller of the released two, 64-64; the code's default is 256-256-128-128-64-64 for the policy alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlctl.agents.actor_critic import (
    ActorCriticConfig,
    Rows,
    check_minibatches,
    explained_variance,
    rows_of,
    standardized,
    step_taken,
    value_loss,
)
from rlctl.nets import GaussianPolicy, ObsNorm, RewardScale, ValueNet
from rlctl.ops import adam, mean_of, minibatches, minimize
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class SPOConfig(ActorCriticConfig):
    """Defaults: those of the released code (8 worlds x 256 steps, 4 minibatches)."""

    band: Positive = 0.2
    """epsilon: each sample's objective peaks where its ratio is 1 +- band."""
    epochs: Count = 10
    """Passes over each rollout."""
    minibatch_size: Count = 512
    """Transitions per gradient step; must divide num_envs * horizon."""
    lr: Positive = 3e-4
    """Adam's learning rate at the start; it falls linearly to 0 over the run."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the squared value error."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""


class SPO(Agent):
    """Ratio held in a band by a penalty that pulls it back from outside."""

    regime = "on_policy"
    Config = SPOConfig
    cfg: SPOConfig

    def __init__(self, spec: Spec, cfg: SPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        check_minibatches(size, c.minibatch_size, standardize=True)
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr)
        self.total_updates = -(-c.steps // size)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        """E[-r A + |A| (r - 1)^2 / (2 band)] over a minibatch `[B]`."""
        return (-ratio * adv + adv.abs() * (ratio - 1).square() / (2 * self.cfg.band)).mean()

    def loss(self, m: Rows) -> tuple[Tensor, Metrics]:
        """policy_loss + vf_coef E[(V - R)^2] - ent_coef entropy of a minibatch, and the parts to log."""
        c = self.cfg
        pi = self.pi(m.obs)
        ratio = (pi.log_prob(m.action) - m.logp_old).clamp(-10.0, 10.0).exp()
        policy_loss, v_loss = self.policy_loss(ratio, standardized(m.adv)), value_loss(self.v(m.obs), m)
        loss = policy_loss + c.vf_coef * v_loss
        if c.ent_coef:
            loss = loss - c.ent_coef * pi.entropy().mean()
        return loss, {"losses/policy": policy_loss.detach(), "losses/value": v_loss.detach()}

    def update(self, batch: Batch) -> Metrics:
        """`epochs` passes of shuffled minibatches over one rollout `[T, N]`, then the normalisers move."""
        c = self.cfg
        self.opt.param_groups[0]["lr"] = c.lr * max(1.0 - self.counters["updates"] / self.total_updates, 0.0)
        self.counters["updates"] += 1
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        log: list[Metrics] = []
        for _ in range(c.epochs):
            for minibatch in minibatches(rows, c.minibatch_size, self.rng["sample"]):
                loss, metrics = self.loss(minibatch)
                minimize(loss, self.opt, c.max_grad_norm)
                log.append(metrics)
        metrics = mean_of(log) | step_taken(self.pi, rows, c.band) | self.pi.summary()
        metrics["value/explained_variance"] = explained_variance(rows)
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
