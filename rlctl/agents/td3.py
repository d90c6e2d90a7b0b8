"""Twin delayed deep deterministic policy gradient.

Source: Fujimoto et al. 2018, arXiv:1802.09477, algorithm 1.
Differs: 256-256 networks, learning rates of 3e-4 and batches of 256 (the authors' later code) instead of 400-300, 1e-3
and 100.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor

from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.td3 import clipped_double_backup, perturbed, smoothed
from rlctl.train import OffPolicyConfig
from rlctl.types import Agent, AgentConfig, Batch, Count, Fraction, Metrics, NonNegative, Positive, Regime, Spec, Widths


@dataclass(frozen=True)
class TD3Settings(AgentConfig):
    """What TD3 shares with the offline learners on its backbone. Defaults: those of its authors' current code."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """Lagged networks move by tau towards the online ones at each actor step."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    exploration_noise: NonNegative = 0.1
    """Std of the Gaussian added to the action where the agent explores, in units of [-1, 1]."""
    policy_noise: NonNegative = 0.2
    """Std of the Gaussian that smooths the action in the backup."""
    noise_clip: Positive = 0.5
    """Bound of that smoothing noise."""
    policy_every: Count = 2
    """Critic updates per actor update."""


@dataclass(frozen=True)
class TD3Config(OffPolicyConfig, TD3Settings):
    """Defaults: those of the authors' current code."""

    learning_starts: Annotated[int, Field(ge=0)] = 25_000
    """Environment steps of uniform random actions before learning starts."""


class TD3(Agent):
    """Twin critics, deterministic actor, delayed policy updates, target-policy smoothing."""

    regime: ClassVar[Regime] = "off_policy"
    Config: ClassVar[type[Any]] = TD3Config
    cfg: TD3Config

    def __init__(self, spec: Spec, cfg: TD3Config | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(s), with Gaussian noise (clipped to the action range) while exploring."""
        action = self.pi(obs)
        return (perturbed(action, self.cfg.exploration_noise, self.rng["action"]) if explore else action), {}

    def smoothed_action(self, next_obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """The action of the backup: clip(pi_lagged(s') + clip(policy_noise * noise)), noise [B, A] standard normal."""
        action, c = self.pi_lagged(next_obs), self.cfg
        return smoothed(action, noise, c.policy_noise, c.noise_clip, self.rng["sample"])

    def critic_loss(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a~)."""
        with torch.no_grad():
            q_next = self.q_lagged(b.next_obs, self.smoothed_action(b.next_obs, noise))
            backup = clipped_double_backup(b.reward, b.terminated, q_next, self.cfg.gamma)
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch) -> Tensor:
        """-E[Q_1(s, pi(s))]."""
        return -self.q(b.obs, self.pi(b.obs))[0].mean()

    def update(self, b: Batch) -> Metrics:
        """Critics; every `policy_every`-th time the actor and then all lagged networks."""
        self.counters["updates"] += 1
        metrics = {"losses/critic": minimize(self.critic_loss(b), self.opt_q)}
        if self.counters["updates"] % self.cfg.policy_every == 0:
            metrics["losses/actor"] = minimize(self.actor_loss(b), self.opt_pi)
            polyak(self.q, self.q_lagged, self.cfg.tau)
            polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return metrics
