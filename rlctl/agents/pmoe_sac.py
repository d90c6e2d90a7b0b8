"""Probabilistic mixture of experts in soft actor-critic: a Gaussian mixture as the policy, its gate learned.

Source: Ren et al. 2021, arXiv:2104.09122 (frequency loss, back-propagation-max); official code
github.com/JieRen98/rlkit-pmoe.
Differs: the deterministic action is the mean of one component, that of the largest weight or of the largest Q; the
official evaluation draws the component. Update order, temperature and initialisation are those of our SAC, which one
component gives exactly: the official code steps the temperature first and starts all components near zero. Chosen
components and their log-densities are the official ones: the entropy that is rewarded is that of a component, not that
of the mixture (`density=mixture` rewards the latter).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor, nn

from rlctl.agents.sac import SACConfig
from rlctl.nets import QEnsemble, TanhMixturePolicy
from rlctl.nets.distributions import TanhNormalMixture, take
from rlctl.nets.policy import GateInput
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.mixtures import Deterministic, frequency_loss, gate_use
from rlctl.ops.selection import best_of
from rlctl.types import Agent, Batch, Count, Metrics, Spec


@dataclass(frozen=True)
class PMOESACConfig(SACConfig):
    """Defaults: those of the official code, warm-up and initial temperature those of our SAC."""

    num_components: Count = 4
    """Components of the mixture; 1 is SAC."""
    improve: Literal["best", "all"] = "best"
    """Components the actor loss improves at each state: the one whose draw has the largest Q, or every one."""
    density: Literal["component", "mixture"] = "component"
    """Whose log-density stands for log pi: that of the chosen component, or that of the whole mixture."""
    gate: GateInput = "features"
    """What the gate sees: the last hidden layer of the policy (detached), or the observation."""
    deterministic: Deterministic = "gate"
    """The deterministic action: the mean of the component of the largest gate weight, or of the largest min_j Q_j."""


class PMOESAC(Agent):
    """Twin critics, squashed-Gaussian-mixture actor, automatic temperature."""

    regime = "off_policy"
    Config = PMOESACConfig
    cfg: PMOESACConfig

    def __init__(self, spec: Spec, cfg: PMOESACConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = TanhMixturePolicy(spec.obs_dim, spec.act_dim, c.hidden, c.num_components, gate=c.gate)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.q_lagged = frozen_copy(self.q)
        self.log_alpha = nn.Parameter(torch.tensor(c.alpha).log())
        self.target_entropy = -float(spec.act_dim) if c.target_entropy is None else c.target_entropy
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)
        self.opt_alpha = adam([self.log_alpha], c.alpha_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the mixture, or tanh of the mean of one component, named by gate or critics (`deterministic`)."""
        pi = self.pi(obs)
        if explore:
            return pi.sample(generator=self.rng["action"]), {}
        if self.cfg.deterministic == "gate":
            return pi.mode, {}
        return best_of(pi.components.mode, self.q(obs, pi.components.mode).amin(0)), {}

    def critic_loss(self, b: Batch, noise: Tensor | None = None, uniform: Tensor | None = None) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) (min_j Q_lagged_j(s', a') - alpha log pi_k(a')).

        k ~ w(s') by `uniform` [B], a' ~ pi_k by `noise` [B, A].
        """
        with torch.no_grad():
            pi = self.pi(b.next_obs)
            u, logp = pi.select(pi.choose(uniform, self.rng["sample"])).sample_pre_tanh(noise, self.rng["sample"])
            if self.cfg.density == "mixture":
                logp = pi.log_prob_pre_tanh(u)
            soft_v = self.q_lagged(b.next_obs, u.tanh()).amin(0) - self.log_alpha.exp() * logp
            backup = b.reward + self.cfg.gamma * soft_v * ~b.terminated
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch, noise: Tensor | None = None) -> tuple[Tensor, Tensor, Metrics]:
        """E[alpha log pi_k(a_k|s) - min_j Q_j(s, a_k)] of the best component k plus the gate's frequency loss.

        One draw a_k of every component by `noise` [B, K, A]; best is the largest min_j Q_j. `improve=all` sums over all
        k. No gradient of the first term reaches the gate; what scale the second has does not matter to Adam. Also
        returns the log-densities that the temperature sees (detached), and what to log.
        """
        pi = self.pi(b.obs)
        u, logp = pi.components.sample_pre_tanh(noise, self.rng["sample"])  # [B, K, A], [B, K]
        with torch.no_grad():
            best = self.q(b.obs, u.tanh()).amin(0).argmax(-1)
        if self.cfg.improve == "best":
            u, logp = take(u, best).unsqueeze(1), take(logp, best).unsqueeze(1)
        if self.cfg.density == "mixture":
            fixed_gate = replace(pi, logits=pi.logits.detach())
            logp = fixed_gate.log_prob_pre_tanh(u.movedim(1, 0)).movedim(0, 1)
        q = self.q(b.obs, u.tanh()).amin(0)
        primitives = (self.log_alpha.detach().exp() * logp - q).sum(-1).mean()
        gate = frequency_loss(pi.weights, best)
        return primitives + gate, logp.detach().flatten(), {"losses/gate": gate.detach()} | self.utilisation(pi, best)

    def alpha_loss(self, logp: Tensor) -> Tensor:
        """-E[log alpha (log pi + target entropy)]: alpha rises while the entropy is below its target."""
        return -(self.log_alpha * (logp + self.target_entropy)).mean()

    @torch.no_grad()
    def utilisation(self, pi: TanhNormalMixture, best: Tensor) -> Metrics:
        """How much each component is used (`gate_use`), and the share of states where it is best."""
        shares = (best.unsqueeze(-1) == torch.arange(pi.num, device=best.device)).float().mean(0)
        return gate_use(pi.weights) | {f"mixture/best_{k}": s for k, s in enumerate(shares.unbind())}

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, temperature, lagged critics; all three losses see the temperature of before this update."""
        self.counters["updates"] += 1
        critic_loss = minimize(self.critic_loss(b), self.opt_q)
        actor_loss, logp, log = self.actor_loss(b)
        minimize(actor_loss, self.opt_pi)
        alpha = self.log_alpha.detach().exp()
        if self.cfg.learn_alpha:
            minimize(self.alpha_loss(logp), self.opt_alpha)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        return {
            "losses/critic": critic_loss,
            "losses/actor": actor_loss.detach(),
            "policy/entropy": -logp.mean(),
            "policy/alpha": alpha,
        } | log
