"""Proximal policy optimisation with the clipped ratio.

Source: Schulman et al. 2017, arXiv:1707.06347 (objective: eq. 7; advantages: arXiv:1506.02438, eq. 16). Details that
the MuJoCo results rest on: Huang et al. 2022, "The 37 implementation details of PPO".
Differs: a truncation bootstraps from the value of the true successor (the paper's code treats it as a termination);
the value loss is not clipped (Andrychowicz et al. 2021, arXiv:2006.05990, find no gain); log pi_old and V are computed
for the whole rollout at the start of the update, which equals recording them while acting since nothing moves between.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from rlctl.nets import GaussianPolicy, ObsNorm, RewardScale, ValueNet
from rlctl.nets.mlp import Activation
from rlctl.ops import adam, gae, mean_of, minibatches, minimize
from rlctl.train import OnPolicyConfig
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class PPOConfig(OnPolicyConfig):
    """Defaults: the field's MuJoCo set (8 worlds x 256 steps, 10 epochs of minibatches of 64)."""

    hidden: Widths = (64, 64)
    """Widths of the hidden layers of policy and value network (nothing is shared)."""
    activation: Activation = "tanh"
    """Activation of both networks: relu, tanh, elu, silu or gelu."""
    log_std: float = 0.0
    """Initial log standard deviation of the actions, one free parameter per dimension."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    lam: Fraction = 0.95
    """lambda of the generalised advantage estimates."""
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
    normalize_obs: bool = True
    """Standardise observations with running statistics (clipped to +-10)."""
    normalize_reward: bool = True
    """Divide rewards by the running spread of the discounted return (clipped to +-10)."""


class Rows(NamedTuple):
    """A rollout as the losses see it, `[B, ...]`."""

    obs: Tensor
    """Normalised."""
    action: Tensor
    logp_old: Tensor
    adv: Tensor
    ret: Tensor
    """Value target."""


class PPO(Agent):
    """PPO with separate policy and value networks."""

    regime = "on_policy"
    Config = PPOConfig
    cfg: PPOConfig

    def __init__(self, spec: Spec, cfg: PPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        if size % c.minibatch_size:
            raise ValueError(f"minibatch_size={c.minibatch_size} does not divide a rollout of {size} transitions")
        if c.minibatch_size == 1 and c.normalize_advantage:
            raise ValueError("minibatch_size=1 has no spread to normalise advantages by: set normalize_advantage=false")
        self.obs_norm = ObsNorm(spec.obs_dim)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr, eps=1e-5)
        self.total_updates = -(-c.steps // size)  # the loop finishes the rollout it has begun

    def normalize(self, obs: Tensor) -> Tensor:
        """Observations as the networks see them."""
        return self.obs_norm(obs) if self.cfg.normalize_obs else obs

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.normalize(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    @torch.no_grad()
    def advantages(self, batch: Batch, obs: Tensor) -> tuple[Tensor, Tensor]:
        """Advantages and value targets (lambda-returns), both `[T, N]`; `obs` is `batch.obs` normalised."""
        reward = self.reward_scale(batch.reward) if self.cfg.normalize_reward else batch.reward
        v, next_v = self.v(obs), self.v(self.normalize(batch.next_obs))
        adv = gae(reward, v, next_v, batch.terminated, batch.truncated, self.cfg.gamma, self.cfg.lam)
        return adv, adv + v

    @torch.no_grad()
    def prepare_rollout(self, batch: Batch) -> Rows:
        """What the losses need of a rollout `[T, N]`, flattened to `[T * N]`, all of it from before the update."""
        obs = self.normalize(batch.obs)
        adv, ret = self.advantages(batch, obs)
        logp_old = self.pi(obs).log_prob(batch.action)
        return Rows(*[x.flatten(0, 1) for x in (obs, batch.action, logp_old, adv, ret)])

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        """-E[min(r A, clip(r) A)] over a minibatch `[B]`."""
        clipped = ratio.clamp(1 - self.cfg.clip, 1 + self.cfg.clip)
        return -torch.minimum(ratio * adv, clipped * adv).mean()

    def value_loss(self, v: Tensor, ret: Tensor) -> Tensor:
        """E[(V - R)^2] over a minibatch `[B]`."""
        return (v - ret).square().mean()

    def loss(self, m: Rows) -> tuple[Tensor, Metrics]:
        """policy_loss + vf_coef value_loss - ent_coef entropy of a minibatch, and the parts to log."""
        c = self.cfg
        adv = m.adv
        if c.normalize_advantage:
            std, mean = torch.std_mean(adv)
            adv = (adv - mean) / (std + 1e-8)
        pi = self.pi(m.obs)
        ratio = (pi.log_prob(m.action) - m.logp_old).exp()
        policy_loss, value_loss = self.policy_loss(ratio, adv), self.value_loss(self.v(m.obs), m.ret)
        loss = policy_loss + c.vf_coef * value_loss
        if c.ent_coef:
            loss = loss - c.ent_coef * pi.entropy().mean()
        return loss, {"losses/policy": policy_loss.detach(), "losses/value": value_loss.detach()}

    @torch.no_grad()
    def step_taken(self, rows: Rows) -> Metrics:
        """How far the policy has moved from the one that collected `rows`."""
        pi = self.pi(rows.obs)
        log_ratio = pi.log_prob(rows.action) - rows.logp_old
        ratio = log_ratio.exp()
        return {
            "policy/approx_kl": (ratio - 1 - log_ratio).mean(),
            "policy/clip_fraction": ((ratio - 1).abs() > self.cfg.clip).float().mean(),
            "policy/entropy": pi.entropy().mean(),
            "policy/std": pi.log_std.exp().mean(),
        }

    def update(self, batch: Batch) -> Metrics:
        """`epochs` passes of shuffled minibatches over one rollout `[T, N]`, then the normalisers move."""
        c = self.cfg
        if c.anneal_lr:
            self.opt.param_groups[0]["lr"] = c.lr * max(1.0 - self.counters["updates"] / self.total_updates, 0.0)
        self.counters["updates"] += 1
        rows = self.prepare_rollout(batch)
        log: list[Metrics] = []
        for _ in range(c.epochs):
            for minibatch in minibatches(rows, c.minibatch_size, self.rng["sample"]):
                loss, metrics = self.loss(minibatch)
                minimize(loss, self.opt, c.max_grad_norm)
                log.append(metrics)
        explained = 1 - rows.adv.var() / (rows.ret.var() + 1e-8)
        metrics = mean_of(log) | self.step_taken(rows) | {"value/explained_variance": explained}
        if c.normalize_obs:
            self.obs_norm.update(batch.obs)
        if c.normalize_reward:
            self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
