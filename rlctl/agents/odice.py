"""ODICE: a state value by an orthogonal-gradient update of the DICE dual, and a policy by weighted cloning.

Source: Mao et al. 2024, arXiv:2402.00348; official code github.com/maoliyuan/ODICE-Pytorch.
Differs: the defaults follow the official code. Its policy weight is max(y, 0), not the dual-exact max(y / 2 + 1, 0)
(`policy_weight=dual`), and both are taken from the residuals y of BEFORE the value's step. The
conjugate has an absolute scale: with small rewards the values settle wherever the divergence puts them, and all weights
of the policy can become 0; hence the reward transform of the official locomotion runs.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner
from rlctl.data.reward import RewardName
from rlctl.nets import GaussianPolicy, VEnsemble
from rlctl.ops import adam, apply_gradients, frozen_copy, gradients, minimize, polyak
from rlctl.ops.odice import Divergence, conjugate, dual_weight, orthogonal_sum
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class ODICEConfig(OfflineRLConfig):
    """Defaults: those of the official locomotion runs; lam and eta of single datasets are in the paper's appendix."""

    hidden: Widths = (1024, 1024)
    """Widths of the hidden layers of the policy."""
    v_hidden: Widths = (256, 256)
    """Widths of the hidden layers of the values."""
    layer_norm: bool = True
    """LayerNorm in the values (the official AntMaze runs have none)."""
    num_v: Count = 2
    """Values, of which the smallest counts in a backup (official: one on large AntMazes and umaze-diverse)."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """v_lagged <- v_lagged + tau (v - v_lagged) after each update."""
    actor_lr: Positive = 2e-4
    """Adam's learning rate of the policy."""
    v_lr: Positive = 2e-4
    """Adam's learning rate of the values."""
    weight_decay: NonNegative = 1e-4
    """L2 penalty of the policy, inside Adam."""
    lam: Fraction = 0.6
    """Weight of the dual term against 1 - lam of the plain value: a larger one lifts the values."""
    eta: NonNegative = 1.0
    """Weight of the backward gradient; 0 is the semi-gradient."""
    divergence: Divergence = "chi2"
    """Pearson's chi2, or reverse-kl."""
    gradient: Literal["orthogonal", "semi", "true"] = "orthogonal"
    """How the next state's value takes part: projected; not at all; or fully, with neither lagged value nor eta."""
    policy_weight: Literal["residual", "dual"] = "residual"
    """Weight of a transition in cloning, chi2: the positive part of its residual, or the dual solution."""
    max_weight: Positive = 100.0
    """Bound of that weight."""
    tanh_mean: bool = False
    """Keep the policy's mean within (-1, 1)."""
    reward: RewardName = "return-range"
    """Reward transform: none, return-range, standardise, or a formula (AntMaze: 3r-3; see docs/data.md)."""


class ValueLosses(NamedTuple):
    """The terms of the value's objective, whose gradients are combined."""

    forward: Tensor
    """lam E[f*(y_f)]: its gradient is that of the current state."""
    backward: Tensor | None
    """lam eta E[f*(y_b)]: its gradient is that of the next state; None where it plays no part."""
    plain: Tensor
    """(1 - lam) E[V(s)]."""
    residual: Tensor
    """y_f [E, B], detached."""
    value: Tensor
    """V(s) [E, B], detached."""


class ODICE(OfflineLearner):
    """State values by the orthogonal gradient, Gaussian policy by weighted maximum likelihood."""

    Config = ODICEConfig
    cfg: ODICEConfig

    def __init__(self, spec: Spec, cfg: ODICEConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = GaussianPolicy(
            spec.obs_dim,
            spec.act_dim,
            c.hidden,
            "relu",
            orthogonal=None,
            tanh_mean=c.tanh_mean,
            log_std_bounds=(-5.0, 2.0),
        )
        self.v = VEnsemble(spec.obs_dim, c.v_hidden, c.num_v, layer_norm=c.layer_norm)
        self.v_lagged = frozen_copy(self.v)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr, weight_decay=c.weight_decay)
        self.opt_v = adam(self.v.parameters(), c.v_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The Gaussian's mean, or a draw of it, clipped to the action range."""
        pi = self.pi(self.obs_norm(obs))
        action = pi.sample(generator=self.rng["action"]) if explore else pi.mode
        return action.clamp(-1, 1), {}

    def value_losses(self, b: Batch) -> ValueLosses:
        """The terms of the dual, V- the smallest lagged value:

        y_f = r + gamma (1 - terminated) V-(s') - V(s),  y_b = r + gamma (1 - terminated) V(s') - V-(s), both [E, B].
        """
        c = self.cfg
        go_on = c.gamma * ~b.terminated
        with torch.no_grad():
            low, low_next = self.v_lagged(b.obs).amin(0), self.v_lagged(b.next_obs).amin(0)
        value = self.v(b.obs)
        next_value = self.v(b.next_obs) if c.gradient == "true" else low_next
        y_f = b.reward + go_on * next_value - value
        forward = c.lam * conjugate(y_f, c.divergence).mean()
        backward = None
        if c.gradient == "orthogonal":
            y_b = b.reward + go_on * self.v(b.next_obs) - low
            backward = c.lam * c.eta * conjugate(y_b, c.divergence).mean()
        return ValueLosses(forward, backward, (1 - c.lam) * value.mean(), y_f.detach(), value.detach())

    def value_step(self, losses: ValueLosses) -> Tensor:
        """One step along (1 - c) g_f + g_b + g_plain. Returns c, 0-dim: 0 where no backward gradient plays a part."""
        grads = gradients(losses.forward, self.opt_v, retain_graph=True)  # shares V(s) with the plain term
        c = losses.residual.new_zeros(())
        if losses.backward is not None:
            grads, c = orthogonal_sum(grads, gradients(losses.backward, self.opt_v))
        plain = gradients(losses.plain, self.opt_v)
        apply_gradients(self.opt_v, torch._foreach_add(grads, plain))
        return c

    def weight(self, residual: Tensor) -> Tensor:
        """How much each transition counts in cloning, of the shape of `residual`, at most `max_weight`."""
        c = self.cfg
        exact = c.policy_weight == "dual" or c.divergence == "reverse-kl"
        weight = dual_weight(residual, c.divergence) if exact else residual.clamp(min=0)
        return weight.clamp(max=c.max_weight)

    def policy_loss(self, b: Batch, residual: Tensor) -> Tensor:
        """-E[w(y_f) log pi(a|s)], over transitions and values; `residual` [E, B]."""
        return -(self.weight(residual) * self.pi(b.obs).log_prob(b.action)).mean()

    def update(self, b: Batch) -> Metrics:
        """Values, lagged values, policy; the policy sees the residuals of before the values' step."""
        self.counters["updates"] += 1
        b = self.seen(b)
        losses = self.value_losses(b)
        projection = self.value_step(losses)
        polyak(self.v, self.v_lagged, self.cfg.tau)
        policy_loss = minimize(self.policy_loss(b, losses.residual), self.opt_pi)
        weight = self.weight(losses.residual)
        return {
            "losses/forward": losses.forward.detach(),
            "losses/value": losses.plain.detach(),
            "losses/policy": policy_loss,
            "value/projection": projection,
            "value/v": losses.value.mean(),
            "value/cloned_share": (weight > 0).float().mean(),
            "value/capped_share": (weight >= self.cfg.max_weight).float().mean(),
        } | self.pi.summary()
