"""Diffusion-QL: a diffusion policy cloned from the data and pulled, through its whole sampling chain, towards high Q.

Source: Wang et al. 2022, arXiv:2208.06193, algorithm 1; official code github.com/Zhendong-Wang/Diffusion-Policies-for-
Offline-RL, whose symmetric normalisation (each critic's value over the other's mean magnitude) is used.
Differs: learning rates stay constant (the official cosine is stepped once per 50 epochs, nearly not at all); before
update `ema_start` the slow policy is a plain copy (officially: the initial weights); the deterministic action is the
best of fixed noise instead of a draw by exp(Q); the last checkpoint is reported, not the best one. Defaults are those
of the MuJoCo tasks but for the gradient clip, which the paper sets per dataset (1 to 9). Among them its 5 levels of
noise, which keep the gradient through the chain affordable and are too few to stay on the modes of data: with a perfect
network, cloning alone (eta 0) brings 63% of the draws near one of four modes 1.6 apart, 96% with 10 levels. Where
nearly all of them go to one mode, as the value term wants it, 5 levels bring 98% there.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, cast

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.nets import EMA, BestOfN, DiffusionPolicy, Policy, QEnsemble, require
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.diffusion import Schedule
from rlctl.ops.offline import sampled_backup
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class DiffusionQLConfig(OfflineRLConfig):
    """Defaults: those of the paper for MuJoCo (AntMaze: max_q_backup, reward 4r-2; Adroit: actor_lr 3e-5, eta 0.1)."""

    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of policy and critics (Mish)."""
    diffusion_steps: Count = 5
    """Levels of noise T; every action and every policy gradient takes that many evaluations of the network. 5 is the
    paper's; with 10 draws keep to the modes of the data."""
    schedule: Schedule = "vp"
    """How the noise grows over the levels: vp, cosine or linear."""
    eta: NonNegative = 1.0
    """Weight of the normalised value against cloning; 0 is behaviour cloning."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    max_grad_norm: Positive | None = 5.0
    """Gradients of policy and critics are rescaled to at most this L2 norm; null for no bound."""
    max_q_backup: bool = False
    """Back up the best of `num_backup` actions (per critic, then the smallest critic) instead of a single draw."""
    num_backup: Count = 10
    """Actions of `max_q_backup`."""
    num_candidates: Count = 50
    """Actions drawn to act, of which one is taken by exp(Q)."""
    temperature: Positive = 1.0
    """Of that choice, in units of value."""
    ema_decay: Fraction = 0.995
    """Share that the slow policy, which acts and gives the backup's actions, keeps at each of its steps."""
    ema_every: Count = 5
    """Updates per step of the slow policy."""
    ema_start: Annotated[int, Field(ge=0)] = 1000
    """Update from which the slow policy is an average; before, a copy."""


class DiffusionQL(OfflineLearner):
    """Twin critics, a diffusion policy with a slow copy, softmax of values to act."""

    Config = DiffusionQLConfig
    cfg: DiffusionQLConfig

    def __init__(self, spec: Spec, cfg: DiffusionQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        policy = self.make_policy()
        require(policy, "reparam", "matching_loss", by=type(self).__name__)
        slow = EMA(policy, c.ema_decay, c.ema_every, c.ema_start)
        self.pi = BestOfN(slow, self.value, c.num_candidates, weigh=lambda q: (q / c.temperature).softmax(-1))
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2, activation="mish")
        self.q_lagged = frozen_copy(self.q)
        self.opt_pi = adam(policy.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def make_policy(self) -> Policy:
        """The policy that learns."""
        c, spec = self.cfg, self.spec
        return DiffusionPolicy(spec.obs_dim, spec.act_dim, c.hidden, schedule=c.schedule, steps=c.diffusion_steps)

    @property
    def slow(self) -> EMA:
        """The policy that acts; `slow.policy` is the one that learns."""
        return cast(EMA, self.pi.policy)

    def value(self, obs: Tensor, action: Tensor) -> Tensor:
        """min_j Q_lagged_j, [..., N], of `action` [..., N, A]: what candidates are chosen by."""
        return self.q_lagged(obs, action).amin(0)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """One of `num_candidates` draws by exp(Q / temperature), or the best of fixed noise."""
        seen = self.obs_norm(obs)
        return (self.pi.sample(seen, generator=self.rng["action"]) if explore else self.pi.mode(seen)), {}

    def critic_loss(self, b: Batch, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a').

        a' is one draw of the slow policy, or with `max_q_backup` the best of several for each critic. `noise` is that
        of the draws, [B, (num_backup,) *noise_shape].
        """
        c, rng = self.cfg, self.rng["sample"]
        with torch.no_grad():
            next_action = self.slow.sample(b.next_obs, c.num_backup if c.max_q_backup else None, noise, rng)
            q_next = self.q_lagged(b.next_obs, next_action)
            v_next = sampled_backup(q_next, "max-min") if c.max_q_backup else q_next.amin(0)
            backup = b.reward + c.gamma * v_next * ~b.terminated
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def bc_loss(self, b: Batch, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """E_{b,dim}[(eps(s, a_i, i) - eps)^2] of the data's actions."""
        return self.slow.matching_loss(b.obs, b.action, noise, time, self.rng["sample"]).mean()

    def q_loss(
        self, b: Batch, noise: Tensor | None = None, coin: Tensor | None = None, log: Metrics | None = None
    ) -> Tensor:
        """-E[Q_1(s, a)] / E|Q_2(s, a)| (no gradient in the divisor), or with 1 and 2 swapped, as `coin` [] falls.

        a is a draw of the policy, differentiated through all its steps; the divisor makes eta independent of the scale
        of rewards.
        """
        rng = self.rng["sample"]
        q = self.q(b.obs, self.slow.policy.sample(b.obs, noise=noise, generator=rng))
        note(log, "value/q_pi", q)
        coin = torch.rand((), generator=rng, device=q.device) < 0.5 if coin is None else coin
        scaled = -q.mean(-1) / q.detach().abs().mean(-1).clamp(min=1e-8).flip(0)
        return torch.where(coin, scaled[0], scaled[1])

    def update(self, b: Batch) -> Metrics:
        """Critics, policy by the new critics, slow policy, lagged critics."""
        c, b = self.cfg, self.seen(b)
        self.counters["updates"] += 1
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, log=metrics), self.opt_q, c.max_grad_norm)
        actor_loss = bc_loss = self.bc_loss(b)
        if c.eta:
            actor_loss = bc_loss + c.eta * self.q_loss(b, log=metrics)
        metrics["losses/actor"] = minimize(actor_loss, self.opt_pi, c.max_grad_norm)
        self.slow.update(self.counters["updates"])
        polyak(self.q, self.q_lagged, c.tau)
        return metrics | {"losses/bc": bc_loss.detach()}
