"""Implicit Q-learning: values of the best actions in the data, without ever asking for an action outside it.

Source: Kostrikov et al. 2022, arXiv:2110.06169, eqs. 5-7; official code github.com/ikostrikov/implicit_q_learning,
whose order (V, policy, Q), orthogonal initialisation and tanh on the policy's mean are used.
Differs: data actions are not clipped to +-(1 - 1e-5), as a plain Gaussian has a finite density everywhere; the actor's
learning rate stops decaying once there are environment steps (the official fine-tuning runs have no decay at all). In
the view `d4rl_compat` the return range is taken over windows of 1000 rows, as CORL and ODICE do; the official code of
IQL splits where successors jump, and so has the episodes' own.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.data.reward import RewardName
from rlctl.nets import DeterministicPolicy, GaussianPolicy, QEnsemble, ValueNet
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.offline import MAX_WEIGHT, awr_weight, expectile_loss
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class IQLConfig(OfflineRLConfig):
    """Defaults: those of the paper for MuJoCo (AntMaze: expectile 0.9, beta 10, reward r-1; Adroit and
    Kitchen: beta 0.5, dropout 0.1, reward none). beta is an inverse of the unit of rewards: the two belong together."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of all networks."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Which expectile of Q over the data's actions is V: 0.5 is their mean, towards 1 the best of them."""
    beta: NonNegative = 3.0
    """Inverse temperature of the policy's weights exp(beta A); 0 is behaviour cloning."""
    actor_lr: Positive = 3e-4
    """Adam's initial learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    v_lr: Positive = 3e-4
    """Adam's learning rate of V."""
    anneal_actor_lr: bool = True
    """Lower the actor's learning rate to 0 along a cosine over the updates on the data (of a run resumed to more of
    them: over the new number); constant once there are environment steps."""
    head: Literal["gaussian", "deterministic"] = "gaussian"
    """Policy: a Gaussian fitted by likelihood, or a deterministic one fitted by squared error."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the policy's hidden units silenced in each of its updates (0.1 for Adroit and Kitchen)."""
    exploration_noise: NonNegative = 0.1
    """Std of the noise on the actions of the deterministic head while exploring, in units of [-1, 1]."""
    reward: RewardName = "return-range"
    """Reward transform: none, return-range, standardise, or a formula like r-1 (see docs/data.md)."""
    data_share: Fraction | None = None
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""


class IQL(OfflineLearner):
    """Expectile value network, twin critics, advantage-weighted policy."""

    Config = IQLConfig
    cfg: IQLConfig

    def __init__(self, spec: Spec, cfg: IQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c, gain = self.cfg, 2**0.5
        self.pi: DeterministicPolicy | GaussianPolicy
        if c.head == "deterministic":
            self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden, orthogonal=gain, dropout=c.dropout)
        else:
            self.pi = GaussianPolicy(
                spec.obs_dim,
                spec.act_dim,
                c.hidden,
                "relu",
                orthogonal=gain,
                tanh_mean=True,
                log_std_bounds=(-5.0, 2.0),
                dropout=c.dropout,
            )
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2, orthogonal=gain)
        self.v = ValueNet(spec.obs_dim, c.hidden, orthogonal=gain)
        self.q_lagged = frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_v = adam(self.v.parameters(), c.v_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's mean, or a draw of it, clipped to the action range."""
        pi, rng = self.pi(self.obs_norm(obs)), self.rng["action"]
        if not isinstance(pi, Tensor):
            return (pi.sample(generator=rng).clamp(-1, 1) if explore else pi.mode), {}
        if explore:
            noise = torch.randn(pi.shape, generator=rng, device=pi.device)
            pi = (pi + self.cfg.exploration_noise * noise).clamp(-1, 1)
        return pi, {}

    @torch.no_grad()
    def q_data(self, b: Batch) -> Tensor:
        """min_j Q_lagged_j(s, a) of the data's actions, [B]: what V regresses to and the policy is weighted by."""
        return self.q_lagged(b.obs, b.action).amin(0)

    def value_loss(self, b: Batch, q: Tensor, log: Metrics | None = None) -> Tensor:
        """E[|expectile - 1[u < 0]| u^2],  u = q - V(s), with `q` [B] from `q_data`."""
        v = self.v(b.obs)
        note(log, "value/v", v)
        return expectile_loss(q - v, self.cfg.expectile)

    def actor_loss(self, b: Batch, q: Tensor, log: Metrics | None = None) -> Tensor:
        """-E[min(exp(beta (q - V(s))), 100) log pi(a|s)], the weight without gradient.

        With the deterministic head the squared distance sum_d (pi(s) - a)_d^2 takes the place of -log pi.
        """
        with torch.no_grad():
            weight = awr_weight(q - self.v(b.obs), self.cfg.beta)
        note(log, "value/capped_share", weight >= MAX_WEIGHT)
        pi = self.pi(b.obs, drop=self.rng["sample"])
        misfit = (pi - b.action).square().sum(-1) if isinstance(pi, Tensor) else -pi.log_prob(b.action)
        return (weight * misfit).mean()

    def critic_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) V(s')."""
        with torch.no_grad():
            backup = b.reward + self.cfg.gamma * self.v(b.next_obs) * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def actor_lr(self) -> float:
        """actor_lr (1 + cos(pi t / T)) / 2 at update t of T from 0; with the decay off, or online, actor_lr itself."""
        c, t = self.cfg, self.counters["updates"]
        if not c.anneal_actor_lr or self.counters["env_steps"] > 0 or c.updates_on_data == 0:
            return c.actor_lr
        return c.actor_lr * 0.5 * (1 + math.cos(math.pi * min(t / c.updates_on_data, 1.0)))

    def update(self, b: Batch) -> Metrics:
        """V, then the policy and the critics by the new V, then the lagged critics."""
        b = self.seen(b)
        for group in self.opt_pi.param_groups:
            group["lr"] = self.actor_lr()
        self.counters["updates"] += 1
        q = self.q_data(b)
        metrics: Metrics = {}
        metrics["losses/value"] = minimize(self.value_loss(b, q, metrics), self.opt_v)
        metrics["losses/actor"] = minimize(self.actor_loss(b, q, metrics), self.opt_pi)
        metrics["losses/critic"] = minimize(self.critic_loss(b, metrics), self.opt_q)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return metrics
