"""Python numbers that an update computes from the agent's counters, followed so that a captured update can redo them.

A captured update replays what the device did; the Python around it does not run. But that Python counts updates, takes
every second branch, anneals a learning rate. So while an update is recorded its counters give `HostNumber`s. They
behave like numbers and remember how they came about:

- a comparison, or anything else that needs the value now, leaves a guard: the recording holds while it comes out the
  same;
- a number that meets a tensor, or becomes a learning rate, lives in a tensor that is filled anew before each replay;
- a counter that is written is written again after each replay.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

Env = Mapping[str, int]
"""The agent's counters as an update finds them."""
Expression = Callable[[Env], Any]

BANK = 256
"""Numbers of one recording that may live in tensors."""

MATH = ("cos", "sin", "exp", "log", "log10", "log2", "sqrt", "tanh", "pow", "floor", "ceil")
"""Functions of `math` that are followed while an update is recorded."""


class Recording:
    """What one run of an update did on the host. `device` is where its tensors live."""

    def __init__(self, counters: Mapping[str, int], device: torch.device) -> None:
        self.device = device
        self.entry = dict(counters)
        """Counters before it."""
        self.written: dict[str, Any] = {}
        self.guards: list[tuple[Expression, Any]] = []
        """Expressions and what they came out as."""
        self.live: dict[tuple[int, torch.dtype], tuple[HostNumber, Tensor]] = {}
        """Tensors to fill before a replay, by the number's identity (it is held, so that this stays unique)."""
        # made beforehand: a tensor made while a graph is captured is made again, with its first value, by each replay
        self._bank = {dtype: torch.zeros(BANK, dtype=dtype, device=device) for dtype in (torch.float32, torch.float64)}

    def holds(self, env: Env) -> bool:
        """Whether an update that finds the counters `env` would do the same."""
        return all(expression(env) == outcome for expression, outcome in self.guards)

    def fill(self, env: Env) -> None:
        """Give the live tensors their values for the counters `env`."""
        for number, tensor in self.live.values():
            tensor.fill_(number.expression(env))

    def counters_after(self, env: Env) -> dict[str, int]:
        """The counters after an update that found `env`."""
        return {name: evaluate(value, env) for name, value in self.written.items()}

    def tensor(self, number: HostNumber, dtype: torch.dtype) -> Tensor | float:
        """The 0-dim tensor in which `number` lives; its plain value, with a guard, where there is no room for it."""
        key = (id(number), dtype)
        if key not in self.live:
            slot = len(self.live)
            if dtype not in self._bank or slot >= BANK:
                return float(number.settle())
            bank = self._bank[dtype]
            if bank.device.type != "cuda" or not torch.cuda.is_current_stream_capturing():
                # runs that are followed but not captured compute with it; beside the modes, or it would be recorded
                with _disable_current_modes(), torch.no_grad():
                    bank[slot].fill_(number.value)
            self.live[key] = (number, bank[slot])
        return self.live[key][1]


class Counters(dict[str, int]):
    """The agent's counters while an update is recorded: reading gives numbers that remember where they are from."""

    def __init__(self, recording: Recording) -> None:
        super().__init__(recording.entry)
        self._recording = recording

    def __getitem__(self, name: str) -> Any:
        if name in self._recording.written:
            return self._recording.written[name]
        return HostNumber(super().__getitem__(name), lambda env: env[name], self._recording)

    def get(self, name: str, default: Any = None) -> Any:
        """As `dict.get`."""
        return self[name] if name in self else default  # noqa: SIM401 - `dict.get` does not call __getitem__

    def __setitem__(self, name: str, value: Any) -> None:
        self._recording.written[name] = value
        super().__setitem__(name, plain(value))


class HostNumber:
    """A number with its history; see the module."""

    __slots__ = ("expression", "recording", "value")

    def __init__(self, value: Any, expression: Expression, recording: Recording) -> None:
        self.value, self.expression, self.recording = value, expression, recording

    def settle(self) -> Any:
        """The value now; the recording holds only where it is the same."""
        self.recording.guards.append((self.expression, self.value))
        return self.value

    def like(self, x: Tensor) -> Tensor | float:
        """As a 0-dim tensor that may meet `x` without changing the type of the result."""
        dtype = x.dtype if x.dtype.is_floating_point else torch.get_default_dtype()
        return self.recording.tensor(self, dtype)

    def __float__(self) -> float:
        return float(self.settle())

    def __int__(self) -> int:
        return int(self.settle())

    def __index__(self) -> int:
        return operator.index(self.settle())

    def __bool__(self) -> bool:
        return bool(apply(bool, self).settle())

    def __hash__(self) -> int:
        return hash(self.settle())

    def __repr__(self) -> str:
        return f"HostNumber({self.value})"

    def __format__(self, spec: str) -> str:
        return format(self.settle(), spec)

    def __round__(self, digits: int | None = None) -> Any:
        return apply(round, self, digits)


def apply(function: Callable[..., Any], *args: Any) -> HostNumber:
    """`function(*args)` of numbers, at least one of them a HostNumber."""
    recording = next(a.recording for a in args if isinstance(a, HostNumber))
    value = function(*[plain(a) for a in args])
    return HostNumber(value, lambda env: function(*[evaluate(a, env) for a in args]), recording)


def plain(x: Any) -> Any:
    """The value of a number, without leaving a guard."""
    return x.value if isinstance(x, HostNumber) else x


def evaluate(x: Any, env: Env) -> Any:
    """What `x` is where the counters are `env`."""
    return x.expression(env) if isinstance(x, HostNumber) else x


def scalar(x: Any) -> Any:
    """`x` as the settings of torch's fused optimisers: a HostNumber as a tensor, anything else as it is.

    CPU kernels compute with the setting in double precision, CUDA kernels take it as float32.
    """
    if not isinstance(x, HostNumber):
        return x
    return x.recording.tensor(x, torch.float64 if x.recording.device.type == "cpu" else torch.float32)


def _arithmetic(function: Callable[..., Any]) -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(self: HostNumber, other: Any) -> Any:
        return function(self.like(other), other) if isinstance(other, Tensor) else apply(function, self, other)

    def reflected(self: HostNumber, other: Any) -> Any:
        return function(other, self.like(other)) if isinstance(other, Tensor) else apply(function, other, self)

    return forward, reflected


def _comparison(function: Callable[..., Any]) -> Callable[..., Any]:
    def compare(self: HostNumber, other: Any) -> Any:
        if isinstance(other, Tensor):
            return function(self.like(other), other)
        return apply(function, self, other).settle()

    return compare


for _name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow"):
    _forward, _reflected = _arithmetic(getattr(operator, _name))
    setattr(HostNumber, f"__{_name}__", _forward)
    setattr(HostNumber, f"__r{_name}__", _reflected)
for _name in ("lt", "le", "gt", "ge", "eq", "ne"):
    setattr(HostNumber, f"__{_name}__", _comparison(getattr(operator, _name)))
for _name in ("neg", "pos", "abs", "floor", "ceil", "trunc"):
    _unary = getattr(operator, _name, None) or getattr(math, _name)
    setattr(HostNumber, f"__{_name}__", lambda self, _f=_unary: apply(_f, self))


@contextlib.contextmanager
def followed() -> Iterator[None]:
    """Within, functions of `math` accept HostNumbers and give HostNumbers."""

    def wrap(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any) -> Any:
            return apply(function, *args) if any(isinstance(a, HostNumber) for a in args) else function(*args)

        return call

    with contextlib.ExitStack() as stack:
        for name in MATH:
            stack.enter_context(mock.patch.object(math, name, wrap(getattr(math, name))))
        yield
