"""A2PR: TD3+BC that clones, where it is worth cloning, the better of the data action and one a VAE suggests.

Source: Liu et al. 2024, arXiv:2405.19909; official code github.com/ltlhuuu/A2PR.
Differs: the defaults follow the official code, which departs from the paper. The advantage threshold is 0
(`threshold`); advantages compare with the state value as it was before its own gradient step (`fresh_value` takes the
one after it); the VAE's suggestion is NOT a constant: the gradient of the regulariser also flows through the VAE into
the policy's own action (`detach_target` stops it there). The state value is regressed on the smaller of two one-step
targets, without an expectile.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl.agents.offline_learner import OfflineLearner, note
from rlctl.agents.td3 import TD3Settings
from rlctl.nets import DeterministicPolicy, QEnsemble, ValueNet
from rlctl.nets.vae import ActionVAE, prior_kl
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.td3 import clipped_double_backup, perturbed, scaled_value_loss, smoothed
from rlctl.train import OfflineRLConfig
from rlctl.types import Batch, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class A2PRConfig(OfflineRLConfig, TD3Settings):
    """Defaults: those of the official parser. Its medium sets: HalfCheetah alpha 40, mask 1; Hopper mask 0.4, gamma
    0.995; Walker2d mask 1, vae_weight 1.5."""

    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the actor."""
    critic_hidden: Widths = (256, 256, 256, 256)
    """Widths of the hidden layers of the critics and of the state value."""
    vae_hidden: Widths = (750, 750)
    """Widths of the hidden layers of the VAE's encoder and decoder; its code has 2 act_dim numbers."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics and of the state value."""
    vae_lr: Positive = 1e-3
    """Adam's learning rate of the VAE."""
    alpha: NonNegative = 2.5
    """Weight of the value term against the regulariser, after normalising Q by its mean magnitude."""
    mask: NonNegative = 0.5
    """Weight of the regulariser; 0 is TD3 with a normalised Q."""
    vae_weight: NonNegative = 1.0
    """Weight of the VAE's reconstruction error against half its KL divergence."""
    threshold: float = 0.0
    """eps_A of the paper: what an advantage must exceed to count."""
    fresh_value: bool = False
    """Take advantages against the state value after its gradient step of this update, not before."""
    detach_target: bool = False
    """Treat the VAE's suggestion as a constant."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""


class A2PR(OfflineLearner):
    """Twin critics, state value, VAE of the advantageous actions, deterministic actor."""

    Config = A2PRConfig
    cfg: A2PRConfig

    def __init__(self, spec: Spec, cfg: A2PRConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.critic_hidden, num=2)
        # the value of a state under the DATA's first action and the policy's later ones
        self.v_data = ValueNet(spec.obs_dim, c.critic_hidden)
        self.vae = ActionVAE(spec.obs_dim, spec.act_dim, c.vae_hidden)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_v = adam(self.v_data.parameters(), c.critic_lr)
        self.opt_vae = adam(self.vae.parameters(), c.vae_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(z-scored s), with Gaussian noise (clipped to the action range) if `explore`."""
        action = self.pi(self.obs_norm(obs))
        return (perturbed(action, self.cfg.exploration_noise, self.rng["action"]) if explore else action), {}

    @torch.no_grad()
    def backup(self, b: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """TD3's smoothed next action a~ [B, A], and y = r + gamma (1 - terminated) min_j Q_lagged_j(s', a~) [B]."""
        c = self.cfg
        action = smoothed(self.pi_lagged(b.next_obs), noise, c.policy_noise, c.noise_clip, self.rng["sample"])
        return action, clipped_double_backup(b.reward, b.terminated, self.q_lagged(b.next_obs, action), c.gamma)

    def critic_loss(self, b: Batch, backup: Tensor, log: Metrics | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2]."""
        q = self.q(b.obs, b.action)
        note(log, "value/q", q)
        return (q - backup).square().mean(-1).sum()

    def value_loss(self, b: Batch, next_action: Tensor, backup: Tensor) -> tuple[Tensor, Tensor]:
        """E[(V(s) - t)^2],  t = min(r + gamma (1 - terminated) min_j Q_j(s', a~), y); and V(s) [B], detached."""
        with torch.no_grad():
            q_next = self.q(b.next_obs, next_action)
            target = torch.minimum(clipped_double_backup(b.reward, b.terminated, q_next, self.cfg.gamma), backup)
        value = self.v_data(b.obs)
        return (value - target).square().mean(), value.detach()

    def vae_loss(self, b: Batch, value: Tensor, noise: Tensor | None = None) -> Tensor:
        """vae_weight E_{b,dim}[1(A(s, a) > threshold) (rec - a)^2] + KL / 2, with A(s, a) = Q_1(s, a) - `value`."""
        with torch.no_grad():
            worthy = self.q(b.obs, b.action)[0] - value > self.cfg.threshold
        rec, code = self.vae(b.obs, b.action, noise, self.rng["sample"])
        reconstruction = (worthy.unsqueeze(-1) * (rec - b.action).square()).mean()
        return self.cfg.vae_weight * reconstruction + 0.5 * prior_kl(code).mean()

    def target(self, b: Batch, suggestion: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The action to clone [B, A], and whether to clone at all [B].

        Of the data action and `suggestion` the one with the larger Q_1 (ties: the suggestion); on where the
        suggestion's advantage reaches the threshold or the data action's exceeds it.
        """
        with torch.no_grad():
            adv, adv_data = (self.q(b.obs, a)[0] - value for a in (suggestion.detach(), b.action))
            on = (adv >= self.cfg.threshold) | (adv_data > self.cfg.threshold)
        return torch.where((adv >= adv_data).unsqueeze(-1), suggestion, b.action), on

    def actor_loss(self, b: Batch, value: Tensor, noise: Tensor | None = None, log: Metrics | None = None) -> Tensor:
        """-lambda E[Q_1(s, pi(s))] + mask E_{b,dim}[on (pi(s) - target)^2],  lambda = alpha / E|Q_1(s, pi(s))|.

        The suggestion is the VAE's sampled (`noise` [B, Z]) reconstruction of pi(s) itself.
        """
        action = self.pi(b.obs)
        suggestion, _ = self.vae(b.obs, action, noise, self.rng["sample"])
        target, on = self.target(b, suggestion.detach() if self.cfg.detach_target else suggestion, value)
        regulariser = (on.unsqueeze(-1) * (action - target).square()).mean()
        q = self.q(b.obs, action)[0]
        note(log, "value/q_pi", q)
        note(log, "losses/regulariser", regulariser)
        note(log, "value/cloned_share", on)
        return scaled_value_loss(q, self.cfg.alpha) + self.cfg.mask * regulariser

    def update(self, b: Batch) -> Metrics:
        """Critics, state value, VAE; every `policy_every`-th time the actor and then the lagged networks."""
        self.counters["updates"] += 1
        b = self.seen(b)
        next_action, backup = self.backup(b)
        metrics: Metrics = {}
        metrics["losses/critic"] = minimize(self.critic_loss(b, backup, metrics), self.opt_q)
        value_loss, value = self.value_loss(b, next_action, backup)
        note(metrics, "value/v", value)
        metrics["losses/value"] = minimize(value_loss, self.opt_v)
        if self.cfg.fresh_value:
            value = self.v_data(b.obs).detach()
        metrics["losses/vae"] = minimize(self.vae_loss(b, value), self.opt_vae)
        if self.counters["updates"] % self.cfg.policy_every == 0:
            metrics["losses/actor"] = minimize(self.actor_loss(b, value, log=metrics), self.opt_pi)
            polyak(self.q, self.q_lagged, self.cfg.tau)
            polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return metrics
