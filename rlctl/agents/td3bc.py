"""TD3+BC: offline TD3 whose actor is held near the data by a behaviour-cloning term.

Source: Fujimoto & Gu 2021, arXiv:2106.06860, eqs. 3-5.
Differs: nothing known. (The cloning term is a mean over batch AND action dimensions, lambda uses Q_1 alone, and the
paper's alpha multiplies Q: a LARGE alpha means more RL, less cloning.)
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from rlctl.agents.td3 import TD3
from rlctl.data.dataset import Dataset
from rlctl.data.reward import RewardName, RewardTransform
from rlctl.nets.normalizer import FixedNorm
from rlctl.ops.td3 import scaled_value_loss
from rlctl.train import OfflineConfig
from rlctl.types import Batch, Count, Fraction, Metrics, NonNegative, Positive, Spec, Widths


@dataclass(frozen=True)
class TD3BCConfig(OfflineConfig):
    """Defaults: the one set the paper uses for every dataset."""

    hidden: Widths = (256, 256)
    """Widths of the hidden layers of actor and critics."""
    gamma: Fraction = 0.99
    """Discount per environment step."""
    tau: Fraction = 0.005
    """Lagged networks move by tau towards the online ones at each actor step."""
    actor_lr: Positive = 3e-4
    """Adam's learning rate of the actor."""
    critic_lr: Positive = 3e-4
    """Adam's learning rate of the critics."""
    policy_noise: NonNegative = 0.2
    """Std of the Gaussian that smooths the action in the backup."""
    noise_clip: Positive = 0.5
    """Bound of that smoothing noise."""
    policy_every: Count = 2
    """Critic updates per actor update."""
    exploration_noise: NonNegative = 0.1
    """Std of the Gaussian added to the action in a stochastic evaluation."""
    alpha: float = 2.5
    """Weight of the value term against cloning, after normalising Q by its mean magnitude; 0 is pure cloning."""
    normalize_obs: bool = True
    """z-score observations with the dataset's mean and std (+ 1e-3)."""
    reward: RewardName = "none"
    """Reward transform: none, return-range, standardise, or a formula like 10r-5 (see docs/data.md)."""


class TD3BC(TD3):
    """TD3 with lambda Q + cloning as the actor's objective and z-scored observations."""

    regime = "offline"
    Config = TD3BCConfig
    cfg: TD3BCConfig  # type: ignore[assignment]  # TD3's fields without those of collecting

    def __init__(self, spec: Spec, cfg: TD3BCConfig | None = None) -> None:
        super().__init__(spec, cfg)  # type: ignore[arg-type]
        self.obs_norm = FixedNorm(spec.obs_dim)
        self.reward = RewardTransform(self.cfg.reward)

    def prepare(self, data: Dataset) -> None:
        """Take the observation statistics of the dataset, and what the reward transform needs."""
        self.reward.fit(data)
        if self.cfg.normalize_obs:
            self.obs_norm.fit(data.whole().obs)

    def act(self, obs: Tensor, explore: bool) -> tuple[Tensor, dict[str, Tensor]]:
        """pi(z-scored s)."""
        return super().act(self.obs_norm(obs), explore)

    def actor_loss(self, b: Batch) -> Tensor:
        """-lambda E[Q_1(s, pi(s))] + E_{b,dim}[(pi(s) - a)^2],  lambda = alpha / E|Q_1(s, pi(s))| (no gradient)."""
        action = self.pi(b.obs)
        q = self.q(b.obs, action)[0]
        return scaled_value_loss(q, self.cfg.alpha) + (action - b.action).square().mean()

    def update(self, b: Batch) -> Metrics:
        """TD3's update on z-scored observations and transformed rewards."""
        obs, next_obs = self.obs_norm(b.obs), self.obs_norm(b.next_obs)
        return super().update(b._replace(obs=obs, next_obs=next_obs, reward=self.reward(b.reward)))
