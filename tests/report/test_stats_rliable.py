"""Our statistics beside rliable's, as `make oracle-rliable` recorded them in an environment of their own.

Point estimates agree to rounding. rliable's bounds are quantiles of R replicates: how many replicates lie below a point
is binomial, so a bound lies between our quantiles at p -+ z sqrt(p (1 - p) (1/R + 1/R')), R' our own replicates,
whatever the distribution. Our intervals are widened for few seeds, which is undone first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlctl.report import stats

ORACLE: dict[str, Any] = json.loads((Path(__file__).parents[1] / "fixtures" / "rliable" / "oracle.json").read_text())
SCORES = {name: np.array(s) for name, s in ORACLE["scores"].items()}
THRESHOLDS = np.array(ORACLE["thresholds"])
STATISTICS: dict[str, stats.Statistic] = {
    "mean": stats.mean,
    "median": stats.median,
    "iqm": stats.iqm,
    "optimality_gap": lambda s: stats.optimality_gap(s, 1.0),
}
OURS = 20_000
Z = 4.5
"""Standard errors; some hundred bounds are compared, each passes by chance but for 7 in a million."""
TAIL = (1 - ORACLE["level"]) / 2


def around(kind: str) -> tuple[float, float]:
    """Levels of the intervals whose lower bounds enclose rliable's lower bound, and upper bounds its upper one."""
    half = Z * math.sqrt(TAIL * (1 - TAIL) * (1 / ORACLE["replicates"][kind] + 1 / OURS))
    assert half < TAIL
    return 1 - 2 * (TAIL - half), 1 - 2 * (TAIL + half)


def plain(found: stats.Interval, seeds: int) -> tuple[float, float]:
    """Bounds without the widening for few seeds."""
    factor = math.sqrt(seeds / (seeds - 1))
    return found.value + (found.low - found.value) / factor, found.value + (found.high - found.value) / factor


@pytest.mark.parametrize("name", list(SCORES))
def test_point_estimates(name: str) -> None:
    for statistic, f in STATISTICS.items():
        assert float(f(SCORES[name])) == pytest.approx(ORACLE["aggregates"][name][statistic]["value"], rel=1e-12)
    profile = stats.performance_profile(SCORES[name], THRESHOLDS)
    np.testing.assert_allclose(profile, ORACLE["aggregates"][name]["profile"]["value"], rtol=1e-12)


@pytest.mark.parametrize("pair", list(ORACLE["improvement"]))
def test_probability_of_improvement(pair: str) -> None:
    """The estimate; our interval is no bootstrap (see `stats.improvement`), and rliable's is not its oracle."""
    theirs = ORACLE["improvement"][pair]
    x, y = SCORES[theirs["x"]], SCORES[theirs["y"]]
    assert float(stats.probability_of_improvement(x, y)) == pytest.approx(theirs["value"], rel=1e-12)


@pytest.mark.parametrize("tasks", [False, True])
@pytest.mark.parametrize("name", list(SCORES))
def test_intervals(name: str, tasks: bool) -> None:
    scores = SCORES[name]
    wide, narrow = (
        stats.bootstraps(
            scores,
            list(STATISTICS.values()),
            np.random.default_rng(1),
            replicates=OURS,
            level=level,
            resample_tasks=tasks,
        )
        for level in around("aggregates")
    )
    for statistic, a, b in zip(STATISTICS, wide, narrow, strict=True):
        theirs = ORACLE["aggregates"][name][statistic]["interval_of_tasks_too" if tasks else "interval"]
        enclosed(theirs, [plain(a, len(scores)), plain(b, len(scores))])


@pytest.mark.parametrize("name", list(SCORES))
def test_bands_of_profiles(name: str) -> None:
    """As drawn: widened and clipped, which is done to rliable's for the comparison."""
    scores, theirs = SCORES[name], ORACLE["aggregates"][name]["profile"]
    factor = math.sqrt(len(scores) / (len(scores) - 1))
    value = np.array(theirs["value"])
    bands = [
        stats.profile_band(scores, THRESHOLDS, np.random.default_rng(1), replicates=OURS, level=level)
        for level in around("profile")
    ]
    low, high = (np.clip(value + factor * (np.array(b) - value), 0, 1) for b in theirs["band"])
    for i in range(len(value)):
        enclosed((low[i], high[i]), [(b[1][i], b[2][i]) for b in bands])


def enclosed(theirs: Any, bounds: list[tuple[float, float]]) -> None:
    """rliable's (low, high) between ours at the wider and at the narrower level."""
    (wide_low, wide_high), (narrow_low, narrow_high) = bounds
    assert wide_low - 1e-9 <= theirs[0] <= narrow_low + 1e-9
    assert narrow_high - 1e-9 <= theirs[1] <= wide_high + 1e-9
