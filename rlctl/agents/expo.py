"""Expressive policy optimisation: a generative base policy that only imitates, small learned edits of its actions, and
the best of both by value, chosen on the fly, for acting and in the backup. Online, alone or beside a dataset.

Source: Dong et al. 2025, arXiv:2507.07986 (on-the-fly policy, edit objective, algorithm 1); critics as in RLPD
(arXiv:2302.02948).
Differs: base and edited actions are clipped to [-1, 1] (the official code values and stores edits unclipped). The
entropy target moves with the size of the edits, -A/2 + A log beta, which is -A/2 of the edit before scaling: without
the shift a small beta can never reach it, and the temperature grows for ever. The temperature descends -log(alpha) (log
pi + target), as in our SAC. Learning rates are constant and nothing decays (official: cosine over 3M steps, AdamW). A
matching loss is a mean over action dimensions, a critic loss a sum over critics. The deterministic action compares the
candidates of noise drawn once, by the subset minimum averaged over all subsets; the official evaluation draws as it
acts.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from rlctl.errors import UsageError
from rlctl.nets import (
    DiffusionPolicy,
    Edited,
    FlowPolicy,
    GenerativePolicy,
    Policy,
    QEnsemble,
    TanhGaussianPolicy,
    field_net,
    require,
)
from rlctl.nets.field import xavier_
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.ensemble import check, mean_subset_min, random_subset, subset_min
from rlctl.ops.selection import best_of
from rlctl.train import Job, OffPolicyConfig, off_policy, offline, replay
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, NonNegative, Positive, Source, Spec, Widths


@dataclass(frozen=True)
class EXPOConfig(OffPolicyConfig):
    """Defaults: those of the paper's AntMaze runs (robomimic: beta 0.1, Adroit: 0.7). They ask for a GPU; base_net mlp,
    fewer base_steps, actions, critics and updates per step fit a CPU (see configs/expo)."""

    learning_starts: Annotated[int, Field(ge=0)] = 5000
    """Environment steps of uniform random actions before learning starts (none after offline_updates)."""
    updates_per_step: Positive = 20.0
    """Critic updates per environment step (the update-to-data ratio)."""
    policy_every: Count = 20
    """Critic updates per update of base, edit and temperature."""
    data_share: Fraction = 0.5
    """With a dataset: part of each batch that comes from it."""
    offline_updates: Annotated[int, Field(ge=0)] | None = None
    """With a dataset: updates of the base policy alone before the first environment step; null: none."""
    base: Literal["diffusion", "flow"] = "diffusion"
    """Kind of the base policy."""
    base_net: Literal["resnet", "mlp"] = "resnet"
    """Network of the base policy: residual blocks with layer norm, or a plain MLP (about 20 times cheaper)."""
    base_hidden: Widths = (256, 256, 256)
    """Its widths; residual blocks are all of one width, as many as there are numbers."""
    base_steps: Count = 10
    """Denoising or integration steps of a draw from the base policy. In 6 a flow keeps to the modes of data better than
    a diffusion in 10: 97% against 94% of the draws, with perfect networks and modes 1.6 apart."""
    base_lr: Positive = 3e-4
    """Adam's learning rate of the base policy."""
    base_tau: Fraction = 0.001
    """base_slow, which acts, <- base_slow + base_tau (base - base_slow) after each update of the base."""
    num_actions: Count = 8
    """Base actions to choose from, for acting and in the backup."""
    num_edits: Annotated[int, Field(ge=0)] = 8
    """How many of them are edited besides."""
    beta: NonNegative = 0.05
    """Largest edit per action dimension; 0 leaves the best of num_actions base actions, and nothing is edited."""
    edit_of: Literal["data", "base"] = "data"
    """What the edit is trained on: actions of the batch (official), or fresh draws of the base, as it meets in use."""
    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of edit policy and critics."""
    num_critics: Count = 10
    """Critics in the ensemble."""
    backup_critics: Count = 2
    """Critics drawn at random of which the smallest counts, for the choice and, drawn anew, for the backup."""
    layer_norm: bool = True
    """LayerNorm in the critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """q_lagged <- q_lagged + tau (q - q_lagged) after each critic update."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the edit policy."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate of log alpha."""
    alpha: Positive = 1.0
    """Temperature of the edit policy: the initial one, or the fixed one when learn_alpha is off."""
    learn_alpha: bool = True
    """Adjust the temperature to hold the edit policy's entropy at target_entropy."""
    target_entropy: float | None = None
    """Nats, of the density of edited actions; None takes act_dim (log beta - 1/2)."""


def train_expo(job: Job) -> None:
    """The schedule of EXPO: the base alone on the dataset, if asked for; then online on replay and dataset."""
    assert job.env is not None
    agent, c = job.agent, job.cfg
    assert isinstance(agent, EXPO)
    if c.offline_updates:
        if job.data is None:
            raise UsageError(f"offline_updates={c.offline_updates} train on a dataset: give one with --data, or set 0")
        job.run.plan(c.offline_updates + c.steps)
        offline(agent, job.data, job.run, updates=c.offline_updates, learn=agent.pretrain)
    starts = 0 if c.offline_updates else None  # a trained base explores better than chance
    off_policy(agent, job.env, replay(job), job.run, learning_starts=starts)


class EXPO(Agent):
    """Generative base, edit policy, critic ensemble; the action is the candidate that the critics like best."""

    regime = "off_policy"
    accepts: ClassVar[frozenset[Source]] = frozenset({"data"})
    Config = EXPOConfig
    schedule: ClassVar[Callable[[Job], None] | None] = staticmethod(train_expo)
    cfg: EXPOConfig
    bank: Tensor

    def __init__(self, spec: Spec, cfg: EXPOConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        check(c.num_critics, c.backup_critics)
        self.base = self.make_base()
        require(self.base, "sample", "matching_loss", by="EXPO")
        self.base_slow = frozen_copy(self.base)
        self.edit = TanhGaussianPolicy(spec.obs_dim + spec.act_dim, spec.act_dim, c.hidden)
        xavier_(self.edit)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=c.num_critics, layer_norm=c.layer_norm)
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log())
        self.opt_base = adam(self.base.parameters(), c.base_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.num_edits = min(c.num_edits, c.num_actions) if c.beta else 0
        if self.num_edits:
            within_reach = spec.act_dim * (math.log(c.beta) - 0.5)
            self.target_entropy = within_reach if c.target_entropy is None else c.target_entropy
            self.opt_edit = adam(self.edit.parameters(), c.actor_lr)
            self.opt_alpha = adam([self.log_alpha], c.alpha_lr)
        else:
            self.edit.requires_grad_(False)
            self.log_alpha.requires_grad_(False)
        shape = self.choices(self.base).noise_shape
        assert shape is not None
        self.register_buffer("bank", torch.randn(c.num_actions, *shape))
        self.bank[0] = 0.0

    def make_base(self) -> GenerativePolicy:
        """The base policy as configured; a subclass may give any that can `sample` and has a `matching_loss`."""
        c, obs_dim, act_dim = self.cfg, self.spec.obs_dim, self.spec.act_dim
        net = field_net(c.base_net, c.base, obs_dim, act_dim, c.base_hidden)
        if c.base == "flow":
            return FlowPolicy(obs_dim, act_dim, steps=c.base_steps, net=net)
        return DiffusionPolicy(obs_dim, act_dim, steps=c.base_steps, variance="beta", clip_at="step", net=net)

    def choices(self, base: Policy) -> Policy:
        """What gives the candidates of the on-the-fly policy: draws of `base` and edits of them."""
        return Edited(base, self.edit, self.cfg.beta, self.num_edits) if self.num_edits else base

    def candidates(
        self, base: Policy, obs: Tensor, noise: Tensor | None = None, generator: torch.Generator | None = None
    ) -> Tensor:
        """Actions of the on-the-fly policy to choose from, [..., N + edits, A], in the box whatever the base gives."""
        return self.choices(base).candidates(obs, self.cfg.num_actions, noise, generator).clamp(-1, 1)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The best of base_slow's draws and their edits, by the smallest of a few lagged critics."""
        c = self.cfg
        if explore:
            actions = self.candidates(self.base_slow, obs, generator=self.rng["action"])
            value = subset_min(self.q_lagged(obs, actions), c.backup_critics, self.rng["action"])
        else:
            noise = self.bank.expand(*obs.shape[:-1], *self.bank.shape)
            actions = self.candidates(self.base_slow, obs, noise)
            value = mean_subset_min(self.q_lagged(obs, actions), c.backup_critics)
        return best_of(actions, value), {}

    @torch.no_grad()
    def backup_of(self, b: Batch) -> Tensor:
        """y = r + gamma (1 - terminated) min_{j in S'} Q_lagged_j(s', a*), [B].

        a* is the candidate of the largest min_{j in S} Q_lagged_j; S and S' are drawn one after the other.
        """
        c, g = self.cfg, self.rng["sample"]

        def smallest(action: Tensor) -> Tensor:  # of many critics, only the few that count are asked
            few = random_subset(c.num_critics, c.backup_critics, action.device, g)
            return self.q_lagged(b.next_obs, action, few).amin(0)

        actions = self.candidates(self.base, b.next_obs, generator=g)
        best = best_of(actions, smallest(actions))
        return b.reward + c.gamma * smallest(best) * ~b.terminated

    def critic_loss(self, b: Batch) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2], j over the ensemble."""
        return (self.q(b.obs, b.action) - self.backup_of(b)).square().mean(-1).sum()

    def base_loss(self, b: Batch) -> Tensor:
        """E of the base's matching loss on the actions of the batch: imitation of all data, no value in it."""
        return self.base.matching_loss(b.obs, b.action, generator=self.rng["sample"]).mean()

    def edit_loss(self, b: Batch) -> tuple[Tensor, Tensor]:
        """E[alpha log pi(a|s, a_b) - mean_j Q_j(s, a)] at an edit a of a_b, and log pi [B] (detached)."""
        g, choices = self.rng["sample"], self.choices(self.base)
        assert isinstance(choices, Edited)
        start = b.action
        if self.cfg.edit_of == "base":
            with torch.no_grad():
                start = self.base.sample(b.obs, generator=g).clamp(-1, 1)
        action, logp = choices.edited(b.obs, start, generator=g)
        q = self.q(b.obs, action).mean(0)
        return (self.log_alpha.detach().exp() * logp - q).mean(), logp.detach()

    def alpha_loss(self, logp: Tensor) -> Tensor:
        """-E[log alpha (log pi + target entropy)]: alpha rises while the edits' entropy is below its target."""
        return -(self.log_alpha * (logp + self.target_entropy)).mean()

    def pretrain(self, b: Batch) -> Metrics:
        """One step of the base policy alone, and of its slow copy."""
        loss = minimize(self.base_loss(b), self.opt_base)
        polyak(self.base, self.base_slow, self.cfg.base_tau)
        return {"losses/base": loss}

    def update(self, b: Batch) -> Metrics:
        """Critics and lagged critics; every `policy_every`-th time the base, the edit policy, the temperature."""
        c = self.cfg
        self.counters["updates"] += 1
        metrics = {"losses/critic": minimize(self.critic_loss(b), self.opt_q)}
        polyak(self.q, self.q_lagged, c.tau)
        if self.counters["updates"] % c.policy_every == 0:
            metrics |= self.pretrain(b)
            if self.num_edits:
                loss, logp = self.edit_loss(b)
                metrics["losses/edit"] = minimize(loss, self.opt_edit)
                metrics |= {"policy/edit_entropy": -logp.mean(), "policy/alpha": self.log_alpha.detach().exp()}
                if c.learn_alpha:
                    minimize(self.alpha_loss(logp), self.opt_alpha)
        return metrics
