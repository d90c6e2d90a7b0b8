"""Probabilistic mixture of experts in PPO: a Gaussian mixture as the policy, its gate learned twice over.

Source: Ren et al. 2021, arXiv:2104.09122 (frequency loss); the PPO variant after a coauthor's code,
github.com/quantumiracle/Popular-RL-Algorithms. The ratio is that of the full mixture density, so PPO's gradient reaches
the gate too; the frequency loss adds a regression onto the component whose fresh draw has the largest Q.
Differs: log-densities by logsumexp (the code's log of a sum of exponentials underflows where actions have many
dimensions); Q has its own Adam, so that one component gives exactly our PPO, and PyTorch's initialisation; Q sees
actions as the environment does, clipped to [-1, 1]; the value loss is not clipped and carries no factor 1/2
(`vf_coef=0.25` is the code's weight); the learning rate falls linearly as in our PPO. There is a deterministic action,
by the gate or by Q (`deterministic`), as in our PMOE-SAC.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
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
    value_loss,
)
from rlctl.nets import MixturePolicy, NormalMixture, ObsNorm, QEnsemble, RewardScale, ValueNet
from rlctl.nets.policy import GateInput
from rlctl.ops import adam, mean_of, minibatches, minimize
from rlctl.ops.mixtures import Deterministic, frequency_loss, gate_use
from rlctl.ops.selection import best_of
from rlctl.types import Agent, Batch, Count, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class PMOEPPOConfig(ActorCriticConfig):
    """Defaults: those of our PPO, five components as in the coauthor's code."""

    num_components: Count = 5
    """Components of the mixture; 1 is PPO."""
    gate: GateInput = "obs"
    """What the gate sees: the observation, or the last hidden layer of the policy (detached)."""
    q_hidden: Widths = (64, 64, 64)
    """Widths of the hidden layers of the Q network that names the best component."""
    freq_coef: NonNegative = 1.0
    """Weight of the gate's frequency loss."""
    deterministic: Deterministic = "gate"
    """The deterministic action is the mean of one component: gate takes that of the largest weight, value the one whose
    mean, as the environment clips it, has the largest Q."""
    clip: Positive = 0.2
    """epsilon: the ratio counts only within [1 - clip, 1 + clip]."""
    epochs: Count = 10
    """Passes over each rollout."""
    minibatch_size: Count = 64
    """Transitions per gradient step; must divide num_envs * horizon."""
    lr: Positive = 3e-4
    """Adam's learning rate at the start, of all networks; it falls linearly to 0 over the run."""
    vf_coef: NonNegative = 0.5
    """Weight of the squared value error."""
    max_grad_norm: Positive = 0.5
    """The gradient of one step is rescaled to at most this L2 norm."""


class PMOEPPO(Agent):
    """PPO on a Gaussian mixture, with a Q network that tells the gate which component is best."""

    regime = "on_policy"
    Config = PMOEPPOConfig
    cfg: PMOEPPOConfig

    def __init__(self, spec: Spec, cfg: PMOEPPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        size = spec.num_envs * c.horizon
        check_minibatches(size, c.minibatch_size, standardize=True)
        self.obs_norm = ObsNorm(spec.obs_dim, enabled=c.normalize_obs)
        self.reward_scale = RewardScale(spec.num_envs, c.gamma, enabled=c.normalize_reward)
        self.pi = MixturePolicy(
            spec.obs_dim, spec.act_dim, c.hidden, c.num_components, c.activation, log_std=c.log_std, gate=c.gate
        )
        self.v = ValueNet(spec.obs_dim, c.hidden, c.activation, orthogonal=1.0)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.q_hidden, num=1)
        self.opt = adam([*self.pi.parameters(), *self.v.parameters()], c.lr, eps=1e-5)
        self.opt_q = adam(self.q.parameters(), c.lr, eps=1e-5)
        self.total_updates = -(-c.steps // size)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the mixture, unclipped, or the mean of one component, named by gate or Q (`deterministic`)."""
        seen = self.obs_norm(obs)
        pi = self.pi(seen)
        if explore:
            return pi.sample(generator=self.rng["action"]), {}
        if self.cfg.deterministic == "gate":
            return pi.mode, {}
        return best_of(pi.components.mode, self.q(seen, pi.components.mode.clamp(-1, 1))[0]), {}

    def policy_loss(self, ratio: Tensor, adv: Tensor) -> Tensor:
        """-E[min(r A, clip(r) A)] over a minibatch `[B]`, r of the mixture's density."""
        return clipped_surrogate(ratio, adv, self.cfg.clip)

    @torch.no_grad()
    def best_component(self, pi: NormalMixture, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """Index [B] of the component whose draw, by `noise` [B, K, A], has the largest Q; no draw if there is but one.

        No gradient reaches components or Q from here.
        """
        if pi.num == 1:
            return torch.zeros(len(obs), dtype=torch.int64, device=obs.device)
        action = pi.components.sample(noise, self.rng["sample"])
        return self.q(obs, action.clamp(-1, 1))[0].argmax(-1)

    def q_loss(self, m: Rows) -> Tensor:
        """E[(Q(s, a) - R)^2] on the actions taken, R the value target."""
        return (self.q(m.obs, m.action.clamp(-1, 1))[0] - m.ret).square().mean()

    def loss(self, m: Rows) -> tuple[Tensor, Metrics]:
        """policy_loss + vf_coef E[(V - R)^2] + freq_coef frequency_loss of a minibatch, and the parts to log."""
        c, pi = self.cfg, self.pi(m.obs)
        ratio = (pi.log_prob(m.action) - m.logp_old).exp()
        policy_loss, v_loss = self.policy_loss(ratio, standardized(m.adv)), value_loss(self.v(m.obs), m)
        gate_loss = frequency_loss(pi.weights, self.best_component(pi, m.obs))
        return policy_loss + c.vf_coef * v_loss + c.freq_coef * gate_loss, {
            "losses/policy": policy_loss.detach(),
            "losses/value": v_loss.detach(),
            "losses/gate": gate_loss.detach(),
        }

    @torch.no_grad()
    def utilisation(self, rows: Rows) -> Metrics:
        """How much each component is used (`gate_use`), the mean standard deviation, and the entropy (nats).

        A mixture's entropy has no closed form. This one is -E[log pi(a|s)] over the actions of the rollout, which the
        policy drew itself: that of the policy before the update, without a further random number.
        """
        return {
            "policy/entropy": -rows.logp_old.mean(),
            "policy/std": self.pi.log_std.exp().mean(),
            **gate_use(self.pi(rows.obs).weights),
        }

    def update(self, batch: Batch) -> Metrics:
        """`epochs` passes of shuffled minibatches over one rollout `[T, N]`, then the normalisers move."""
        c = self.cfg
        for opt in (self.opt, self.opt_q):
            opt.param_groups[0]["lr"] = c.lr * max(1.0 - self.counters["updates"] / self.total_updates, 0.0)
        self.counters["updates"] += 1
        rows = rows_of(batch, self.pi, self.v, self.obs_norm, self.reward_scale, c.gamma, c.lam)
        log: list[Metrics] = []
        for _ in range(c.epochs):
            for m in minibatches(rows, c.minibatch_size, self.rng["sample"]):
                loss, metrics = self.loss(m)
                minimize(loss, self.opt, c.max_grad_norm)
                metrics["losses/critic"] = minimize(self.q_loss(m), self.opt_q, c.max_grad_norm)
                log.append(metrics)
        metrics = mean_of(log) | step_taken(self.pi, rows, c.clip) | self.utilisation(rows)
        metrics["value/explained_variance"] = explained_variance(rows)
        self.obs_norm.update(batch.obs)
        self.reward_scale.update(batch.reward, batch.terminated | batch.truncated)
        return metrics
