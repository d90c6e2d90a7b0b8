"""TD3+BC: offline TD3 whose actor is held near the data by a behaviour-cloning term.

Source: Fujimoto & Gu 2021, arXiv:2106.06860, eqs. 3-5.
Differs: nothing known. (The cloning term is a mean over batch AND action dimensions, lambda uses Q_1 alone, and the
paper's alpha multiplies Q: a LARGE alpha means more RL, less cloning.)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.td3 import TD3Settings
from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.td3 import clipped_double_backup, perturbed, scaled_value_loss, smoothed
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Metrics, NonNegative, Spec


@dataclass(frozen=True)
class TD3BCConfig(OfflineRLConfig, TD3Settings):
    """Defaults: the one set the paper uses for every dataset."""

    alpha: NonNegative = 2.5
    """Weight of the value term against cloning, after normalising Q by its mean magnitude; 0 is pure cloning."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""


class TD3BC(OfflineLearner):
    """Twin critics, deterministic actor with lambda Q + cloning, z-scored observations."""

    Config = TD3BCConfig
    cfg: TD3BCConfig

    def __init__(self, spec: Spec, cfg: TD3BCConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(z-scored s), with Gaussian noise (clipped to the action range) if `explore`."""
        action = self.pi(self.obs_norm(obs))
        return (perturbed(action, self.cfg.exploration_noise, self.rng["action"]) if explore else action), {}

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a~): TD3's."""
        c = self.cfg
        with torch.no_grad():
            action = smoothed(self.pi_lagged(b.next_obs), noise, c.policy_noise, c.noise_clip, self.rng["sample"])
            backup = clipped_double_backup(b.reward, b.terminated, self.q_lagged(b.next_obs, action), c.gamma)
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """-lambda E[Q_1(s, pi(s))] + E_{b,dim}[(pi(s) - a)^2],  lambda = alpha / E|Q_1(s, pi(s))| (no gradient)."""
        action = self.pi(b.obs)
        q = self.q(b.obs, action)[0]
        regulariser = (action - b.action).square().mean()
        note(log, "value/q_pi", q)
        note(log, "losses/regulariser", regulariser)
        return scaled_value_loss(q, self.cfg.alpha) + regulariser

    def update(self, b: Batch) -> Metrics:
        """Critics; every `policy_every`-th time the actor and then all lagged networks."""
        self.counters["updates"] += 1
        b = self.seen(b)
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, log=metrics), self.opt_q)
        if self.counters["updates"] % self.cfg.policy_every == 0:
            metrics["losses/actor"] = minimize(self.actor_loss(b, log=metrics), self.opt_pi)
            polyak(self.q, self.q_lagged, self.cfg.tau)
            polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return metrics
