"""The few array operations a task needs, once for numpy and once for torch.

A task is written against `ArrayOps` only, so that the same observation, reward and health code serves a CPU engine
(numpy views of the simulator's memory) and a GPU engine (torch views).
"""

from __future__ import annotations

from collections.abc import Callable
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

    @property
    def sin(self) -> Callable[[Array], Array]:
        """Sine, radians."""

    @property
    def cos(self) -> Callable[[Array], Array]:
        """Cosine, radians."""

    @property
    def sqrt(self) -> Callable[[Array], Array]:
        """Square root."""

    @property
    def exp(self) -> Callable[[Array], Array]:
        """Exponential."""

    @property
    def log1p(self) -> Callable[[Array], Array]:
        """Natural logarithm of 1 + x."""

    def arange(self, n: int) -> Array:
        """0, 1, ..., n - 1."""

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory: views of the simulator move with it."""


class NumpyOps:
    """`ArrayOps` on numpy; bare ufuncs, because at one environment numpy's wrappers cost as much as the work."""

    sin: Callable[[Array], Array] = staticmethod(np.sin)
    cos: Callable[[Array], Array] = staticmethod(np.cos)
    sqrt: Callable[[Array], Array] = staticmethod(np.sqrt)
    exp: Callable[[Array], Array] = staticmethod(np.exp)
    log1p: Callable[[Array], Array] = staticmethod(np.log1p)

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

    def arange(self, n: int) -> Array:
        """0, 1, ..., n - 1."""
        return np.arange(n)

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory."""
        return x.copy()


class TorchOps:
    """`ArrayOps` on torch."""

    sin: Callable[[Array], Array] = staticmethod(torch.sin)
    cos: Callable[[Array], Array] = staticmethod(torch.cos)
    sqrt: Callable[[Array], Array] = staticmethod(torch.sqrt)
    exp: Callable[[Array], Array] = staticmethod(torch.exp)
    log1p: Callable[[Array], Array] = staticmethod(torch.log1p)

    def clip(self, x: Array, low: float, high: float) -> Array:
        """Bound every element to [low, high]."""
        return x.clamp(low, high)

    def sum(self, x: Array) -> Array:
        """Sum over the last axis."""
        return x.sum(-1)

    def all(self, x: Array) -> Array:
        """Logical and over the last axis."""
        return x.all(-1)

    def arange(self, n: int) -> Array:
        """0, 1, ..., n - 1."""
        return torch.arange(n)

    def copy(self, x: Array) -> Array:
        """Return a copy that owns its memory."""
        return x.clone()


def length(xp: ArrayOps, x: Array) -> Array:
    """Euclidean length over the last axis."""
    return xp.sqrt(xp.sum(x * x))


NUMPY: ArrayOps = NumpyOps()
TORCH: ArrayOps = TorchOps()
