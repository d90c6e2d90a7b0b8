"""FamO2O on CQL: a policy for every weight of Q against entropy, and a second policy that picks one in each state.

Source: Wang et al. 2023, arXiv:2310.17966; official code github.com/LeapLabTHU/FamO2O (FamO2O-CQL, which
stands on JaxCQL).
Differs: the official code maps the balance policy's draw x in (-1, 1) by x (max - min) + min, beyond the range it
states (-0.5 to 1.5 instead of 0.5 to 1.5); here it is spread over the range itself, `official_range` gives theirs. Data
actions are not clipped to +-0.999. Hidden layers start as torch's, not as Flax's. A Lagrange multiplier, which the
official runs do not have, starts at 1, not at JaxCQL's e.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from rlctl.agents.cql import CQL, CQLConfig
from rlctl.agents.offline_learner import note
from rlctl.nets import QEnsemble, TanhGaussianPolicy, TanhNormal
from rlctl.ops import adam, apply_gradients, gradients
from rlctl.ops.balance import ENCODING_DIM, conditioned, spanned, uniform
from rlctl.types import Batch, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class FamO2OCQLConfig(CQLConfig):
    """Defaults: those of the official MuJoCo runs (2M updates on the data, then 1M environment steps)."""

    steps: Annotated[int, Field(ge=1)] = 2_000_000
    """Length of the run: gradient steps, or environment steps after `offline_updates`."""
    beta_min: NonNegative = 0.5
    """Smallest weight of Q in the policy's loss."""
    beta_max: NonNegative = 1.5
    """Largest one."""
    official_range: bool = False
    """Map the balance policy's draws as the official code does: from 2 beta_min - beta_max to beta_max."""
    balance_lr: Positive = 3e-4
    """Adam's learning rate of the balance policy."""
    data_share: Fraction | None = None
    """Online: part of each batch that comes from the dataset; null draws from dataset and replay as from one table."""
    cql_weight: NonNegative = 1.0
    """Weight of the conservative term; 0 is soft actor-critic."""
    lagrange_form: Literal["official", "scaled"] = "scaled"
    """Multiplier times (cql_weight * C - gap), or times cql_weight * (C - gap)."""
    bc_share: Fraction = 0.0
    """Share of the updates on the data in which the policy is first cloned."""
    simultaneous: bool = True
    """Step all parameters at the end, so that every loss sees those of before the update."""
    hidden: Widths = (256, 256)
    """Widths of the hidden layers of both policies."""
    layer_norm: bool = True
    """LayerNorm before each activation of the critics."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the universal policy."""
    alpha_lr: Positive = 3e-4
    """Adam's learning rate of log alpha."""


class FamO2OCQL(CQL):
    """CQL whose policy is told beta, and a balance policy that picks it by the state."""

    Config = FamO2OCQLConfig
    cfg: FamO2OCQLConfig

    def __init__(self, spec: Spec, cfg: FamO2OCQLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        if c.beta_min > c.beta_max:
            raise ValueError(f"beta goes from beta_min={c.beta_min} to beta_max={c.beta_max}: the second is smaller")
        self.balance = TanhGaussianPolicy(spec.obs_dim, 1, c.hidden, log_std_offset=-1.0, last_variance=1e-2)
        self.opt_balance = adam(self.balance.parameters(), c.balance_lr)

    def make_policy(self) -> TanhGaussianPolicy:
        """The universal policy, of [s, encoded beta]."""
        width = self.spec.obs_dim + ENCODING_DIM
        return TanhGaussianPolicy(width, self.spec.act_dim, self.cfg.hidden, log_std_offset=-1.0, last_variance=1e-2)

    def make_critics(self) -> QEnsemble:
        """Twin critics; they are not told beta."""
        c, dims = self.cfg, (self.spec.obs_dim, self.spec.act_dim)
        hidden = c.hidden if c.critic_hidden is None else c.critic_hidden
        return QEnsemble(*dims, hidden, num=2, layer_norm=c.layer_norm, last_variance=1e-2)

    def span(self, x: Tensor) -> Tensor:
        """beta [B] of a draw x [B, 1] of the balance policy."""
        c, x = self.cfg, x.squeeze(-1)
        return x * (c.beta_max - c.beta_min) + c.beta_min if c.official_range else spanned(x, c.beta_min, c.beta_max)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """At the balance policy's deterministic beta: a draw of the universal policy, or tanh of its mean."""
        obs = self.obs_norm(obs)
        pi = self.pi(conditioned(obs, self.span(self.balance(obs).mode)))
        return (pi.sample(generator=self.rng["action"]) if explore else pi.mode), {}

    def act_by(self, obs: Tensor, noise: Tensor) -> Tensor:
        """The draw of `act` that `noise` decides."""
        obs = self.obs_norm(obs)
        return self.pi(conditioned(obs, self.span(self.balance(obs).mode))).sample(noise)

    def here(self, b: Batch) -> TanhNormal:
        """The universal policy at s, under the coefficient it is trained at: column `beta`."""
        return self.pi(conditioned(b.obs, b.extra["beta"]))

    def following(self, b: Batch) -> TanhNormal:
        """The universal policy at s', under what the balance policy picks in s (not in s'): column `balance`."""
        return self.pi(conditioned(b.next_obs, b.extra["balance"]))

    def actor_loss(self, b: Batch, action: Tensor, logp: Tensor, log: Metrics | None = None) -> Tensor:
        """E[alpha log pi(a | s, beta) - beta min_j Q_j(s, a)] at a reparameterised draw `action` [B, A]."""
        q = self.q(b.obs, action).amin(0)
        note(log, "value/q_pi", q)
        return (self.log_alpha.detach().exp() * logp - b.extra["beta"] * q).mean()

    def balance_loss(self, b: Batch, beta: Tensor, noise: Tensor | None = None) -> Tensor:
        """-E[min_j Q_j(s, a)],  a ~ pi(. | s, beta) with a pathwise gradient into `beta` [B]; no entropy."""
        action = self.pi(conditioned(b.obs, beta)).sample(noise, self.rng["sample"])
        return -self.q(b.obs, action).amin(0).mean()

    def update(self, b: Batch) -> Metrics:
        """CQL's update under drawn coefficients, and the balance policy's step at the parameters of before it.

        beta is drawn uniformly while there is data alone, by the balance policy once there are environment steps.
        """
        c, rng = self.cfg, self.rng["sample"]
        chosen = self.span(self.balance(self.obs_norm(b.obs)).sample(generator=rng))
        balance = chosen.detach()
        beta = balance if self.counters["env_steps"] > 0 else uniform(balance, c.beta_min, c.beta_max, rng)
        balance_loss = self.balance_loss(self.seen(b), chosen)
        step = gradients(balance_loss, self.opt_balance)
        metrics = super().update(b._replace(extra={**b.extra, "beta": beta, "balance": balance}))
        apply_gradients(self.opt_balance, step)
        return metrics | {"losses/balance": balance_loss.detach(), "policy/beta": balance.mean()}
