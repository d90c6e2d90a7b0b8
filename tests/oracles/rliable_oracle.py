"""What rliable computes from fixed arrays, for `tests/report/test_stats_rliable.py`. Run by `make oracle-rliable`.

    python tests/oracles/rliable_oracle.py tests/fixtures/rliable/oracle.json

It runs in an environment of its own (rliable-requirements.txt), which has nothing of rlctl. rliable draws from numpy's
global generator whatever `random_state` it is given, so that one is seeded before each bootstrap.
"""

from __future__ import annotations

import json
import platform
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from rliable import library, metrics

SEED = 20210913
REPLICATES, PAIR_REPLICATES, PROFILE_REPLICATES = 5_000, 2_000, 2_000
LEVEL = 0.95
THRESHOLDS = [-0.5, 0.0, 0.25, 0.5, 0.75, 1.0, 1.5, 2.5]
POINTS = {
    "mean": metrics.aggregate_mean,
    "median": metrics.aggregate_median,
    "iqm": metrics.aggregate_iqm,
    "optimality_gap": metrics.aggregate_optimality_gap,
}


def arrays() -> dict[str, np.ndarray]:
    """Scores [runs, tasks]: ordinary, skewed with few seeds, with ties and equal tasks, of two sizes to be paired."""
    rng = np.random.default_rng(7)
    tied = np.array([[0.0, 1.0, 0.5], [0.0, 1.0, 0.5], [1.0, 1.0, 0.25], [0.5, 1.0, 0.75], [0.5, 1.0, 0.5]])
    return {
        "ordinary": rng.normal(np.linspace(0.2, 1.2, 6), 0.3, size=(10, 6)),
        "skewed": rng.lognormal(-0.5, 0.8, size=(5, 4)),
        "tied": tied,
        "rival": rng.normal(np.linspace(0.3, 1.1, 6), 0.4, size=(7, 6)),
    }


def interval(scores: Any, func: Any, reps: int, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    """Point estimate and percentile interval [2, ...]."""
    np.random.seed(SEED)  # noqa: NPY002 - the generator rliable draws from
    points, bounds = library.get_interval_estimates(
        {"x": scores}, func, reps=reps, confidence_interval_size=LEVEL, **options
    )
    return points["x"], bounds["x"]


def main(out: Path) -> None:
    given = arrays()
    singles: dict[str, Any] = {}
    for name, scores in given.items():
        found: dict[str, Any] = {}
        for tasks, key in ((False, "interval"), (True, "interval_of_tasks_too")):
            point, bounds = interval(
                scores, lambda x: np.array([f(x) for f in POINTS.values()]), REPLICATES, task_bootstrap=tasks
            )
            for k, statistic in enumerate(POINTS):
                found.setdefault(statistic, {"value": float(point[k])})[key] = bounds[:, k].tolist()
        np.random.seed(SEED)  # noqa: NPY002 - the generator rliable draws from
        profile, band = library.create_performance_profile(
            {"x": scores}, THRESHOLDS, reps=PROFILE_REPLICATES, confidence_interval_size=LEVEL
        )
        found["profile"] = {"value": profile["x"].tolist(), "band": band["x"].tolist()}
        singles[name] = found
    pairs = {}
    for x, y in (("ordinary", "rival"), ("rival", "ordinary"), ("tied", "tied")):
        point, bounds = interval(
            [given[x], given[y]], lambda a, b: np.array([metrics.probability_of_improvement(a, b)]), PAIR_REPLICATES
        )
        pairs[f"{x} over {y}"] = {"x": x, "y": y, "value": float(point[0]), "interval": bounds[:, 0].tolist()}
    packages = {p: version(p) for p in ("rliable", "arch", "numpy", "scipy", "pandas")}
    record = {
        "about": "made by tests/oracles/rliable_oracle.py, do not edit",
        "versions": {"python": platform.python_version(), **packages},
        "seed": SEED,
        "level": LEVEL,
        "replicates": {"aggregates": REPLICATES, "profile": PROFILE_REPLICATES, "improvement": PAIR_REPLICATES},
        "thresholds": THRESHOLDS,
        "scores": {name: s.tolist() for name, s in given.items()},
        "aggregates": singles,
        "improvement": pairs,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=1) + "\n")
    print(f"written to {out}: rliable {packages['rliable']}, arch {packages['arch']}, numpy {packages['numpy']}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
