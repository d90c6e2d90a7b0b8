"""The scale on which scores of different tasks may be averaged: 0 a random policy, 100 a reference."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from rlctl.data.reference import SUITE_RETURNS, is_suite, reference_name, reference_scores
from rlctl.errors import UsageError
from rlctl.report.runs import Task
from rlctl.report.stats import Floats

SUITE_SOURCE = "the suite's definition, at most 1 in each of 1,000 steps: 0 is its floor, not a random policy's return"


class Scale(NamedTuple):
    """100 * (return - low) / (high - low), and where the two returns are from."""

    low: float
    high: float
    source: str

    def __call__(self, ret: Floats) -> Floats:
        """Raw returns to scores."""
        return 100.0 * (ret - self.low) / (self.high - self.low)


Given = Mapping[str, tuple[float, float]]


def read_given(file: Path | None) -> Given:
    """A user's own ends of the scale: JSON `{"task": [return that scores 0, return that scores 100]}`."""
    if file is None:
        return {}
    try:
        pairs = {str(name): (float(low), float(high)) for name, (low, high) in json.loads(file.read_text()).items()}
    except (OSError, ValueError, TypeError, AttributeError) as e:
        raise UsageError(f"{file} does not hold {{task: [return of score 0, return of score 100]}}: {e}") from e
    if same := [name for name, (low, high) in pairs.items() if low == high]:
        raise UsageError(f"{file}: the two returns of {', '.join(same)} are equal, which gives no scale")
    return pairs


def scale_of(task: Task, given: Given | None = None) -> Scale | None:
    """The task's scale, None where nothing is known to put it on one.

    Datasets take D4RL's constants. Online tasks take the mean of our random policy and a published constant
    (`online_reference.json`, made by benchmarks/random_returns.py), those of the DeepMind Control Suite the range of
    returns that its definition allows; with changed options or physics they have none.
    """
    if given and task.name in given:
        return Scale(*given[task.name], "given with --scale")
    if task.family == "online" and is_suite(task.name):
        return Scale(*SUITE_RETURNS, SUITE_SOURCE) if task.name == task.env else None
    if task.family == "online":
        known = online_reference().get(task.name)
        if known is None or known["reference"] is None:
            return None
        return Scale(known["random"], known["reference"], f"random policy; {known['reference_source']}")
    name = reference_name(task.name) or reference_name(task.env or "")
    if name is None:
        return None
    measured_on = "" if task.family == "D4RL" else ", measured on D4RL's own task: not comparable with D4RL's tables"
    return Scale(*reference_scores()[name], f"D4RL's reference scores of {name}{measured_on}")


@cache
def online_reference() -> dict[str, dict[str, Any]]:
    """By environment id: `random`, its `standard_error`, `reference` (None: none is known), `reference_source`."""
    tasks = json.loads(files("rlctl.report").joinpath("online_reference.json").read_text())["tasks"]
    return dict(tasks)
