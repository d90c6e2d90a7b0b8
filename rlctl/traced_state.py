"""What a recorded loss (`rlctl.traced`) takes for constant: all that its agent holds in Python, looked at in each call.

The memory of tensors is no part of it, for a recording reads that anew; which tensor stands under a name is.
"""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

MOST = 10_000
"""Values to look at in a call: more of them cost more than a recording gains."""

_CLOSED = (
    *(int, float, complex, str, bytes, type(None), np.generic, torch.dtype, torch.device),
    *(type, ModuleType, FunctionType, MethodType, BuiltinFunctionType, partial),
    *(torch.Generator, torch.optim.Optimizer),  # these move by themselves, and no loss reads them
)
_MACHINERY = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
"""What torch keeps in every module: hooks above all, which are recorded with the rest."""


@dataclass
class _Place:
    """A dict or list, and what was in it."""

    path: str
    live: Any
    now: Collection[Any]
    """Its values, seen live."""
    keys: list[Any]
    values: list[Any]


class Holdings:
    """Attributes, dicts, lists, parameters and buffers of `agent` and of what it holds, as they are now.

    Raises ValueError if that is more than `MOST` values. `apart` is left out, with what it holds.
    """

    def __init__(self, agent: nn.Module, apart: Iterable[Any]) -> None:
        self._places: list[_Place] = []
        self._arrays: list[tuple[str, np.ndarray, np.ndarray]] = []
        self.tensors: dict[str, Tensor] = {}
        self._apart = list(apart)
        self._seen = {id(x): x for x in self._apart}  # kept, so that no id is used again
        self._count = 0
        self._walk("", agent)
        self._wants = [x.requires_grad for x in self.tensors.values()]
        self._live, self._empty = (
            [p.now for p in self._places if p.values],
            [p.now for p in self._places if not p.values],
        )
        self._flat = [x for p in self._places for x in p.values]

    def same(self) -> bool:
        """Whether everything is what it was; another number or word of the same value is."""
        return self._identical() or not self.moved()

    def moved(self) -> list[str]:
        """Names of what is not."""
        found = [f"{p.path}{key}" for p in self._places for key in _moved(p)]
        found += [path for path, array, before in self._arrays if not np.array_equal(array, before)]
        wants = [x.requires_grad for x in self.tensors.values()]
        found += [name for name, a, b in zip(self.tensors, self._wants, wants, strict=True) if a != b]
        if not found:
            self._flat = [x for p in self._places for x in p.now]
        return found

    def restore(self) -> None:
        """Put everything back, but for the memory of tensors."""
        for p in self._places:
            if _moved(p):
                p.live.clear()
                p.live.update(zip(p.keys, p.values, strict=True)) if isinstance(p.live, dict) else p.live.extend(
                    p.values
                )
        for _, array, before in self._arrays:
            array[...] = before

    def _identical(self) -> bool:
        """The short answer: the same objects throughout."""
        return (
            not any(map(len, self._empty))
            and sum(map(len, self._live)) == len(self._flat)
            and all(map(operator.is_, chain.from_iterable(self._live), self._flat))
            and not self._arrays
            and [x.requires_grad for x in self.tensors.values()] == self._wants
        )

    def _walk(self, path: str, x: Any) -> None:
        if id(x) in self._seen or isinstance(x, _CLOSED):
            return
        self._seen[id(x)] = x
        within = f"{path}." if path else ""
        if isinstance(x, Tensor):
            self.tensors[path] = x
        elif isinstance(x, np.ndarray):
            self._arrays.append((path, x, x.copy()))
        elif isinstance(x, dict):
            self._hold(within, x, x.values(), list(x))
            for key, value in list(x.items()):
                self._walk(f"{within}{key}", value)
        elif isinstance(x, list | deque | tuple | set | frozenset):
            if isinstance(x, list | deque):
                self._hold(within, x, x, list(range(len(x))))
            for k, value in enumerate(x):
                self._walk(f"{within}{k}", value)
        elif isinstance(x, nn.Module):
            self._hold(within, vars(x), vars(x).values(), list(vars(x)))
            for name, value in list(vars(x).items()):
                if name in ("_parameters", "_buffers", "_modules"):
                    self._walk(path, value)
                elif name not in _MACHINERY:
                    self._walk(f"{within}{name}", value)
        elif hasattr(x, "__dict__"):
            self._walk(path, vars(x))

    def _hold(self, path: str, live: Any, now: Collection[Any], keys: list[Any]) -> None:
        self._places.append(_Place(path, live, now, keys, list(now)))
        self._count += len(now)
        if self._count > MOST:
            raise ValueError(f"the agent holds more than {MOST:,} values in dicts and lists")


def _moved(p: _Place) -> list[Any]:
    """The keys under which there is something else now, or nothing, or something new."""
    if len(p.now) == len(p.values) and all(map(operator.is_, p.now, p.values)):
        return []
    now = p.live if isinstance(p.live, dict) else dict(enumerate(p.live))
    before = dict(zip(p.keys, p.values, strict=True))
    return [k for k in {**before, **now} if k not in now or k not in before or not _equal(before[k], now[k])]


def _equal(a: Any, b: Any) -> bool:
    return a is b or (type(a) is type(b) and isinstance(a, int | float | str) and a == b)
