"""ODICE for imitation: ODICE without rewards, on one expert trajectory.

Source: Mao et al. 2024, arXiv:2402.00348 (offline imitation); official code github.com/maoliyuan/ODICE-Pytorch.
Differs: the last transition has its true successor; in the official code it is the first observation of the next
trajectory. The official weight decay is 1e-5 on Hopper, 1e-3 on Walker2d; the default here is Hopper's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from pydantic import Field

from rlctl.agents.odice import ODICE, ODICEConfig
from rlctl.data.reward import RewardName
from rlctl.errors import UsageError
from rlctl.train import Job, offline
from rlctl.types import Batch, Fraction, NonNegative, Positive


@dataclass(frozen=True)
class ODICEILConfig(ODICEConfig):
    """Defaults: those of the official runs on Hopper."""

    steps: Annotated[int, Field(ge=1)] = 500_000
    """Length of the run, in gradient steps."""
    trajectory: Annotated[int, Field(ge=0)] = 1
    """Index of the one episode of the dataset to imitate (the official runs take 1, 10, 20 and 30: indices, not
    numbers of episodes)."""
    layer_norm: bool = False
    """LayerNorm in the values."""
    actor_lr: Positive = 1e-4
    """Adam's learning rate of the policy."""
    v_lr: Positive = 1e-4
    """Adam's learning rate of the values."""
    weight_decay: NonNegative = 1e-5
    """L2 penalty of the policy, inside Adam."""
    lam: Fraction = 0.4
    """Weight of the dual term against 1 - lam of the plain value."""
    tanh_mean: bool = True
    """Keep the policy's mean within (-1, 1)."""
    reward: RewardName = "none"
    """Nothing to transform: rewards are not looked at."""
    normalize_obs: bool = True
    """z-score observations with the mean and std (+ 1e-3) of that one trajectory."""


def imitate_one_trajectory(job: Job) -> None:
    """The schedule: offline learning from one episode of the dataset."""
    try:
        demonstration = job.data.episode(job.cfg.trajectory, job.seed)
    except IndexError as e:
        raise UsageError(f"trajectory={job.cfg.trajectory}: {e}") from e
    offline(job.agent, demonstration, job.run)


class ODICEIL(ODICE):
    """ODICE that sees rewards of 0."""

    Config = ODICEILConfig
    cfg: ODICEILConfig
    schedule = imitate_one_trajectory
    offline_only = "it imitates one trajectory and sees no reward"

    def seen(self, b: Batch) -> Batch:
        """What the losses see of a batch: observations z-scored, rewards of 0."""
        return super().seen(b)._replace(reward=torch.zeros_like(b.reward))
