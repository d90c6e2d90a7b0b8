"""Finding reads of tensors on the host: while an update runs, and in its source."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Iterator
from typing import Any

from torch.utils._python_dispatch import TorchDispatchMode

from rlctl.host_reads import host_read
from rlctl.types import Agent


class NoHostReads(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Raises AssertionError where an operation needs the value of a tensor on the host."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Refuse, or pass on."""
        if why := host_read(func, args, kwargs):
            raise AssertionError(f"update cannot be captured: {why}: {func}")
        return func(*args, **(kwargs or {}))


HOST_METHODS = {"item", "tolist", "numpy", "cpu", "__array__"}
ONCE = {"__init__", "prepare"}
"""Run once, outside an update."""


def host_reads(source: str) -> Iterator[str]:
    """Suspicious calls in the methods of a class: `.item()` and its kin, and `float(x)`, `bool(x)`, `int(x)`."""
    for method in ast.walk(ast.parse(textwrap.dedent(source))):
        if not isinstance(method, ast.FunctionDef) or method.name in ONCE:
            continue
        for call in ast.walk(method):
            if not isinstance(call, ast.Call):
                continue
            f = call.func
            if isinstance(f, ast.Attribute) and f.attr in HOST_METHODS:
                yield f"{method.name}, line {call.lineno}: .{f.attr}()"
            elif isinstance(f, ast.Name) and f.id in ("float", "bool", "int") and call.args:
                if not isinstance(call.args[0], ast.Constant):
                    yield f"{method.name}, line {call.lineno}: {f.id}(...)"
            elif isinstance(f, ast.Attribute) and isinstance(f.value, ast.Name) and f.value.id in ("np", "numpy"):
                yield f"{method.name}, line {call.lineno}: numpy"


def own_classes(cls: type[Agent]) -> list[type[Any]]:
    """The class and those of its bases that are algorithms."""
    return [c for c in cls.__mro__ if issubclass(c, Agent) and c is not Agent]
