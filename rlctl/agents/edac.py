"""Ensemble-diversified actor-critic: soft actor-critic on the smallest of many critics, kept different. eta = 0: SAC-N.

Source: An et al. 2021, arXiv:2110.01548, section 4 and algorithm 1; official code github.com/snu-mllab/EDAC.
Differs: the temperature descends -log(alpha) (log pi + target), as in our SAC. The last layers start within +-1e-3
(actor) and +-3e-3 (critics), as in the official code. That leaves the temperature at its initial value where the backup
has no entropy term: `entropy_backup=false learn_alpha=false` does.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.sac import SACSettings
from rlctl.nets import QEnsemble, TanhGaussianPolicy
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.offline import SampledBackup, ensemble_diversity, sampled_backup
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Metrics, NonNegative, Spec, Widths


@dataclass(frozen=True)
class EDACConfig(OfflineRLConfig, SACSettings):
    """Defaults: those of the paper, with the ensemble for HalfCheetah and Walker2d (Hopper: 50 critics;
    Adroit: reward standardise)."""

    steps: Count = 3_000_000
    """Gradient steps."""
    num_critics: Count = 10
    """Critics in the ensemble (SAC-N takes more: 10 for HalfCheetah, 20 for Walker2d, 200 for Hopper)."""
    eta: NonNegative = 1.0
    """Weight of the critics' diversity (5 on medium-expert data); 0 is SAC-N."""
    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of actor and critics."""
    entropy_backup: bool = True
    """Count the successor's entropy in the backup."""
    backup: Literal["one"] | SampledBackup = "one"
    """Successor action: one draw, or the best of several by each critic (max-min) or by the smallest (min-max)."""
    backup_actions: Count = 10
    """Draws of max-min and min-max."""


class EDAC(OfflineLearner):
    """N critics, squashed-Gaussian actor, automatic temperature, diversity of the critics' action gradients."""

    Config = EDACConfig
    cfg: EDACConfig

    def __init__(self, spec: Spec, cfg: EDACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        if c.eta > 0 and c.num_critics < 2:
            raise ValueError(f"eta={c.eta} asks for different critics: num_critics must be at least 2, or eta 0")
        if c.backup != "one" and c.entropy_backup:
            raise ValueError(f"backup={c.backup} has no entropy term: set entropy_backup=false with it")
        self.pi = TanhGaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden, log_std_bounds=(-5.0, 2.0), small_last=1e-3)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=c.num_critics, small_last=3e-3)
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log(), requires_grad=c.learn_alpha)
        self.target_entropy = -float(spec.act_dim) if c.target_entropy is None else c.target_entropy
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        if c.learn_alpha:
            self.opt_alpha = adam([self.log_alpha], c.alpha_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the squashed Gaussian, or tanh of its mean."""
        pi = self.pi(self.obs_norm(obs))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    @torch.no_grad()
    def backup_of(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """y = r + gamma (1 - terminated) (min_j Q_lagged_j(s', a') - alpha log pi(a'|s')), [B].

        `noise` is [B, A], or [K, B, A] for the best of K actions, which has no entropy term.
        """
        c, pi = self.cfg, self.pi(b.next_obs)
        if c.backup == "one":
            action, logp = pi.sample_log_prob(noise, self.rng["sample"])
            v = self.q_lagged(b.next_obs, action).amin(0)
            v = v - self.log_alpha.exp() * logp if c.entropy_backup else v
        else:
            action = pi.spread(c.backup_actions).sample(noise, self.rng["sample"]).movedim(0, 1)
            v = sampled_backup(self.q_lagged(b.next_obs, action), c.backup)
        return b.reward + c.gamma * v * ~b.terminated

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2] + eta / (N - 1) E[sum_{i != j} <u_i, u_j>],  u_i = dQ_i/da / |dQ_i/da|."""
        backup = self.backup_of(b, noise)
        if self.cfg.eta == 0:
            q = self.q(b.obs, b.action)
            note(log, "value/q", q)
            return (q - backup).square().mean(-1).sum()
        q, slopes = self.q.with_action_gradient(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum() + self.cfg.eta * ensemble_diversity(slopes)

    def actor_loss(self, b: Batch, action: Tensor, logp: Tensor, log: Metrics | None = None) -> Tensor:
        """E[alpha log pi(a|s) - min_j Q_j(s, a)] at a reparameterised draw `action` [B, A] with `logp` [B]."""
        q = self.q(b.obs, action).amin(0)
        note(log, "value/q_pi", q)
        return (self.log_alpha.detach().exp() * logp - q).mean()

    def alpha_loss(self, logp: Tensor) -> Tensor:
        """-E[log alpha (log pi + target entropy)]: alpha rises while the entropy is below its target."""
        return -(self.log_alpha * (logp.detach() + self.target_entropy)).mean()

    def update(self, b: Batch) -> Metrics:
        """Temperature, actor by the new temperature, critics by the new actor, lagged critics."""
        b = self.seen(b)
        self.counters["updates"] += 1
        action, logp = self.pi(b.obs).sample_log_prob(generator=self.rng["sample"])
        if self.cfg.learn_alpha:
            minimize(self.alpha_loss(logp), self.opt_alpha)
        log: Metrics = {}
        actor_loss = minimize(self.actor_loss(b, action, logp, log), self.opt_pi)
        critic_loss = minimize(self.critic_loss(b, log=log), self.opt_q)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return log | {
            "losses/critic": critic_loss,
            "losses/actor": actor_loss,
            "policy/entropy": -logp.detach().mean(),
            "policy/alpha": self.log_alpha.detach().exp(),
        }
