"""Pure functions: the maths of the losses. Each one states its source and shapes and has a test with hand numbers."""

from rlctl.ops.batches import column_moments, mean_of, minibatches
from rlctl.ops.optim import adam, apply_gradients, frozen_copy, gradients, minimize, polyak
from rlctl.ops.returns import gae

__all__ = [
    "adam",
    "apply_gradients",
    "column_moments",
    "frozen_copy",
    "gae",
    "gradients",
    "mean_of",
    "minibatches",
    "minimize",
    "polyak",
]
