"""The few array operations a task needs, once for numpy and once for torch.

A task is written against `ArrayOps` only, so that the same observation, reward and health code serves a CPU engine
(numpy views of the simulator's memory) and a GPU engine (torch views).
"""

from __future__ import annotations

from typing import Any, Protocol, TypeAlias

import numpy as np
import torch

Array: TypeAlias = Any
"""A `numpy.ndarray` or a `torch.Tensor`: indexing, arithmetic and comparison are all that is asked of it."""


class ArrayOps(Protocol):
    """What numpy and torch spell differently. Reductions are over the last axis."""

    def clip(self, x: Array, low: float, high: float) -> Array:
        """Bound every element to [low, high]; NaN stays NaN."""

    def sum(self, x: Array) -> Array:
        """Sum over the last axis."""

    def all(self, x: Array) -> Array:
        """Logical and over the last axis."""

    def sin(self, x: Array) -> Array:
        """Sine, radians."""

    def cos(self, x: Array) -> Array:
        """Cosine, radians."""

    def sqrt(self, x: Array) -> Array:
        """Square root."""

    def arange(self, n: int) -> Array:
        """0, 1, ..., n - 1."""

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory: views of the simulator move with it."""


class NumpyOps:
    """`ArrayOps` on numpy; bare ufuncs, because at one environment numpy's wrappers cost as much as the work."""

    sin = staticmethod(np.sin)
    cos = staticmethod(np.cos)
    sqrt = staticmethod(np.sqrt)
    arange = staticmethod(np.arange)

    def clip(self, x: Array, low: float, high: float) -> Array:
        """Bound every element to [low, high]."""
        y = np.maximum(x, low)
        return np.minimum(y, high, out=y)

    def sum(self, x: Array) -> Array:
        """Sum over the last axis, in the order `numpy.sum` uses."""
        return np.add.reduce(x, axis=-1)

    def all(self, x: Array) -> Array:
        """Logical and over the last axis."""
        return np.logical_and.reduce(x, axis=-1)

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory."""
        return x.copy()


class TorchOps:
    """`ArrayOps` on torch."""

    sin = staticmethod(torch.sin)
    cos = staticmethod(torch.cos)
    sqrt = staticmethod(torch.sqrt)
    arange = staticmethod(torch.arange)

    def clip(self, x: Array, low: float, high: float) -> Array:
        """Bound every element to [low, high]."""
        return x.clamp(low, high)

    def sum(self, x: Array) -> Array:
        """Sum over the last axis."""
        return x.sum(-1)

    def all(self, x: Array) -> Array:
        """Logical and over the last axis."""
        return x.all(-1)

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory."""
        return x.clone()


NUMPY: ArrayOps = NumpyOps()
TORCH: ArrayOps = TorchOps()
