"""Made-up run directories, written by the same code as those of the report's benchmark."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SMALL = {"evaluations": 4, "final": 20, "metric_rows": 5}


@pytest.fixture(scope="session")
def script() -> ModuleType:
    """benchmarks/report_scale.py."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location("report_scale", BENCHMARKS / "report_scale.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(BENCHMARKS))
    return module


@pytest.fixture
def write_run(script: ModuleType, tmp_path: Path) -> Callable[..., Path]:
    """`write_run(algo, env, seed, level, **more)`: a small run directory under tmp_path/runs."""
    rng = np.random.default_rng(0)

    def write(algo: str, env: str, seed: int, level: float, *, folder: str = "runs", **more: Any) -> Path:
        name = more.pop("name", f"s{seed}")
        place = tmp_path / folder / algo / env / name
        written: Path = script.write_run(place, algo, env, seed, level, rng=rng, **{**SMALL, **more})
        return written

    return write
