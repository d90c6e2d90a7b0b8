"""Agents with one thing wrong with each: what the conformance suite is there to find."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from rlctl.agents.ppo import PPO
from rlctl.agents.sac import SAC, SACConfig
from rlctl.agents.td3bc import TD3BC
from rlctl.types import Batch, Metrics, Spec


class Fine(SAC):
    """Nothing wrong."""


class ReadsOnHost(SAC):
    """Looks at a loss while it learns."""

    def update(self, b: Batch) -> Metrics:
        metrics = super().update(b)
        if metrics["losses/critic"] > 1e9:
            raise RuntimeError
        return metrics


class NumpyInUpdate(SAC):
    """The same by way of `.item()`, in a branch that the small agent never takes."""

    def update(self, b: Batch) -> Metrics:
        if self.counters["updates"] > 1_000:
            print(b.reward.mean().item())
        return super().update(b)


class MasksDone(SAC):
    """Takes a time limit for an end."""

    def update(self, b: Batch) -> Metrics:
        return super().update(b._replace(terminated=b.terminated | b.truncated))


class MasksNothing(SAC):
    """Bootstraps beyond a termination."""

    def update(self, b: Batch) -> Metrics:
        return super().update(b._replace(terminated=torch.zeros_like(b.terminated)))


class GlobalNoise(SAC):
    """Draws from torch's global generator."""

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        mode = self.pi(obs).mode
        return (mode + 0.1 * torch.randn_like(mode) if explore else mode), {}


class NoisyMode(SAC):
    """Its deterministic action is none."""

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return super().act(obs, True)


class ForgetsState(SAC):
    """Learns by a number that no checkpoint holds."""

    def __init__(self, spec: Spec, cfg: Any = None) -> None:
        super().__init__(spec, cfg)
        self.seen = torch.zeros(())

    def update(self, b: Batch) -> Metrics:
        self.seen = self.seen + 1
        return super().update(b._replace(reward=b.reward + self.seen))


class ForgetsNormaliser(TD3BC):
    """Acts by statistics that are no buffer."""

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return super().act(obs - getattr(self, "shift", 0.0), explore)

    def update(self, b: Batch) -> Metrics:
        self.shift = b.obs.mean(0)
        return super().update(b)


class Orphan(SAC):
    """A parameter that no optimiser holds."""

    def __init__(self, spec: Spec, cfg: Any = None) -> None:
        super().__init__(spec, cfg)
        self.lost = nn.Parameter(torch.zeros(3))


class WritesBatch(PPO):
    """Scales the rewards where they lie."""

    def update(self, batch: Batch) -> Metrics:
        batch.reward.mul_(0.1)
        return super().update(batch)


class BatchNorm(SAC):
    """An action depends on the other rows."""

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        return super().act(obs - obs.mean(0), explore)


class WrongSign(SAC):
    """Climbs down."""

    def actor_loss(self, b: Batch) -> tuple[Tensor, Tensor]:
        loss, logp = super().actor_loss(b)
        return -loss, logp


class VectorMetric(SAC):
    """A metric per row."""

    def update(self, b: Batch) -> Metrics:
        return super().update(b) | {"losses/rows": b.reward}


@dataclass
class LooseConfig:
    """Not frozen."""

    steps: int = 100


class Loose(SAC):
    """Its config can be changed."""

    Config = LooseConfig

    def __init__(self, spec: Spec, cfg: Any = None) -> None:
        super().__init__(spec, replace(SACConfig(), steps=100))


class Untraited(SAC):
    """Traits of a wrong kind."""

    conformance = {"solve": {}}  # noqa: RUF012
