"""Pure functions: the maths of the losses. Each one states its source and shapes and has a test with hand numbers."""

from rlctl.ops.optim import adam, frozen_copy, minimize, polyak
from rlctl.ops.returns import gae

__all__ = ["adam", "frozen_copy", "gae", "minimize", "polyak"]
