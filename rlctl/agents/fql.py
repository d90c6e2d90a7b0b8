"""FQL: a flow cloned from the data, and a one-step policy distilled from it that also climbs Q.

Source: Park et al. 2025, arXiv:2502.02538, algorithm 1; official code github.com/seohongpark/fql.
Differs: the deterministic action is that of zero noise (officially evaluations draw it). alpha depends on the task and
the scale of its rewards: the official table has 3 to 1000 with rewards in [-1, 0] and 3000 to 30000 for Adroit; with
`normalize_q` 0.03 to 10 is the range to try.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.nets import FlowPolicy, OneStepPolicy, QEnsemble
from rlctl.nets.field import xavier_
from rlctl.ops import adam, apply_gradients, frozen_copy, gradients, polyak
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class FQLConfig(OfflineRLConfig):
    """Defaults: the official ones, but alpha, which has to be set per task."""

    hidden: Widths = (512, 512, 512, 512)
    """Widths of the hidden layers of all networks (GELU)."""
    flow_steps: Count = 10
    """Euler steps from noise to action of the flow that is distilled."""
    alpha: NonNegative = 10.0
    """Weight of the distillation against the value: large is behaviour cloning."""
    normalize_q: bool = False
    """Divide the value term by the mean magnitude of Q, so that alpha does not depend on the scale of rewards."""
    q_agg: Literal["mean", "min"] = "mean"
    """Which of the two lagged critics the backup takes: their mean, or the smaller (AntMaze, Adroit)."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    lr: Positive = 3e-4
    """Adam's learning rate of all networks."""
    data_share: Fraction | None = None
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""


class FQL(OfflineLearner):
    """Twin critics, a flow that clones, a one-step policy that acts."""

    Config = FQLConfig
    cfg: FQLConfig

    def __init__(self, spec: Spec, cfg: FQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.flow = FlowPolicy(spec.obs_dim, spec.act_dim, c.hidden, steps=c.flow_steps)
        self.pi = OneStepPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2, activation="gelu", layer_norm="after")
        xavier_(self.q)  # as flow and policy are by themselves
        self.q_lagged = frozen_copy(self.q)
        self.opt_flow = adam(self.flow.parameters(), c.lr)
        self.opt_pi = adam(self.pi.parameters(), c.lr)
        self.opt_q = adam(self.q.parameters(), c.lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """mu(s, z) with z drawn, or zero."""
        seen = self.obs_norm(obs)
        return (self.pi.sample(seen, generator=self.rng["action"]) if explore else self.pi.mode(seen)), {}

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """E_{j,b}[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) agg_j Q_lagged_j(s', mu(s', z))."""
        with torch.no_grad():
            q_next = self.q_lagged(b.next_obs, self.pi.sample(b.next_obs, noise=noise, generator=self.rng["sample"]))
            v_next = q_next.mean(0) if self.cfg.q_agg == "mean" else q_next.amin(0)
            backup = b.reward + self.cfg.gamma * v_next * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean()

    def flow_loss(self, b: Batch, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """E_{b,dim}[(v(s, x_t, t) - (a - z))^2]."""
        return self.flow.matching_loss(b.obs, b.action, noise, time, self.rng["sample"]).mean()

    def actor_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> tuple[Tensor, Tensor]:
        """alpha E_{b,dim}[(mu(s, z) - flow(s, z))^2] - E[mean_j Q_j(s, clip(mu))], and the distillation error alone.

        The distance is that of the unclipped mu; the flow's action has no gradient. With `normalize_q` the value is
        divided by its mean magnitude.
        """
        if noise is None:
            noise = torch.randn(b.action.shape, generator=self.rng["sample"], device=b.action.device)
        with torch.no_grad():
            target = self.flow.decode(b.obs, noise)
        mu = self.pi.unclipped(b.obs, noise)
        distance = (mu - target).square().mean()
        q = self.q(b.obs, mu.clamp(-1, 1)).mean(0)
        note(log, "value/q_pi", q)
        scale = q.detach().abs().mean().clamp(min=1e-8) if self.cfg.normalize_q else 1.0
        return self.cfg.alpha * distance - q.mean() / scale, distance.detach()

    def seen(self, b: Batch) -> Batch:
        """What the losses see: observations z-scored, rewards transformed, actions clipped to +-(1 - 1e-5)."""
        return super().seen(b._replace(action=b.action.clamp(-1 + 1e-5, 1 - 1e-5)))

    def update(self, b: Batch) -> Metrics:
        """All three networks by losses at the parameters from before the update, then the lagged critics."""
        b = self.seen(b)
        self.counters["updates"] += 1
        log: Metrics = {}
        critic_loss, flow_loss = self.critic_loss(b, log=log), self.flow_loss(b)
        actor_loss, distance = self.actor_loss(b, log=log)
        steps = [
            (opt, gradients(loss, opt))
            for loss, opt in ((critic_loss, self.opt_q), (flow_loss, self.opt_flow), (actor_loss, self.opt_pi))
        ]
        for opt, grads in steps:
            apply_gradients(opt, grads)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return log | {
            "losses/critic": critic_loss.detach(),
            "losses/flow": flow_loss.detach(),
            "losses/actor": actor_loss.detach(),
            "losses/distillation": distance,
        }
