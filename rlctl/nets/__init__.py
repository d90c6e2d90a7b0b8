"""Networks: modules without losses."""

from rlctl.nets.critic import QEnsemble, ValueNet, VEnsemble
from rlctl.nets.distributions import Normal, NormalMixture, TanhNormal, TanhNormalMixture
from rlctl.nets.mlp import mlp
from rlctl.nets.normalizer import ObsNorm, RewardScale
from rlctl.nets.policy import (
    DeterministicPolicy,
    GaussianPolicy,
    MixturePolicy,
    Policy,
    TanhGaussianPolicy,
    TanhMixturePolicy,
    require,
)

__all__ = [
    "DeterministicPolicy",
    "GaussianPolicy",
    "MixturePolicy",
    "Normal",
    "NormalMixture",
    "ObsNorm",
    "Policy",
    "QEnsemble",
    "RewardScale",
    "TanhGaussianPolicy",
    "TanhMixturePolicy",
    "TanhNormal",
    "TanhNormalMixture",
    "VEnsemble",
    "ValueNet",
    "mlp",
    "require",
]
