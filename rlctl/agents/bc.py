"""Behaviour cloning: supervised learning of the data's actions, or of those in its best episodes.

Source: Pomerleau 1988; the settings and the "10% BC" baseline are those that Chen et al. 2021, arXiv:2106.01345, and
CORL (arXiv:2210.07105) compare with.
Differs: `best_share` keeps ceil(share * episodes) whole episodes as the dataset cuts them (CORL rounds down, and cuts
at a termination or after 1000 rows). `head=gaussian` maximises the likelihood instead of minimising the squared error.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import check_fit
from rlctl.nets import DeterministicPolicy, TanhGaussianPolicy
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, minimize
from rlctl.train import Dataset, OfflineConfig, offline
from rlctl.types import Agent, Batch, Metrics, NonNegative, Positive, Spec, Widths

if TYPE_CHECKING:
    from rlctl.train import Job


@dataclass(frozen=True)
class BCConfig(OfflineConfig):
    """Defaults: those of CORL."""

    best_share: Annotated[float, Field(gt=0, le=1)] = 1.0
    """Share of the episodes to imitate, those of the largest returns; 0.1 is the baseline called 10% BC."""
    hidden: Widths = (256, 256)
    """Widths of the policy's hidden layers."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate."""
    head: Literal["deterministic", "gaussian"] = "deterministic"
    """Policy: one action by squared error, or a squashed Gaussian by likelihood."""
    exploration_noise: NonNegative = 0.1
    """Std of the noise on the deterministic head's actions in a stochastic evaluation, in units of [-1, 1]."""
    normalize_obs: bool = True
    """z-score observations with the mean and std (+ 1e-3) of the data imitated."""


def train_bc(job: Job) -> None:
    """The schedule: learn offline from the best episodes."""
    share = job.cfg.best_share
    offline(job.agent, job.data if share == 1 else job.data.best_episodes(share), job.run)


class BC(Agent):
    """A policy and the distance of its actions from the data's."""

    regime = "offline"
    Config = BCConfig
    schedule: ClassVar[Callable[[Job], None] | None] = staticmethod(train_bc)
    offline_only = "it copies the data's actions and sees no reward"
    cfg: BCConfig

    def __init__(self, spec: Spec, cfg: BCConfig | None = None) -> None:
        super().__init__(spec, cfg)
        head = DeterministicPolicy if self.cfg.head == "deterministic" else TanhGaussianPolicy
        self.pi = head(spec.obs_dim, spec.act_dim, self.cfg.hidden)
        self.obs_norm = FixedNorm(spec.obs_dim)
        self.opt_pi = adam(self.pi.parameters(), self.cfg.actor_lr)

    def prepare(self, data: Dataset) -> None:
        """Take the observation statistics; ValueError for data that do not fit or hold other episodes."""
        check_fit(data, self.spec)
        share = getattr(data, "share", 1.0)
        if share != self.cfg.best_share:
            raise ValueError(
                f"best_share={self.cfg.best_share} but the data given holds the best {share} of its episodes: "
                f"pass data.best_episodes({self.cfg.best_share}), as `rlctl train` does"
            )
        if self.cfg.normalize_obs:
            self.obs_norm.fit(data.whole().obs)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """The policy's action, with Gaussian noise (or drawn from the Gaussian head) while exploring."""
        pi, rng = self.pi(self.obs_norm(obs)), self.rng["action"]
        if not isinstance(pi, Tensor):
            return (pi.sample(generator=rng) if explore else pi.mode), {}
        if explore:
            noise = torch.randn(pi.shape, generator=rng, device=pi.device)
            pi = (pi + self.cfg.exploration_noise * noise).clamp(-1, 1)
        return pi, {}

    def actor_loss(self, b: Batch) -> Tensor:
        """E_{b,dim}[(pi(s) - a)^2], or -E[log pi(a|s)] (actions clipped to +-(1 - 1e-5)) of the Gaussian head."""
        pi = self.pi(b.obs)
        if isinstance(pi, Tensor):
            return (pi - b.action).square().mean()
        return -pi.log_prob(b.action, eps=1e-5).mean()

    def update(self, b: Batch) -> Metrics:
        """One step of supervised learning."""
        self.counters["updates"] += 1
        return {"losses/actor": minimize(self.actor_loss(b._replace(obs=self.obs_norm(b.obs))), self.opt_pi)}
