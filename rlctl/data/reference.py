"""Normalised scores: D4RL's, 0 for a random policy and 100 for D4RL's expert; the Control Suite's, return / 10.

D4RL's constants are facts of the benchmark (Fu et al. 2020, arXiv:2004.07219, and its code), the same for v0, v1 and v2
of one task. They were measured on D4RL's own tasks: on a later version of a task (Hopper-v5), and on a dataset recorded
anew under an old name, the number is on the same scale but is not comparable with published D4RL tables.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

from rlctl.data.d4rl import d4rl_id

_ALIASES = {
    "adroithandpen": "pen",
    "adroithanddoor": "door",
    "adroithandhammer": "hammer",
    "adroithandrelocate": "relocate",
    "frankakitchen": "kitchen",
}
SUITE_PREFIX, SUITE_RETURNS = "dmc:", (0.0, 1000.0)
"""Tasks of the DeepMind Control Suite pay at most 1 in each of 1000 steps, and are compared by that (arXiv:1801.00690):
a score of theirs is return / 10, which says nothing about random policies or experts."""

_OTHER = {"sparse", "dm", "dmc", "eval"}
"""Words that mark another task under a familiar name (dm_control's hopper, Adroit with a sparse reward)."""


@cache
def reference_scores() -> dict[str, tuple[float, float]]:
    """(random, expert) return by D4RL task name, e.g. `hopper`, `antmaze`, `maze2d-large-dense`."""
    text = files("rlctl.data").joinpath("d4rl_reference.json").read_text()
    return {name: (float(low), float(high)) for name, (low, high) in json.loads(text)["ref_by_env"].items()}


def reference_name(name: str) -> str | None:
    """D4RL's task name for an environment id, a dataset id or a file name; None where D4RL has no such task.

    "Hopper-v5", "mujoco/hopper/medium-v0", "hopper_medium-v2" and "hopper" all give "hopper".
    """
    words = re.findall(r"[a-z0-9]+", name.lower())
    scores = reference_scores()
    if "maze2d" in words:
        rest = [w for w in words[words.index("maze2d") + 1 :] if w != "sparse" and not re.fullmatch(r"v\d+", w)]
        found = "-".join(["maze2d", *rest])
        return found if found in scores else None
    if _OTHER & set(words):
        return None
    return next((task for w in words if (task := _ALIASES.get(w, w)) in scores), None)


def is_suite(name: str) -> bool:
    """Whether an environment id is one of the DeepMind Control Suite."""
    return name.lower().startswith(SUITE_PREFIX)


def reference_returns(name: str) -> tuple[float, float] | None:
    """The undiscounted returns that score 0 and 100; None where there are no references.

    `name` is an environment id, a dataset id or a file name, see `reference_name`.
    """
    if is_suite(name):
        return SUITE_RETURNS
    task = reference_name(name)
    return None if task is None else reference_scores()[task]


def normalized_score(name: str, ret: float) -> float | None:
    """100 * (ret - low) / (high - low) for an undiscounted raw return and `reference_returns`; None without them."""
    references = reference_returns(name)
    if references is None:
        return None
    low, high = references
    return 100.0 * (ret - low) / (high - low)


def run_score(env_id: str, ret: float, *, on_data: bool) -> float | None:
    """The score of a run: D4RL's scale belongs to learning from data (`on_data`), the suite's to any run."""
    return normalized_score(env_id, ret) if on_data or is_suite(env_id) else None


def score_text(env_id: str, score: float) -> str:
    """The score with the name of its scale."""
    return f"score {score:.1f} = return / 10" if is_suite(env_id) else f"D4RL-normalised {score:.1f}"


# --------------------------------------------------------------------------------------------------------- benchmarks
Benchmark = Literal["D4RL", "Minari", "own"]
"""Scores of different benchmarks never share a column: D4RL's own files; Minari datasets, those recorded anew under
D4RL's names included; anything else."""


OWN_MARK = "rlctl"
"""Key in the metadata of a Minari dataset that `rlctl data collect` recorded: `env_id`, and the `env_options` that make
the task again."""


def dataset_labels(id: str, format: str, meta: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What every row about a dataset carries: its id, its version (None: the id has none) and its benchmark.

    `format` and `meta` as in `rlctl.data.arrays.Origin`. A D4RL file is known by its name; under Minari's format it is
    Minari's, unless it was collected here. A converted file is what its source was, whatever it is called: its name
    makes it nobody's benchmark.
    """
    meta = meta or {}
    if OWN_MARK in meta:
        format = OWN_MARK
    elif (converted_from := meta.get("converted_from")) is not None:
        source = dataset_labels(converted_from["id"], converted_from["format"])
        if source["benchmark"] != "own":
            return source
        format = "converted"
    benchmark: Benchmark = "own"
    if format.startswith("minari"):
        benchmark = "Minari"
    elif format == "d4rl-hdf5" and (name := d4rl_id(id)) is not None:
        id, benchmark = name, "D4RL"
    version = re.search(r"-v(\d+)$", id)
    return {"dataset": id, "dataset_version": int(version[1]) if version else None, "benchmark": benchmark}


def score_table(rows: Sequence[Mapping[str, Any]], keys: Sequence[str] = ()) -> tuple[list[str], list[list[str]]]:
    """Header and cells of a table of normalised scores, with a column for every benchmark.

    A row holds what `dataset_labels` gives, `normalized_score` (None: unknown) and the columns named by `keys`, which
    come first. ValueError for a row without dataset, version or benchmark: such a score means nothing.
    """
    for row in rows:
        missing = [k for k in ("dataset", "dataset_version", "benchmark", "normalized_score") if k not in row]
        if missing:
            raise ValueError(f"a score needs its dataset, version and benchmark; this row lacks {', '.join(missing)}")
    benchmarks = [b for b in get_args(Benchmark) if any(row["benchmark"] == b for row in rows)]
    header = [*keys, "dataset", "version", *(f"score ({b})" for b in benchmarks)]
    cells = []
    for row in rows:
        score = "" if row["normalized_score"] is None else f"{row['normalized_score']:.1f}"
        version = "" if row["dataset_version"] is None else str(row["dataset_version"])
        found = [score if row["benchmark"] == b else "" for b in benchmarks]
        cells.append([*(str(row[k]) for k in keys), str(row["dataset"]), version, *found])
    return header, cells
