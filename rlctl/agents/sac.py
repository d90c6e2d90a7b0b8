"""Soft actor-critic with a learned temperature.

Source: Haarnoja et al. 2018, arXiv:1812.05905 (critic: eqs. 5-6, actor: eq. 7, temperature: eq. 18).
Differs: the temperature descends -log(alpha) (log pi + target) instead of -alpha (log pi + target), as most released
code does: same sign and fixed point, a step that does not shrink with alpha. Critic losses carry no factor 1/2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rlctl.nets import QEnsemble, TanhGaussianPolicy
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.train import OffPolicyConfig
from rlctl.types import Agent, AgentConfig, Batch, Fraction, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class SACSettings(AgentConfig):
    """What soft actor-critics share, the offline ones included."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate of log alpha."""
    alpha: Positive = 1.0
    """Temperature: the initial one, or the fixed one when learn_alpha is off."""
    learn_alpha: bool = True
    """Adjust the temperature to hold the policy's entropy at target_entropy."""
    target_entropy: float | None = None
    """Nats, of the density of actions in [-1, 1]; None takes -act_dim."""


@dataclass(frozen=True)
class SACConfig(OffPolicyConfig, SACSettings):
    """Defaults: those of the field (two critics of 256-256, one update per step, learned temperature)."""


class SAC(Agent):
    """Twin critics, squashed-Gaussian actor, automatic temperature."""

    regime = "off_policy"
    Config = SACConfig
    cfg: SACConfig

    def __init__(self, spec: Spec, cfg: SACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        if c.alpha <= 0:
            raise ValueError(f"alpha={c.alpha} is no temperature: it must be positive (1e-8 all but switches it off)")
        self.pi = TanhGaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = self.make_critics()
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log())
        self.target_entropy = -float(spec.act_dim) if c.target_entropy is None else c.target_entropy
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_alpha = adam([self.log_alpha], c.alpha_lr)

    def make_critics(self) -> QEnsemble:
        """Two critics."""
        return QEnsemble(self.spec.obs_dim, self.spec.act_dim, self.cfg.hidden, num=2)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the squashed Gaussian, or tanh of its mean."""
        pi = self.pi(obs)
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def critic_loss(self, b: Batch) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) (min_j Q_lagged_j(s', a') - alpha log pi).

        a' is a fresh draw from the current policy at s', log pi its log-density.
        """
        with torch.no_grad():
            next_action, logp = self.pi(b.next_obs).sample_log_prob(generator=self.rng["sample"])
            soft_v = self.q_lagged(b.next_obs, next_action).amin(0) - self.log_alpha.exp() * logp
            backup = b.reward + self.cfg.gamma * soft_v * ~b.terminated
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch) -> tuple[Tensor, Tensor]:
        """E[alpha log pi(a|s) - min_j Q_j(s, a)] with a reparameterised, and log pi(a|s) `[B]` (detached)."""
        action, logp = self.pi(b.obs).sample_log_prob(generator=self.rng["sample"])
        q = self.q(b.obs, action).amin(0)
        return (self.log_alpha.detach().exp() * logp - q).mean(), logp.detach()

    def alpha_loss(self, logp: Tensor) -> Tensor:
        """-E[log alpha (log pi + target entropy)]: alpha rises while the entropy is below its target."""
        return -(self.log_alpha * (logp + self.target_entropy)).mean()

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, temperature, lagged critics; all three losses see the temperature of before this update."""
        self.counters["updates"] += 1
        critic_loss = minimize(self.critic_loss(b), self.opt_q)
        actor_loss, logp = self.actor_loss(b)
        minimize(actor_loss, self.opt_pi)
        alpha = self.log_alpha.detach().exp()
        if self.cfg.learn_alpha:
            minimize(self.alpha_loss(logp), self.opt_alpha)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return {
            "losses/critic": critic_loss,
            "losses/actor": actor_loss.detach(),
            "policy/entropy": -logp.mean(),
            "policy/alpha": alpha,
        }
