"""What the tests of the suite's tasks share: transitions and start distributions frozen from dm_control."""

from __future__ import annotations

import importlib.util
from functools import cache
from pathlib import Path

import numpy as np
import pytest

FROZEN = Path(__file__).parents[1] / "fixtures" / "dm_control"

needs_models = pytest.mark.skipif(
    importlib.util.find_spec("dm_control") is None, reason="needs the extra: pip install 'rlctl[dmc]'"
)


@cache
def frozen(name: str) -> dict[str, np.ndarray]:
    """Arrays of one task's file; their meaning is told in fixtures/dm_control/generate.py."""
    with np.load(FROZEN / f"{name}.npz", allow_pickle=False) as file:
        return dict(file)


def check_starts(name: str, ours: np.ndarray) -> None:
    """Every column of n starts [n, nq + nv + G + O] against frozen quantiles."""
    rows, n = frozen(name), len(ours)
    levels, quantiles = rows["levels"][:, None], rows["start_quantiles"]
    # Shares below and up to each quantile: where a value has a probability of its own (no touch), they differ. What
    # stands still may be off by float32's rounding.
    near = 1e-9 if ours.dtype == np.float64 else 1e-6 * np.maximum(1.0, abs(quantiles[:, None]))
    below = (ours[None] < quantiles[:, None] - near).mean(1)
    up_to = (ours[None] <= quantiles[:, None] + near).mean(1)
    # Some 8000 quantiles are compared; at 5 standard errors one in 200 runs with another seed would fail.
    error = 5 * np.sqrt(levels * (1 - levels) * (1 / n + 1 / int(rows["starts"])))
    assert (below <= levels + error).all(), np.argwhere(below > levels + error)
    assert (up_to >= levels - error).all(), np.argwhere(up_to < levels - error)
