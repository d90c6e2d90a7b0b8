"""What the learners of values from data share: how they see observations and rewards. Not an algorithm."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor

from rlctl.data.dataset import Dataset
from rlctl.data.reward import RewardTransform
from rlctl.nets.normalizer import FixedNorm
from rlctl.train import Dataset as AnyDataset
from rlctl.train import OfflineRLConfig
from rlctl.types import Agent, Batch, Metrics, Regime, Spec


def note(log: Metrics | None, name: str, x: Tensor) -> None:
    """Leave the mean of `x` in `log`, if there is one: what a loss has computed anyway and a run should show.

    `value/q` is the mean Q of the data's actions, `value/q_pi` that of the policy's as its loss sees it, `value/v` the
    mean V of the data's states; `losses/regulariser` an actor's distance from the data, without its weight;
    `value/capped_share` the share of cloning weights at their bound.
    """
    if log is not None:
        log[name] = x.detach().float().mean()


def check_fit(data: AnyDataset, spec: Spec) -> None:
    """ValueError unless observations and actions of `data` are as long as the agent's."""
    rows = data.whole()
    dims = rows.obs.shape[-1], rows.action.shape[-1]
    if dims != (spec.obs_dim, spec.act_dim):
        raise ValueError(
            f"the dataset has observations of {dims[0]} and actions of {dims[1]} numbers, the agent {spec.obs_dim} and "
            f"{spec.act_dim}: make it with Spec({dims[0]}, {dims[1]})"
        )


class OfflineLearner(Agent):
    """An agent whose networks see z-scored observations and transformed rewards, both fixed by the dataset.

    The settings `normalize_obs` and `reward` decide. Online, after the data, the same transforms go on.
    """

    regime: ClassVar[Regime] = "offline"
    cfg: OfflineRLConfig

    def __init__(self, spec: Spec, cfg: OfflineRLConfig | None = None) -> None:
        super().__init__(spec, cfg)
        self.obs_norm = FixedNorm(spec.obs_dim)
        self.reward = RewardTransform(self.cfg.reward)

    def prepare(self, data: Dataset) -> None:
        """Take the observation statistics of the dataset, and what the reward transform needs.

        ValueError for a dataset of other dimensions, which some losses would broadcast over.
        """
        check_fit(data, self.spec)
        self.reward.fit(data)
        if self.cfg.normalize_obs:
            self.obs_norm.fit(data.whole().obs)

    def seen(self, b: Batch) -> Batch:
        """What the losses see of a batch: observations z-scored, rewards transformed."""
        return b._replace(obs=self.obs_norm(b.obs), next_obs=self.obs_norm(b.next_obs), reward=self.reward(b.reward))
