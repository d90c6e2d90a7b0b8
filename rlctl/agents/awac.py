"""Advantage-weighted actor-critic: a policy cloned from the data, its good actions weighted up.

Source: Nair et al. 2020, arXiv:2006.09359, algorithm 1.
Differs: weights are exp(A / lambda) capped at 100, without the normaliser Z(s) and without a softmax over the batch;
V(s) in the advantage is min_j Q_j at one draw of the policy; observations are z-scored; lambda is 1/3. These are the
settings of CORL, whose scores are the ones usually compared with.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.nets import GaussianPolicy, QEnsemble
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.offline import MAX_WEIGHT, awr_weight
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Fraction, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class AWACConfig(OfflineRLConfig):
    """Defaults: those of the MuJoCo tasks (AntMaze: lam 0.1, reward r-1)."""

    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    lam: Positive = 1 / 3
    """Temperature of the weights exp(A / lam), in units of value (0.1 for AntMaze and Adroit); large is cloning."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""
    data_share: Fraction | None = None
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""


class AWAC(OfflineLearner):
    """Twin critics of the current policy, advantage-weighted Gaussian actor."""

    Config = AWACConfig
    cfg: AWACConfig

    def __init__(self, spec: Spec, cfg: AWACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = GaussianPolicy(
            spec.obs_dim, spec.act_dim, c.hidden, "relu", orthogonal=None, log_std_bounds=(-20.0, 2.0)
        )
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.q_lagged = frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The Gaussian's mean, or a draw of it, clipped to the action range."""
        pi = self.pi(self.obs_norm(obs))
        action = pi.sample(generator=self.rng["action"]) if explore else pi.mode
        return action.clamp(-1, 1), {}

    @torch.no_grad()
    def sampled_action(self, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """An action of the policy, clipped to the action range, [B, A]; `noise` [B, A] standard normal."""
        return self.pi(obs).sample(noise, self.rng["sample"]).clamp(-1, 1)

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a'), a' ~ pi(s')."""
        with torch.no_grad():
            q_next = self.q_lagged(b.next_obs, self.sampled_action(b.next_obs, noise)).amin(0)
            backup = b.reward + self.cfg.gamma * q_next * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    @torch.no_grad()
    def adv(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """A = min_j Q_j(s, a) - min_j Q_j(s, a_pi), a_pi ~ pi(s), [B]."""
        q = self.q(b.obs, b.action).amin(0)
        v = self.q(b.obs, self.sampled_action(b.obs, noise)).amin(0)
        note(log, "value/q_pi", v)
        return q - v

    def actor_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """-E[min(exp(A / lam), 100) log pi(a|s)], the weight without gradient."""
        weight = awr_weight(self.adv(b, noise, log), 1 / self.cfg.lam)
        note(log, "value/capped_share", weight >= MAX_WEIGHT)
        return -(weight * self.pi(b.obs).log_prob(b.action)).mean()

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, lagged critics."""
        b = self.seen(b)
        self.counters["updates"] += 1
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, log=metrics), self.opt_q)
        metrics["losses/actor"] = minimize(self.actor_loss(b, log=metrics), self.opt_pi)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return metrics | self.pi.summary()
