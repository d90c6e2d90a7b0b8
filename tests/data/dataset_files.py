"""Episodes whose every number tells where it comes from."""

from __future__ import annotations

import builtins
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

OBS_DIM, ACT_DIM = 3, 2

Episode = dict[str, Any]
Write = Callable[..., Path]


def episode(number: int, steps: int, end: str = "truncated") -> Episode:
    """An episode whose every number tells where it comes from: obs [t, i] = 1000 * number + t + i / 10."""
    t = np.arange(steps + 1, dtype=np.float32)[:, None]
    return {
        "observations": 1000 * number + t + np.arange(OBS_DIM, dtype=np.float32) / 10,
        "actions": np.tile(np.float32([number / 100, -number / 100]), (steps, 1)),
        "rewards": np.arange(steps) + number / 10,
        "terminations": np.arange(steps) == (steps - 1 if end == "terminated" else -1),
        "truncations": np.arange(steps) == (steps - 1 if end == "truncated" else -1),
    }


def hide(monkeypatch: pytest.MonkeyPatch, package: str) -> None:
    """As if `package` were not installed."""
    real = builtins.__import__

    def fake(name: str, *args: Any, **kw: Any) -> Any:
        if name.split(".")[0] == package:
            raise ImportError(name)
        return real(name, *args, **kw)

    monkeypatch.setattr(builtins, "__import__", fake)
