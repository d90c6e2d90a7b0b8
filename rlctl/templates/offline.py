"""my-algo: a deterministic actor-critic held near the actions of a dataset. A starting point: make it yours.

Source: Fujimoto & Gu 2021, arXiv:2106.06860 (a minimalist approach to offline learning), eq. 3.
Differs: actor and lagged networks move with every update; no smoothing noise in the backup.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rlctl.conformance import Traits
from rlctl.data.dataset import Dataset
from rlctl.nets import DeterministicPolicy, QEnsemble
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, frozen_copy, minimize, polyak
from rlctl.ops.td3 import scaled_value_loss
from rlctl.train import OfflineConfig
from rlctl.types import Agent, Batch, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class MyAlgoConfig(OfflineConfig):
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
    alpha: NonNegative = 2.5
    """Weight of the value against staying near the data; 0 is pure cloning."""
    exploration_noise: NonNegative = 0.1
    """Std of the Gaussian added to the action in a stochastic evaluation."""


class MyAlgo(Agent):
    """Networks and optimisers are attributes: they are found, saved and resumed by themselves."""

    regime = "offline"
    Config = MyAlgoConfig
    cfg: MyAlgoConfig
    # with which settings `rlctl check algo` sees it solve the probe environments: their data are random, so alpha is
    # large (the point is to solve the task, not to stay near)
    conformance = Traits(solve={"steps": 1500, "alpha": 100.0, "hidden": (64, 64), "critic_lr": 2e-3})

    def __init__(self, spec: Spec, cfg: MyAlgoConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        self.pi = DeterministicPolicy(spec.obs_dim, spec.act_dim, c.hidden)
        self.q = QEnsemble(spec.obs_dim, spec.act_dim, c.hidden, num=2)
        self.pi_lagged, self.q_lagged = frozen_copy(self.pi), frozen_copy(self.q)
        self.obs_norm = FixedNorm(spec.obs_dim)  # a module: saved and exported with the agent
        self.opt_pi = adam(self.pi.parameters(), c.actor_lr)
        self.opt_q = adam(self.q.parameters(), c.critic_lr)

    def prepare(self, data: Dataset) -> None:
        """Look at the whole dataset before learning: here, its observation statistics."""
        self.obs_norm.fit(data.whole().obs)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(s) for observations [N, O], with Gaussian noise while exploring. Random numbers come from `self.rng`."""
        action = self.pi(self.obs_norm(obs))
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
        """-lambda E[Q_1(s, pi(s))] + E[(pi(s) - a)^2],  lambda = alpha / E|Q_1(s, pi(s))|."""
        action = self.pi(b.obs)
        value = scaled_value_loss(self.q(b.obs, action)[0], self.cfg.alpha)
        return value + (action - b.action).square().mean()

    def update(self, b: Batch) -> Metrics:
        """Critics, actor, lagged networks. Nothing here may read a tensor on the host (`.item()`, `bool(tensor)`)."""
        self.counters["updates"] += 1
        b = b._replace(obs=self.obs_norm(b.obs), next_obs=self.obs_norm(b.next_obs))
        critic_loss = minimize(self.critic_loss(b), self.opt_q)
        actor_loss = minimize(self.actor_loss(b), self.opt_pi)
        polyak(self.q, self.q_lagged, self.cfg.tau)
        polyak(self.pi, self.pi_lagged, self.cfg.tau)
        return {"losses/critic": critic_loss, "losses/actor": actor_loss}
