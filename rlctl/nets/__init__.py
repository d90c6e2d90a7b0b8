"""Networks: modules without losses."""

from rlctl.nets.critic import QEnsemble, ValueNet
from rlctl.nets.distributions import Normal, TanhNormal
from rlctl.nets.mlp import mlp
from rlctl.nets.normalizer import ObsNorm, RewardScale
from rlctl.nets.policy import DeterministicPolicy, GaussianPolicy, Policy, TanhGaussianPolicy, require

__all__ = [
    "DeterministicPolicy",
    "GaussianPolicy",
    "Normal",
    "ObsNorm",
    "Policy",
    "QEnsemble",
    "RewardScale",
    "TanhGaussianPolicy",
    "TanhNormal",
    "ValueNet",
    "mlp",
    "require",
]
