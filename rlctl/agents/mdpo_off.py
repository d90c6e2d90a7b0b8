"""Mirror descent policy optimisation, off-policy: soft actor-critic held near a policy of up to m steps ago.

Source: Tomar et al. 2020, arXiv:2005.09814 (the off-policy algorithm and its Tsallis variant); released code
github.com/manantomar/Mirror-Descent-Policy-Optimization.
Differs: the entropy in the actor's objective is kept as it is (`form=exact`), where the paper's code replaces it by its
tangent at the old policy (`form=linearised`), which is unstable for kl_coef <= alpha / 2. Critics are those of our SAC
(twin, lagged; the actor takes their minimum), so that the two algorithms differ in the mirror step alone; the code's
are `critic=value`, `actor_q=first`. Behaviour is sampled, where the code acts on tanh of the mean after its warm-up
(`sample_actions=false`). Critics step before the actor, and their losses carry no factor 1/2. Log-densities are exact,
without the code's floor at log 1e-6; the code's penalty on the policy's outputs is off (`output_penalty=1e-3` is its).
Networks start as PyTorch's do, the code's Glorot-uniform with zero biases.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.nets import QEnsemble, TanhGaussianPolicy, TanhNormal, ValueNet
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.mirror import MirrorForm, mirror_weights, tsallis_log
from rlctl.train import OffPolicyConfig
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class MDPOOffConfig(OffPolicyConfig):
    """Defaults: those of the released code but for what the module's `Differs:` lists."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """Lagged networks move by tau towards the online ones after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the policy."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    alpha: NonNegative = 0.2
    """Weight of the entropy (the paper's lambda), fixed."""
    kl_coef: NonNegative = 1.0
    """Weight c = 1 / t_k of the divergence from the old policy."""
    anchor_every: Count = 1000
    """The old policy is replaced by the current one every so many environment steps (the paper's m)."""
    form: MirrorForm = "exact"
    """exact: the entropy itself; linearised: its tangent at the old policy, as in the released code."""
    tsallis_q: Annotated[float, Field(ge=1, le=2)] = 1.0
    """Order of the Tsallis entropy, per action dimension; 1 is Shannon's."""
    critic: Literal["twin", "value"] = "twin"
    """twin: the backup takes lagged Q networks; value: a lagged V network, fitted to the soft value of Q."""
    actor_q: Literal["min", "mean", "first"] = "min"
    """What the actor climbs: the smaller of two critics, their mean, or the first."""
    sample_actions: bool = True
    """Draw the actions of the behaviour policy; off: take the deterministic one after the warm-up."""
    output_penalty: NonNegative = 0.0
    """Weight of the mean squares of the policy's means (before tanh) and log-stds in the actor's loss."""


class MDPOOff(Agent):
    """Twin critics, squashed-Gaussian actor, a frozen copy of it (the anchor) that the actor is held near."""

    regime = "off_policy"
    Config = MDPOOffConfig
    cfg: MDPOOffConfig

    def __init__(self, spec: Spec, cfg: MDPOOffConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        if c.form == "linearised" and c.kl_coef <= c.alpha / 2:
            raise ValueError(
                f"kl_coef={c.kl_coef} is too small for form=linearised with alpha={c.alpha}: the steps diverge unless "
                "kl_coef > alpha / 2 (form=exact takes any)"
            )
        self.on_pi, self.on_anchor = mirror_weights(c.kl_coef, c.alpha, c.form, c.tsallis_q)
        self.pi = TanhGaussianPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_anchor = frozen_copy(self.pi)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        if c.critic == "value":
            self.v = ValueNet(spec.obs_dim, c.hidden)
            self.v_lagged = frozen_copy(self.v)
            self.opt_v = adam(self.v.parameters(), c.critic_lr)
        else:
            self.q_lagged = frozen_copy(self.q)
        self.counters["anchors"] = 0

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the squashed Gaussian, or tanh of its mean."""
        pi = self.pi(obs)
        return (pi.sample(generator=self.rng["action"]) if explore and self.cfg.sample_actions else pi.mode), {}

    def draw(self, pi: TanhNormal, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """u [B, A] (the action is tanh u) and its log-density [B] under `pi`, a Tsallis logarithm if so configured."""
        if self.cfg.tsallis_q == 1:
            return pi.sample_pre_tanh(noise, self.rng["sample"])
        u, logp = pi.sample_pre_tanh(noise, self.rng["sample"], reduce=False)
        return u, tsallis_log(logp, self.cfg.tsallis_q).sum(-1)

    def log_density(self, pi: TanhNormal, u: Tensor) -> Tensor:
        """What `draw` gives beside u, for a given u."""
        if self.cfg.tsallis_q == 1:
            return pi.log_prob_pre_tanh(u)
        return tsallis_log(pi.log_prob_pre_tanh(u, reduce=False), self.cfg.tsallis_q).sum(-1)

    @torch.no_grad()
    def soft_value(self, q: QEnsemble, obs: Tensor, noise: Tensor | None = None) -> Tensor:
        """min_j Q_j(s, a) - alpha log pi(a|s) at a fresh draw a of the current policy, [B]."""
        u, logp = self.draw(self.pi(obs), noise)
        return q(obs, u.tanh()).amin(0) - self.cfg.alpha * logp

    def critic_loss(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) V(s').

        V(s') is the soft value by the lagged Q, or the lagged V network.
        """
        with torch.no_grad():
            twin = self.cfg.critic == "twin"
            next_v = self.soft_value(self.q_lagged, b.next_obs, noise) if twin else self.v_lagged(b.next_obs)
            backup = b.reward + self.cfg.gamma * next_v * ~b.terminated
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def value_loss(self, b: Batch, noise: Tensor | None = None) -> Tensor:
        """E[(V(s) - soft value by the online Q)^2], of `critic=value`."""
        return (self.v(b.obs) - self.soft_value(self.q, b.obs, noise)).square().mean()

    def reduce(self, q: Tensor) -> Tensor:
        """What the actor climbs, [E, B] -> [B]."""
        return q.amin(0) if self.cfg.actor_q == "min" else q.mean(0) if self.cfg.actor_q == "mean" else q[0]

    def actor_loss(self, b: Batch, noise: Tensor | None = None) -> tuple[Tensor, Metrics]:
        """E[on_pi log pi(a|s) + on_anchor log pi_anchor(a|s) - Q(s, a)], a reparameterised, and what to log.

        The anchor's density is taken at the same pre-tanh u, with gradient through u.
        """
        pi, anchor = self.pi(b.obs), self.pi_anchor(b.obs)
        u, logp = self.draw(pi, noise)
        logp_anchor = self.log_density(anchor, u)
        q = self.reduce(self.q(b.obs, u.tanh()))
        loss = (self.on_pi * logp + self.on_anchor * logp_anchor - q).mean()
        if self.cfg.output_penalty:
            size = pi.mean.square().mean() + pi.log_std.square().mean()
            loss = loss + self.cfg.output_penalty * size
        with torch.no_grad():
            log = {"policy/anchor_kl": pi.kl(anchor).mean(), "policy/entropy": -logp.mean()}
        return loss, log

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, lagged critics; the anchor when `anchor_every` environment steps have passed."""
        c = self.cfg
        self.counters["updates"] += 1
        metrics = {"losses/critic": minimize(self.critic_loss(b), self.opt_q)}
        if c.critic == "value":
            metrics["losses/value"] = minimize(self.value_loss(b), self.opt_v)
        actor_loss, log = self.actor_loss(b)
        metrics["losses/actor"] = minimize(actor_loss, self.opt_pi)
        if c.critic == "value":
            polyak(self.v, self.v_lagged, c.tau)
        else:
            polyak(self.q, self.q_lagged, c.tau)
        if (due := self.counters["env_steps"] // c.anchor_every) > self.counters["anchors"]:
            self.counters["anchors"] = due
            polyak(self.pi, self.pi_anchor, 1.0)
        return metrics | log
