"""Where transitions live: replay ring, rollout, mixtures, datasets. Everything stays on the agent's device."""

from rlctl.data.dataset import Dataset, DatasetError, load_dataset
from rlctl.data.episodes import EpisodeRing
from rlctl.data.reward import RewardTransform
from rlctl.data.ring import Mix, Ring
from rlctl.data.rollout import Rollout

__all__ = ["Dataset", "DatasetError", "EpisodeRing", "Mix", "RewardTransform", "Ring", "Rollout", "load_dataset"]
