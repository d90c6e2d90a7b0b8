"""Behaviour cloning with a diffusion policy: imitates every mode of the data instead of their mean.

Source: Wang et al. 2022, arXiv:2208.06193, the cloning term alone (the loss and the sampler: arXiv:2006.11239).
Differs: nothing known of the loss. 10 levels of noise, where Diffusion-QL has 5: of four modes 1.6 apart a perfect
network brings 96% of the draws near one with 10 levels, 63% with 5 (docs/generative.md, "How many steps"). The
deterministic action is that of zero noise, without noise in between: where the data have several modes it may lie
between them, and `rlctl eval --stochastic` is the judge; where they have one and noise on it, it is the better action.
Before update `ema_start` the policy that acts is a plain copy of the one that learns (the released code leaves it at
its initial weights).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import Tensor

from rlctl.agents.offline_learner import check_fit
from rlctl.nets import EMA, DiffusionPolicy, Policy, require
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops import adam, minimize
from rlctl.ops.diffusion import Prediction, Schedule
from rlctl.train import Dataset, OfflineConfig
from rlctl.types import Agent, Batch, Count, Fraction, Metrics, Positive, Spec, Widths


@dataclass(frozen=True)
class CloningConfig(OfflineConfig):
    """What cloning with a generative policy of any kind needs to know."""

    actor_lr: Positive = 3e-4
    """Adam's learning rate."""
    ema_decay: Fraction = 0.995
    """Share that the policy that acts, an average over updates, keeps at each of its steps."""
    ema_every: Count = 5
    """Updates per step of that average."""
    ema_start: Annotated[int, Field(ge=0)] = 1000
    """Update from which it is an average; before, a copy."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""


@dataclass(frozen=True)
class DiffusionBCConfig(CloningConfig):
    """Defaults: the policy of Diffusion-QL, with twice its levels of noise."""

    hidden: Widths = (256, 256, 256)
    """Widths of the hidden layers of the noise-prediction network (Mish)."""
    diffusion_steps: Count = 10
    """Levels of noise T, and evaluations of the network for an action: with few, draws end between modes (5: a third of
    them, at modes 1.6 apart)."""
    schedule: Schedule = "vp"
    """How the noise grows over the levels: vp (for T of 5 to 20), cosine, or linear (for T near 1000)."""
    prediction: Prediction = "eps"
    """What the network predicts: the noise eps, the action x0, or v = sqrt(ab) eps - sqrt(1 - ab) x0."""


class DiffusionBC(Agent):
    """A generative policy and the matching loss of the data's actions."""

    regime = "offline"
    offline_only = "it copies the data's actions and sees no reward"
    Config: ClassVar[type[CloningConfig]] = DiffusionBCConfig
    cfg: CloningConfig

    def __init__(self, spec: Spec, cfg: CloningConfig | None = None) -> None:
        super().__init__(spec, cfg)
        c = self.cfg
        policy = self.make_policy()
        require(policy, "sample", "mode", "matching_loss", by=type(self).__name__)
        self.pi = EMA(policy, c.ema_decay, c.ema_every, c.ema_start)
        self.obs_norm = FixedNorm(spec.obs_dim)
        self.opt_pi = adam(policy.parameters(), c.actor_lr)

    def make_policy(self) -> Policy:
        """The policy that learns."""
        c = self.cfg
        assert isinstance(c, DiffusionBCConfig)
        return DiffusionPolicy(
            self.spec.obs_dim,
            self.spec.act_dim,
            c.hidden,
            schedule=c.schedule,
            steps=c.diffusion_steps,
            prediction=c.prediction,
        )

    def prepare(self, data: Dataset) -> None:
        """Take the observation statistics of the dataset; ValueError if its dimensions are others."""
        check_fit(data, self.spec)
        if self.cfg.normalize_obs:
            self.obs_norm.fit(data.whole().obs)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """A draw of the slow policy, or its action of zero noise."""
        seen = self.obs_norm(obs)
        return (self.pi.sample(seen, generator=self.rng["action"]) if explore else self.pi.mode(seen)), {}

    def actor_loss(self, b: Batch, noise: Tensor | None = None, time: Tensor | None = None) -> Tensor:
        """E_{b,dim}[(net(s, noisy action, time) - target)^2], `noise` [B, A] and `time` [B] drawn if not given."""
        return self.pi.matching_loss(b.obs, b.action, noise, time, self.rng["sample"]).mean()

    def update(self, b: Batch) -> Metrics:
        """One step of supervised learning, then the average moves."""
        self.counters["updates"] += 1
        loss = minimize(self.actor_loss(b._replace(obs=self.obs_norm(b.obs))), self.opt_pi)
        self.pi.update(self.counters["updates"])
        return {"losses/actor": loss}
