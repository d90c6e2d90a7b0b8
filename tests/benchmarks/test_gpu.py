"""The GPU measurements: how time is shared and kept, what is concluded, and a whole dry run."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

pytest.importorskip("mujoco_warp", reason="the extra 'warp' is not installed")

SCRIPT = "speed/gpu"


def test_the_crossover_is_where_the_gpu_stays_ahead(script: ModuleType) -> None:
    ratios = {
        "Hopper": {256: 0.3, 1024: 1.2, 4096: 6.0, 16384: 9.0},
        "Ant": {256: 1.1, 1024: 0.9, 4096: 2.0, 16384: 2.5},
        "Humanoid": {256: 0.1, 1024: 0.2},
    }
    rows = [
        {"task": task, "num_envs": n, "captured_over_cpu": ratio}
        for task, by_number in ratios.items()
        for n, ratio in reversed(by_number.items())
    ]
    table = script.crossovers(rows, {"gpu": "G", "cores": 2})
    assert {task: entry["num_envs"] for task, entry in table.items()} == {"Ant": 4096, "Hopper": 1024, "Humanoid": None}
    assert table["Ant"]["gpu"] == "G"


def test_a_share_of_the_time_is_a_share_of_what_is_left(script: ModuleType) -> None:
    clock = script.Clock(100.0)
    with clock.share(0.5):
        assert 49 < clock.left() <= 50
        with clock.share(0.1):
            assert 4 < clock.left() <= 5
            with pytest.raises(script.OutOfTime, match="s were left"):
                clock.need(10)
    clock.need(10)


def test_what_fails_is_listed_and_what_was_measured_is_kept(script: ModuleType, tmp_path: Path) -> None:
    report = script.Report(tmp_path / "speed.json", {"unit": "per second"})
    with report.attempt("the first"):
        report.add("updates", algo="sac", eager=100.0)
    with report.attempt("the second"):
        raise RuntimeError("no such kernel")
    assert json.loads((tmp_path / "speed.json").read_text())["updates"] == [{"algo": "sac", "eager": 100.0}]
    assert report.result["skipped"] == [{"what": "the second", "why": "RuntimeError: no such kernel"}]


def test_a_piece_that_crashes_or_hangs_is_told_and_ended(script: ModuleType) -> None:
    def run(code: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, "-c", code])

    assert script.ended(run("pass"), 60) == ""
    assert script.ended(run("raise SystemExit(3)"), 60) == "its process ended with 3"
    hanging = run("import time; time.sleep(600)")
    assert script.ended(hanging, 0.1) == "no end after 0 s"
    assert hanging.poll() is not None


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path: Path) -> None:
    out = tmp_path / "speed.json"
    here = Path(__file__).resolve().parents[2]
    command = [sys.executable, str(here / "benchmarks" / "speed" / "gpu.py"), "--dry-run", "--out", str(out)]
    subprocess.run(command, check=True, capture_output=True)
    result = json.loads(out.read_text())
    assert result["dry_run"]
    assert result["skipped"] == []
    assert [row["algo"] for row in result["updates"]] == ["sac", "td3", "td3bc", "iql", "expo"]
    assert all(row["replays"] > 0 for row in result["updates"])
    assert len(result["simulation"]) == len(result["ppo"]) == 1
