"""IDQL: IQL's values beside a diffusion policy that only clones; the values choose among its draws.

Source: Hansen-Estruch et al. 2023, arXiv:2304.10573, with the expectile as its loss of V (values: arXiv:2110.06169).
Differs: no dropout in the policy's network, no cosine decay of its learning rate. The official runs draw
512 rows per update, for two steps of the policy and one of the critics on 256 of them, and take the best of 16, 64 or
256 draws: 256, one and 32 here. They scale rewards on the three locomotion tasks alone, here any task's are by default.
10 levels of noise, where they have 5: with those, even a perfect network leaves three draws in ten between the modes of
the data, where values are guesses, and it is by values that draws are chosen (docs/generative.md, "How many steps").
The deterministic action is the best of fixed noise; exploring takes the best of fresh draws, or with `implicit_policy`
draws one by the weights that the expectile implies (tau where Q > V and 1 - tau elsewhere), as the paper does while
fine-tuning online.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, cast

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.data.reward import RewardName
from rlctl.nets import EMA, BestOfN, DiffusionPolicy, FieldResNet, Policy, QEnsemble, ValueNet, require
from rlctl.nets.mlp import Activation, Norm
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.diffusion import Schedule
from rlctl.ops.offline import expectile_loss
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Fraction, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class ChosenByValueConfig(OfflineRLConfig):
    """What the values and the choice need to know, whatever the generative policy."""

    critic_hidden: Widths = (256, 256)
    """Widths of the hidden layers of critics and V."""
    critic_activation: Activation = "relu"
    """Their activation."""
    layer_norm: Norm = False
    """Layer norm in critics and V: true before each activation, "after" it, or false."""
    expectile: Annotated[float, Field(gt=0, lt=1)] = 0.7
    """Which expectile of Q over the data's actions is V: 0.5 is their mean, towards 1 the best of them."""
    num_candidates: Count = 32
    """Actions drawn to act, of which the values choose one; 1 is behaviour cloning."""
    implicit_policy: bool = False
    """Exploring, draw a candidate by the weights of the policy that V implies instead of taking the best."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    v_lr: Positive = 3e-4
    """Adam's learning rate of V."""
    ema_decay: Fraction = 0.999
    """Share that the policy that acts, an average over updates, keeps at each update."""
    ema_start: Annotated[int, Field(ge=0)] = 1000
    """Update from which it is an average; before, a copy."""


@dataclass(frozen=True)
class IDQLConfig(ChosenByValueConfig):
    """Defaults: those of the official runs on MuJoCo (AntMaze: expectile 0.9, reward r-1), but 32 candidates and twice
    their levels of noise."""

    width: Count = 256
    """Width of the policy's residual network (its blocks are four times as wide inside)."""
    blocks: Count = 3
    """Its residual blocks, with layer norm."""
    diffusion_steps: Count = 10
    """Levels of noise T; half of them halve the cost of a draw, and blur its modes."""
    schedule: Schedule = "vp"
    """How the noise grows over the levels: vp, cosine or linear."""
    reward: RewardName = "return-range"
    """Reward transform: none, return-range, standardise, or a formula like r-1 (see docs/data.md)."""


class IDQL(OfflineLearner):
    """Expectile value network, twin critics, a cloned generative policy."""

    Config: ClassVar[type[ChosenByValueConfig]] = IDQLConfig
    cfg: ChosenByValueConfig

    def __init__(self, spec: Spec, cfg: ChosenByValueConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        policy = self.make_policy()
        require(policy, "sample", "matching_loss", by=type(self).__name__)
        slow, weigh = EMA(policy, c.ema_decay, 1, c.ema_start), self.weights if c.implicit_policy else None
        self.pi = BestOfN(slow, self.adv, c.num_candidates, weigh)
        self.q, self.v = self.make_values()
        self.q_lagged = frozen_copy(self.q)
        self.opt_pi = adam(policy.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_v = adam(self.v.parameters(), c.v_lr)

    def make_policy(self) -> Policy:
        """The policy that learns: clipped in each step, with noise of variance beta, as in the official code."""
        c, spec = self.cfg, self.spec
        assert isinstance(c, IDQLConfig)
        return DiffusionPolicy(
            spec.obs_dim,
            spec.act_dim,
            schedule=c.schedule,
            steps=c.diffusion_steps,
            variance="beta",
            clip_at="step",
            net=FieldResNet(spec.obs_dim, spec.act_dim, c.width, c.blocks),
        )

    def make_values(self) -> tuple[QEnsemble, ValueNet]:
        """The critics and V."""
        c, s, hidden = self.cfg, self.spec, self.cfg.critic_hidden
        q = QEnsemble(s.obs_dim, s.act_dim, hidden, 2, c.critic_activation, layer_norm=c.layer_norm)
        return q, ValueNet(s.obs_dim, hidden, c.critic_activation, layer_norm=c.layer_norm)

    @property
    def slow(self) -> EMA:
        """The policy that acts; `slow.policy` is the one that learns."""
        return cast(EMA, self.pi.policy)

    def adv(self, obs: Tensor, action: Tensor) -> Tensor:
        """min_j Q_lagged_j(s, a) - V(s), [..., N], of `action` [..., N, A]: what candidates are chosen by."""
        return self.q_lagged(obs, action).amin(0) - self.v(obs).unsqueeze(-1)

    def weights(self, adv: Tensor) -> Tensor:
        """|expectile - 1[adv <= 0]|, [..., N]: those of the expectile whose optimum V is."""
        tau = self.cfg.expectile
        return torch.where(adv > 0, tau, 1 - tau)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The best of `num_candidates` draws (with `implicit_policy` one by its weights), or of fixed noise."""
        seen = self.obs_norm(obs)
        return (self.pi.sample(seen, generator=self.rng["action"]) if explore else self.pi.mode(seen)), {}

    def value_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """E[|expectile - 1[u < 0]| u^2],  u = min_j Q_lagged_j(s, a) - V(s), at the data's actions."""
        with torch.no_grad():
            q = self.q_lagged(b.obs, b.action).amin(0)
        v = self.v(b.obs)
        note(log, "value/v", v)
        return expectile_loss(q - v, self.cfg.expectile)

    def critic_loss(self, b: Batch, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) V(s')."""
        with torch.no_grad():
            backup = b.reward + self.cfg.gamma * self.v(b.next_obs) * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """The matching loss of the data's actions: no value has a part in it."""
        return self.slow.matching_loss(b.obs, b.action, noise, time, self.rng["sample"]).mean()

    def update(self, b: Batch) -> Metrics:
        """V, critics by the new V, policy, slow policy, lagged critics."""
        b = self.seen(b)
        self.counters["updates"] += 1
        metrics: Metrics = {}
        metrics["losses/value"] = minimize(self.value_loss(b, metrics), self.opt_v)
        metrics["losses/critic"] = minimize(self.critic_loss(b, metrics), self.opt_q)
        metrics["losses/actor"] = minimize(self.actor_loss(b), self.opt_pi)
        self.slow.update(self.counters["updates"])
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return metrics
