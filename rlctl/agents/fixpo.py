"""FixPO: a trust region on every state of the batch by a KL penalty and a repair phase.

Source: Zentner et al. 2023, arXiv:2312.05405 (loss: L_pi + beta KL; multiplier: L_beta = beta (eps - C max KL);
algorithm 1).
Differs: the multiplier has a floor (at 0 it could not repair anything) and the repair a cap on its sweeps; an update
that reaches the cap gives up what it could not repair and falls back to the policy of the last epoch that ended inside
the bound. Rewards are divided by the running spread of the discounted return, which scales advantages too; the released
code's return normalisation scales the targets of the value network alone. The value loss is not clipped; a truncation
bootstraps from the value of the true successor. How often the repair sweeps depends on what it finds, so an update
reads numbers on the host and cannot be captured.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlctl import parallel
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
from rlctl.nets import GaussianPolicy, Normal, ObsNorm, RewardScale, ValueNet
from rlctl.ops import adam, apply_gradients, gradients, mean_of, minimize
from rlctl.ops.trust_region import flat, write
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec


@dataclass(frozen=True)
class FixPOConfig(ActorCriticConfig):
    """Defaults: those of the released launcher, but for the rollout (8 worlds x 256 steps instead of 64 x 128)."""

    log_std: float = -0.5
    """Initial log standard deviation of the actions, one free parameter per dimension."""
    max_kl: Positive = 0.5
    """eps: bound of KL(old || new) in every state of the rollout, in nats."""
    beta: Positive = 1.0
    """Initial weight of the KL penalty."""
    beta_lr: Positive = 0.01
    """Adam's learning rate of that weight."""
    beta_floor: Positive = 1e-3
    """The weight never falls below this."""
    margin: Positive = 3.0
    """C: the weight grows as soon as the largest divergence exceeds max_kl / margin."""
    epochs: Count = 10
    """Passes over each rollout, each followed by the repair."""
    minibatch_size: Count = 512
    """Transitions per gradient step; must divide num_envs * horizon."""
    fixup_minibatch_size: Count = 1024
    """Transitions per repair step (the last one may be smaller)."""
    fixup_sweeps: Count = 20
    """Sweeps of the repair after one epoch, at most."""
    lr: Positive = 3e-4
    """Adam's learning rate at the start."""
    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run."""
    ent_coef: NonNegative = 0.0
    """Weight of the entropy bonus."""
    vf_coef: NonNegative = 0.1
    """Weight of the squared value error."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""
    normalize_advantage: bool = False
    """Standardise the advantages of each minibatch."""


class FixPO(Agent):
    """Penalised policy gradient, then a sweep that brings every state of the batch back inside the bound."""

    regime = "on_policy"
    decides_together = True
    host_reads = "its repair phase sweeps until no state violates the bound"
    Config = FixPOConfig
    cfg: FixPOConfig

    def __init__(self, spec: Spec, cfg: FixPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        check_minibatches(size, c.minibatch_size, standardize=c.normalize_advantage)
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = GaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, c.activation, log_std=c.log_std)
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.beta = nn.Parameter(torch.tensor(float(c.beta)))
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr)
        self.opt_beta = adam([self.beta], c.beta_lr)
        self.total_updates = -(-c.steps // size)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The unclipped Gaussian action; the environment clips its own copy to [-1, 1]."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def divergence(self, obs: Tensor, old: Normal) -> Tensor:
        """KL(old || new) of each row `[B]`, in nats."""
        return old.kl(self.pi(obs))

    def worst(self, rows: Rows, old: Normal) -> Tensor:
        """The largest divergence of any row, of all processes that share the update."""
        return parallel.largest(self.divergence(rows.obs, old).max())

    def loss(self, m: Rows, old: Normal) -> tuple[Tensor, Tensor, Metrics]:
        """-E[r A] + beta E[KL] + vf_coef E[(V - R)^2] - ent_coef H, the KL of each row, and what to log."""
        c, pi = self.cfg, self.pi(m.obs)
        adv = standardized(m.adv) if c.normalize_advantage else m.adv
        ratio = (pi.log_prob(m.action) - m.logp_old).exp()
        kl = old.kl(pi)
        policy_loss, v_loss = -(ratio * adv).mean(), value_loss(self.v(m.obs), m)
        loss = policy_loss + self.beta.detach() * kl.mean() + c.vf_coef * v_loss
        if c.ent_coef:
            loss = loss - c.ent_coef * pi.entropy().mean()
        return loss, kl.detach(), {"losses/policy": policy_loss.detach(), "losses/value": v_loss.detach()}

    def beta_loss(self, kl: Tensor) -> Tensor:
        """beta (eps - C max KL): beta grows while the largest divergence exceeds eps / C."""
        return self.beta * (self.cfg.max_kl - self.cfg.margin * parallel.largest(kl.max()))

    def beta_step(self, kl: Tensor) -> None:
        """One step of beta on the divergences `kl` [B] of a minibatch."""
        minimize(self.beta_loss(kl), self.opt_beta)
        with torch.no_grad():
            self.beta.clamp_(min=self.cfg.beta_floor)

    def penalised_epoch(self, rows: Rows, old: Normal) -> list[Metrics]:
        """Phase 1: one pass of minibatches over the penalised loss."""
        log: list[Metrics] = []
        order = torch.randperm(len(rows.adv), generator=self.rng["sample"], device=rows.adv.device)
        for part in torch.split(order, self.cfg.minibatch_size):
            m = Rows(*[x[part] for x in rows])
            loss, kl, metrics = self.loss(m, Normal(old.mean[part], old.log_std))
            minimize(loss, self.opt, self.cfg.max_grad_norm)
            self.beta_step(kl)
            log.append(metrics)
        return log

    def fixup(self, rows: Rows, old: Normal) -> tuple[bool, int]:
        """Phase 2: repair steps on beta E[KL] wherever a state violates the bound, until none does or the cap.

        Returns whether all states are inside, and the number of repair steps.
        """
        c, steps = self.cfg, 0
        for _ in range(c.fixup_sweeps):
            with torch.no_grad():
                if self.worst(rows, old) <= c.max_kl:
                    return True, steps
            for part in torch.split(torch.arange(len(rows.adv), device=rows.adv.device), c.fixup_minibatch_size):
                kl = self.divergence(rows.obs[part], Normal(old.mean[part], old.log_std))
                if parallel.largest(kl.detach().max()) > c.max_kl:
                    # the value network does not take part: its gradients are None, and Adam leaves it alone
                    grads = gradients(self.beta.detach() * kl.mean(), self.opt, allow_unused=True)
                    apply_gradients(self.opt, grads, c.max_grad_norm)
                    self.beta_step(kl.detach())
                    steps += 1
        with torch.no_grad():
            return bool(self.worst(rows, old) <= c.max_kl), steps

    def update(self, batch: Batch) -> Metrics:
        """`epochs` times both phases on a rollout `[T, N]`, then the normalisers move.

        Where the repair reaches its cap, the policy goes back to what it was after the last epoch that ended inside the
        bound (before the update, if none did) and the epochs left are skipped. The policy alone: value network,
        multiplier and Adam's moments stay where they are.
        """
        c = self.cfg
        if c.anneal_lr:
            self.opt.param_groups[0]["lr"] = c.lr * max(1.0 - self.counters["updates"] / self.total_updates, 0.0)
        self.counters["updates"] += 1
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        with torch.no_grad():
            old = self.pi(rows.obs).detach()
        params = list(self.pi.parameters())
        inside, repairs, log = flat(params).detach(), 0, []
        for _ in range(c.epochs):
            log += self.penalised_epoch(rows, old)
            repaired, steps = self.fixup(rows, old)
            repairs += steps
            if not repaired:
                write(params, inside)
                break
            inside = flat(params).detach()
        with torch.no_grad():
            kl = self.divergence(rows.obs, old)
        metrics = mean_of(log) | step_taken(self.pi, rows) | self.pi.summary()
        metrics |= {"policy/kl": kl.mean(), "policy/kl_max": kl.max(), "policy/beta": self.beta.detach().clone()}
        metrics["policy/fixup_steps"] = torch.tensor(float(repairs), device=kl.device)
        metrics["value/explained_variance"] = explained_variance(rows)
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
