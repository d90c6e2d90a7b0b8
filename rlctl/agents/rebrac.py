"""ReBRAC: TD3+BC with the cloning term in the critics' backup as well, weighted apart, and critics with LayerNorm.

Source: Tarasov et al. 2023, arXiv:2305.09836; official code github.com/tinkoff-ai/ReBRAC.
Differs: the backup's penalty needs the data's next action, which the last row of an episode lacks. Where the episode
terminated it is masked with the value; where it was cut the row keeps its bootstrap and goes without the penalty. (The
official data drop that row, and its action serves the row before it; in our `d4rl_compat`, which drops it too, the row
before it goes without the penalty: one in a thousand.) Both distances are SUMS over action dimensions, unlike TD3+BC's
mean, and lambda is taken of min_j Q_j, not of Q_1. The lagged actor follows the actor as it was before the step, as
there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.td3 import TD3Settings
from rlctl.data.columns import column
from rlctl.data.dataset import Dataset
from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.nets.mlp import Norm
from rlctl.ops import adam, apply_gradients, frozen_copy, gradients, minimize, polyak
from rlctl.ops.td3 import perturbed, scaled_value_loss, smoothed
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class ReBRACConfig(OfflineRLConfig, TD3Settings):
    """Defaults: those of the paper's MuJoCo runs, with the two weights of Hopper's medium set. The paper picks them for
    every dataset: HalfCheetah medium-replay 0.01 and 0.001, Hopper medium-replay 0.05 and 0.5, Hopper medium-expert 0.1
    and 0.01, Walker2d medium 0.05 and 0.1. AntMaze: reward 100r, gamma 0.999, critic_lr 5e-5, actor_lr 3e-4, batches of
    256, weights near 0.002."""

    actor_bc: NonNegative = 0.01
    """beta_1: weight of the policy's squared distance from the data's action, against a Q of mean magnitude 1."""
    critic_bc: NonNegative = 0.01
    """beta_2: weight of the squared distance from the data's next action, in units of reward; 0 is TD3's backup."""
    batch_size: Annotated[int, Field(ge=1)] = 1024
    """Transitions per update."""
    critic_hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the critics."""
    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the actor."""
    layer_norm: bool = True
    """LayerNorm after each activation of the critics."""
    actor_lr: Positive = 1e-3
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 1e-3
    """Adam's learning rate of the critics."""


class ReBRAC(OfflineLearner):
    """Twin critics with LayerNorm, deterministic actor, both held near the data's actions."""

    Config = ReBRACConfig
    cfg: ReBRACConfig

    def __init__(self, spec: Spec, cfg: ReBRACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden, small_last=1e-3)
        norm: Norm = "after" if c.layer_norm else False
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.critic_hidden, num=2, layer_norm=norm, small_last=3e-3)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def prepare(self, data: Dataset) -> None:
        """Take what the reward transform and the observations' z-scores need, and ask for the next actions."""
        super().prepare(data)
        data.require("next_action")

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(s), with Gaussian noise (clipped to the action range) if `explore`."""
        action = self.pi(self.obs_norm(obs))
        return (perturbed(action, self.cfg.exploration_noise, self.rng["action"]) if explore else action), {}

    @torch.no_grad()
    def backup(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """y = r + gamma (1 - terminated) (min_j Q_lagged_j(s', a~) - beta_2 sum_d (a~ - a')_d^2), [B].

        a~ is TD3's smoothed action of the lagged policy, a' the data's next one; without one there is no penalty.
        """
        c = self.cfg
        action = smoothed(self.pi_lagged(b.next_obs), noise, c.policy_noise, c.noise_clip, self.rng["sample"])
        penalty = (action - column(b, "next_action")).square().sum(-1) * column(b, "has_next_action")
        value = self.q_lagged(b.next_obs, action).amin(0) - c.critic_bc * penalty
        return b.reward + c.gamma * value * ~b.terminated

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2]."""
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - self.backup(b, noise)).square().mean(-1).sum()

    def actor_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """E[beta_1 sum_d (pi(s) - a)_d^2] - lambda E[min_j Q_j(s, pi(s))],  lambda = 1 / E|min_j Q_j| (no gradient)."""
        action = self.pi(b.obs)
        distance = (action - b.action).square().sum(-1).mean()
        q = self.q(b.obs, action).amin(0)
        note(log, "value/q_pi", q)
        note(log, "losses/regulariser", distance)
        return self.cfg.actor_bc * distance + scaled_value_loss(q, 1.0)

    def update(self, b: Batch) -> Metrics:
        """Critics; every `policy_every`-th time the lagged networks (by the old actor) and the actor."""
        self.counters["updates"] += 1
        b = self.seen(b)
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, log=metrics), self.opt_q)
        if self.counters["updates"] % self.cfg.policy_every == 0:
            actor_loss = self.actor_loss(b, metrics)
            step = gradients(actor_loss, self.opt_pi)
            polyak(self.pi, self.pi_lagged, self.cfg.tau)
            polyak(self.q, self.q_lagged, self.cfg.tau)
            apply_gradients(self.opt_pi, step)
            metrics["losses/actor"] = actor_loss.detach()
        return metrics
