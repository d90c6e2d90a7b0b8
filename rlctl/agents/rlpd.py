"""Soft actor-critic with prior data: half of every batch from a dataset, an ensemble of critics with layer norm, many
updates per step. Without a dataset it is REDQ with layer norm.

Source: Ball et al. 2023, arXiv:2302.02948, algorithm 1; Chen et al. 2021, arXiv:2101.05982 (subset of critics).
Differs: the temperature and the sum over critic losses are those of our SAC, of which this is a variant: with two
critics that both count, `policy_every` 1, no layer norm, `actor_value` min and target_entropy -A it is that, bit for
bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.sac import SAC, SACConfig
from rlctl.nets import QEnsemble
from rlctl.ops import minimize, polyak
from rlctl.ops.ensemble import check, random_subset
from rlctl.types import Batch, Count, Fraction, Metrics, Positive, Source, Spec


@dataclass(frozen=True)
class RLPDConfig(SACConfig):
    """Defaults: those of the paper's locomotion runs (AntMaze: backup_critics 1, entropy_backup off, three layers)."""

    learning_starts: Annotated[int, Field(ge=0)] = 5000
    """Environment steps of uniform random actions before learning starts."""
    updates_per_step: Positive = 20.0
    """Critic updates per environment step (the update-to-data ratio)."""
    policy_every: Count = 20
    """Critic updates per update of actor and temperature."""
    data_share: Fraction = 0.5
    """With a dataset: part of each batch that comes from it."""
    num_critics: Count = 10
    """Critics in the ensemble."""
    backup_critics: Count = 2
    """Critics drawn at random for each backup, of which the smallest counts."""
    layer_norm: bool = True
    """LayerNorm in the critics."""
    entropy_backup: bool = True
    """Count the successor's entropy in the backup."""
    actor_value: Literal["mean", "min"] = "mean"
    """What of the ensemble the actor climbs."""
    target_entropy: float | None = None
    """Nats, of the density of actions in [-1, 1]; None takes -act_dim / 2."""


class RLPD(SAC):
    """SAC with an ensemble, alone or on a mixture of replay and dataset."""

    accepts: ClassVar[frozenset[Source]] = frozenset({"data"})
    Config = RLPDConfig
    cfg: RLPDConfig

    def __init__(self, spec: Spec, cfg: RLPDConfig | None = None) -> None:
        super().__init__(spec, cfg)
        check(self.cfg.num_critics, self.cfg.backup_critics)
        if self.cfg.target_entropy is None:
            self.target_entropy = -spec.act_dim / 2

    def make_critics(self) -> QEnsemble:
        """`num_critics` of them."""
        c, s = self.cfg, self.spec
        return QEnsemble(s.obs_dim, s.act_dim, c.hidden, num=c.num_critics, layer_norm=c.layer_norm)

    def critic_loss(self, b: Batch) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) (min_{j in S} Q_lagged_j(s', a') - alpha log pi).

        S is a random subset of `backup_critics` critics; the last term only with `entropy_backup`.
        """
        c, g = self.cfg, self.rng["sample"]
        with torch.no_grad():
            next_action, logp = self.pi(b.next_obs).sample_log_prob(generator=g)
            few = random_subset(c.num_critics, c.backup_critics, b.obs.device, g)
            v = self.q_lagged(b.next_obs, next_action, few).amin(0)
            if c.entropy_backup:
                v = v - self.log_alpha.exp() * logp
            backup = b.reward + c.gamma * v * ~b.terminated
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch) -> tuple[Tensor, Tensor]:
        """E[alpha log pi(a|s) - mean_j Q_j(s, a)] (or the smallest) with a reparameterised, and log pi(a|s) `[B]`."""
        action, logp = self.pi(b.obs).sample_log_prob(generator=self.rng["sample"])
        q = self.q(b.obs, action)
        value = q.mean(0) if self.cfg.actor_value == "mean" else q.amin(0)
        return (self.log_alpha.detach().exp() * logp - value).mean(), logp.detach()

    def update(self, b: Batch) -> Metrics:
        """Critics and lagged critics; every `policy_every`-th time the actor and the temperature."""
        self.counters["updates"] += 1
        metrics = {"losses/critic": minimize(self.critic_loss(b), self.opt_q)}
        polyak(self.q, self.q_lagged, self.cfg.tau)
        if self.counters["updates"] % self.cfg.policy_every == 0:
            actor_loss, logp = self.actor_loss(b)
            metrics["losses/actor"] = minimize(actor_loss, self.opt_pi)
            metrics |= {"policy/entropy": -logp.mean(), "policy/alpha": self.log_alpha.detach().exp()}
            if self.cfg.learn_alpha:
                minimize(self.alpha_loss(logp), self.opt_alpha)
        return metrics
