"""Networks: modules without losses."""

from rlctl.nets.critic import QEnsemble, ValueNet, VEnsemble
from rlctl.nets.distributions import Normal, NormalMixture, TanhNormal, TanhNormalMixture
from rlctl.nets.field import FieldMLP, FieldResNet, field_net
from rlctl.nets.generative import (
    Conditioned,
    DiffusionPolicy,
    FlowPolicy,
    GenerativePolicy,
    LatentDecoderPolicy,
    OneStepPolicy,
)
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
from rlctl.nets.wrappers import EMA, BestOfN, Composed, Edited, WarmStarted

__all__ = [
    "EMA",
    "BestOfN",
    "Composed",
    "Conditioned",
    "DeterministicPolicy",
    "DiffusionPolicy",
    "Edited",
    "FieldMLP",
    "FieldResNet",
    "FlowPolicy",
    "GaussianPolicy",
    "GenerativePolicy",
    "LatentDecoderPolicy",
    "MixturePolicy",
    "Normal",
    "NormalMixture",
    "ObsNorm",
    "OneStepPolicy",
    "Policy",
    "QEnsemble",
    "RewardScale",
    "TanhGaussianPolicy",
    "TanhMixturePolicy",
    "TanhNormal",
    "TanhNormalMixture",
    "VEnsemble",
    "ValueNet",
    "WarmStarted",
    "field_net",
    "mlp",
    "require",
]
