"""Proximal policy optimisation with the clipped ratio.

Source: Schulman et al. 2017, arXiv:1707.06347 (objective: eq. 7; advantages: arXiv:1506.02438, eq. 16). Details that
the MuJoCo results rest on: Huang et al. 2022, "The 37 implementation details of PPO".
Differs: a truncation bootstraps from the value of the true successor (the paper's code treats it as a termination);
the value loss is not clipped (Andrychowicz et al. 2021, arXiv:2006.05990, find no gain); log pi_old and V are computed
for the whole rollout at the start of the update, which equals recording them while acting since nothing moves between.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlctl.agents.actor_critic import (
    ActorCriticConfig,
    Rows,
    check_minibatches,
    clipped_surrogate,
    explained_variance,
    rows_of,
    standardized,
    step_taken,
)
from rlctl.nets import GaussianPolicy, Normal, ObsNorm, RewardScale, ValueNet
from rlctl.ops import adam, mean_of, minibatches, minimize
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class PPOConfig(ActorCriticConfig):
    """Defaults: the field's MuJoCo set (8 worlds x 256 steps, 10 epochs of minibatches of 64)."""

    clip: Positive = 0.2
    """epsilon: the ratio counts only within [1 - clip, 1 + clip]."""
    epochs: Count = 10
    """Passes over each rollout."""
    minibatch_size: Count = 64
    """Transitions per gradient step; must divide num_envs * horizon."""
    lr: Positive = 3e-4
    """Adam's learning rate at the start."""
    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.5
    """Weight of the squared value error."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""
    normalize_advantage: bool = True
    """Standardise the advantages of each minibatch."""


class PPO(Agent):
    """PPO with separate policy and value networks."""

    regime = "on_policy"
    Config = PPOConfig
    cfg: PPOConfig

    def __init__(self, spec: Spec, cfg: PPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        check_minibatches(size, c.minibatch_size, standardize=c.normalize_advantage)
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr, eps=1e-5)
        self.total_updates = -(-c.steps // size)  # the loop finishes the rollout it has begun

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def prepare_rollout(self, batch: Batch) -> Rows:
        """What the losses need of a rollout `[T, N]`, flattened to `[T * N]`, all of it from before the update."""
        return rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, self.cfg.gamma, self.cfg.lam)

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        """-E[min(r A, clip(r) A)] over a minibatch `[B]`."""
        return clipped_surrogate(ratio, adv, self.cfg.clip)

    def value_loss(self, v: Tensor, ret: Tensor) -> Tensor:
        """E[(V - R)^2] over a minibatch `[B]`."""
        return (v - ret).square().mean()

    def penalty(self, pi: Normal) -> Tensor | None:
        """-ent_coef entropy, where `pi` are the policy's distributions in a minibatch; None where it weighs nothing."""
        return -self.cfg.ent_coef * pi.entropy().mean() if self.cfg.ent_coef else None

    def grad_bound(self) -> float:
        """Largest L2 norm of the gradient of a step."""
        return self.cfg.max_grad_norm

    def part_done(self) -> float:
        """Part of the learning rate's way to 0 that lies behind, in [0, 1]."""
        return min(self.counters["updates"] / self.total_updates, 1.0)

    def loss(self, m: Rows) -> tuple[Tensor, Metrics]:
        """policy_loss + vf_coef value_loss + penalty of a minibatch, and the parts to log."""
        c = self.cfg
        adv = standardized(m.adv) if c.normalize_advantage else m.adv
        pi = self.pi(m.obs)
        ratio = (pi.log_prob(m.action) - m.logp_old).exp()
        policy_loss, value_loss = self.policy_loss(ratio, adv), self.value_loss(self.v(m.obs), m.ret)
        loss = policy_loss + c.vf_coef * value_loss
        if (penalty := self.penalty(pi)) is not None:
            loss = loss + penalty
        return loss, {"losses/policy": policy_loss.detach(), "losses/value": value_loss.detach()}

    def update(self, batch: Batch) -> Metrics:
        """`epochs` passes of shuffled minibatches over one rollout `[T, N]`, then the normalisers move."""
        c = self.cfg
        if c.anneal_lr:
            self.opt.param_groups[0]["lr"] = c.lr * (1.0 - self.part_done())
        self.counters["updates"] += 1
        rows = self.prepare_rollout(batch)
        log: list[Metrics] = []
        for _ in range(c.epochs):
            for minibatch in minibatches(rows, c.minibatch_size, self.rng["sample"]):
                loss, metrics = self.loss(minibatch)
                minimize(loss, self.opt, self.grad_bound())
                log.append(metrics)
        metrics = mean_of(log) | step_taken(self.pi, rows, c.clip)
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics | self.pi.summary() | {"value/explained_variance": explained_variance(rows)}
