"""my-algo: a deterministic actor and two critics, learning from replay. A starting point: make it yours.

Source: Lillicrap et al. 2015, arXiv:1509.02971 (DDPG), with the smaller of two critics (arXiv:1802.09477).
Differs: exploration noise is Gaussian and independent in time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl.conformance import Traits
from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.train import OffPolicyConfig
from rlctl.types import Agent, Batch, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class MyAlgoConfig(OffPolicyConfig):
    """The string after each field is what `rlctl config my-algo` shows."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """Lagged networks move by tau towards the online ones after each update."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    exploration_noise: NonNegative = 0.1
    """Std of the Gaussian added to the action while collecting, in units of [-1, 1]."""


class MyAlgo(Agent):
    """Networks and optimisers are attributes: they are found, saved and resumed by themselves."""

    regime = "off_policy"
    Config = MyAlgoConfig
    cfg: MyAlgoConfig
    # with which settings `rlctl check algo` sees it solve the probe environments
    conformance = Traits(solve={"steps": 1500, "num_envs": 1, "hidden": (64, 64), "critic_lr": 2e-3})

    def __init__(self, spec: Spec, cfg: MyAlgoConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(s) for observations [N, O], with Gaussian noise while exploring. Random numbers come from `self.rng`."""
        action = self.pi(obs)
        if explore:
            noise = torch.randn(action.shape, generator=self.rng["action"], device=action.device)
            action = (action + self.cfg.exploration_noise * noise).clamp(-1, 1)
        return action, {}

    def critic_loss(self, b: Batch) -> Tensor:
        """sum_j E[(Q_j(s, a) - y)^2],  y = r + gamma (1 - terminated) min_j Q_lagged_j(s', pi_lagged(s'))."""
        with torch.no_grad():
            q_next = self.q_lagged(b.next_obs, self.pi_lagged(b.next_obs)).amin(0)
            backup = b.reward + self.cfg.gamma * q_next * ~b.terminated  # a truncation is not an end
        return (self.q(b.obs, b.action) - backup).square().mean(-1).sum()

    def actor_loss(self, b: Batch) -> Tensor:
        """-E[Q_1(s, pi(s))]."""
        return -self.q(b.obs, self.pi(b.obs))[0].mean()

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, lagged networks. Nothing here may read a tensor on the host (`.item()`, `bool(tensor)`)."""
        self.counters["updates"] += 1
        critic_loss = minimize(self.critic_loss(b), self.opt_q)
        actor_loss = minimize(self.actor_loss(b), self.opt_pi)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return {"losses/critic": critic_loss, "losses/actor": actor_loss}
