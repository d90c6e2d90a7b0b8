"""Grids of real processes: kill -9 of a worker, of the driver; stops; the same bits on every executor."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest
from bench_helpers import InProcess, drive, history, plan, results, write

from rlctl import experiment
from rlctl.bench import executors
from rlctl.bench.executors import Executor
from rlctl.bench.executors.local import share_out
from rlctl.bench.suite import Plan
from rlctl.errors import UsageError

LONG: dict[str, Any] = {
    "budgets": {"on_policy": 12_000},
    "set": {"run.tensorboard": False, "run.checkpoint_every": 1_000},
}
"""Long enough to be killed in the middle, and for several checkpoints before that."""
PATIENCE = 240.0
"""Seconds; a busy machine may need many times what a quiet one does."""


def until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def bench(*args: str | Path, **env: str) -> subprocess.Popen[str]:
    """`rlctl bench ARGS` as a process of its own."""
    code = "import sys; from rlctl.cli import main; sys.argv[0] = 'rlctl'; main()"
    return subprocess.Popen(
        [sys.executable, "-c", code, "bench", *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | env,
    )


def end_of(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def workers(of: int) -> list[psutil.Process]:
    """Cells that run below the process `of`."""
    return [p for p in psutil.Process(of).children(recursive=True) if "rlctl.bench.worker" in " ".join(p.cmdline())]


def saved(run: Path) -> bool:
    return (run / "checkpoints" / "latest").exists()


def whole(p: Plan, folder: Path) -> list[Any]:
    """Results of the grid as one process computes it, undisturbed."""
    assert drive(p, folder, InProcess()).done == len(p.cells)
    return [results(folder / c.id) for c in p.cells]


def test_a_process_computes_the_same_bits(tmp_path: Path) -> None:
    p = plan(tmp_path)
    local = executors.make("local", slots=1, threads=1)
    assert drive(p, tmp_path / "local", local).done == 1
    assert [results(tmp_path / "local" / c.id) for c in p.cells] == whole(p, tmp_path / "here")


@pytest.mark.slow
def test_kill_9_of_a_worker(tmp_path: Path) -> None:
    file, out = write(tmp_path, **LONG), tmp_path / "out"
    p = plan(tmp_path, **LONG)
    run = out / p.cells[0].id
    driver = bench(file, "--out", out, "--jobs", "1")
    until(lambda: saved(run))
    (worker,) = workers(driver.pid)
    worker.kill()
    code, stdout, stderr = end_of(driver)
    assert code == 0, stderr
    assert history(out) == ["start", "lost", "start", "done"]
    assert "signal 9; will be tried again" in stderr
    assert "1 of 1 cells done" in stdout
    assert "resumed from step_" in (out / "logs" / p.cells[0].id / "2.log").read_text()
    assert [results(run)] == whole(p, tmp_path / "whole")


@pytest.mark.slow
def test_kill_9_of_the_driver(tmp_path: Path) -> None:
    changes = LONG | {"seeds": 2}
    file, out = write(tmp_path, **changes), tmp_path / "out"
    p = plan(tmp_path, **changes)
    runs = [out / c.id for c in p.cells]
    driver = bench(file, "--out", out, "--jobs", "2")
    until(lambda: all(saved(r) for r in runs))
    orphans = workers(driver.pid)
    assert len(orphans) == 2
    driver.kill()
    end_of(driver)
    again = bench(file, "--out", out, "--jobs", "2")  # at once: the orphans may still be writing
    code, _, stderr = end_of(again)
    assert code == 0, stderr
    assert not any(o.is_running() and o.status() != psutil.STATUS_ZOMBIE for o in orphans)
    assert history(out).count("done") == 2
    assert history(out).count("lost") == 0
    # nothing was lost at all: without its driver a cell writes a checkpoint and ends
    assert all(experiment.read_json(r / "run.json")["status"] == "done" for r in runs)
    assert [results(r) for r in runs] == whole(p, tmp_path / "whole")


@pytest.mark.slow
def test_stop_status_and_going_on(tmp_path: Path) -> None:
    file, out = write(tmp_path, **LONG), tmp_path / "out"
    p = plan(tmp_path, **LONG)
    run = out / p.cells[0].id
    driver = bench(file, "--out", out)
    until(lambda: saved(run))
    (worker,) = workers(driver.pid)
    worker.suspend()  # it must not come to its end while we look
    code, stdout, stderr = end_of(bench(file, "--out", out))
    assert code == 2
    assert f"process {driver.pid} on " in stderr
    code, stdout, _ = end_of(bench("--status", out, "--json"))
    seen = json.loads(stdout)
    assert seen["driver"].startswith(f"process {driver.pid}")
    assert (seen["cells"][0]["status"], 0 < seen["cells"][0]["share_done"] <= 1) == ("running", True)
    driver.send_signal(signal.SIGINT)
    until(lambda: "stopping" in (driver.stderr.readline() if driver.stderr else ""))
    worker.resume()
    code, stdout, stderr = end_of(driver)
    assert code == 75, stderr
    assert history(out) == ["start", "interrupted"]
    assert experiment.read_json(run / "run.json")["status"] == "preempted"
    code, stdout, _ = end_of(bench("--status", out))
    assert "no driver at work" in stdout
    assert "interrupted" in stdout
    code, _, stderr = end_of(bench(file, "--out", out))
    assert code == 0, stderr
    assert [results(run)] == whole(p, tmp_path / "whole")


@pytest.mark.slow
def test_slurm_through_its_local_executor(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    p = plan(tmp_path, seeds=2)
    slurm = executors.make("slurm", slots=2, threads=1, folder=tmp_path / "out", cluster="local", minutes=10)
    assert drive(p, tmp_path / "out", slurm).done == 2
    assert [results(tmp_path / "out" / c.id) for c in p.cells] == whole(p, tmp_path / "whole")


@pytest.mark.slow
def test_slurm_loses_a_job(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    p, out = plan(tmp_path, **LONG), tmp_path / "out"
    slurm = executors.make("slurm", slots=1, threads=1, folder=out, cluster="local", minutes=10)
    assert drive(p, out, Sabotage(slurm, out / p.cells[0].id, "submitit.core._submit")).done == 1
    assert history(out) == ["start", "lost", "start", "done"]
    assert [results(out / c.id) for c in p.cells] == whole(p, tmp_path / "whole")


@pytest.mark.slow
def test_ray_and_the_loss_of_its_worker(tmp_path: Path) -> None:
    ray = pytest.importorskip("ray")
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        p, out = plan(tmp_path, **LONG), tmp_path / "out"
        executor = executors.make("ray", threads=1)
        assert executor.slots == 1
        assert drive(p, out, Sabotage(executor, out / p.cells[0].id, "ray::run_to_end")).done == 1
        assert history(out) == ["start", "lost", "start", "done"]
        assert [results(out / c.id) for c in p.cells] == whole(p, tmp_path / "whole")
        assert ray.is_initialized()  # a Ray that was there before stays
        with pytest.raises(UsageError, match="wants 2 cores and the whole Ray cluster has 1"):
            executors.make("ray", threads=2)
    finally:
        ray.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ray", "slurm"])
def test_stopping_elsewhere(name: str, tmp_path: Path) -> None:
    pytest.importorskip("ray" if name == "ray" else "submitit")
    p, out = plan(tmp_path, **LONG), tmp_path / "out"
    run = out / p.cells[0].id
    options = {"folder": out, "cluster": "local"} if name == "slurm" else {}
    executor = executors.make(name, slots=1, threads=1, **options)
    poll, sent = executor.poll, False

    def and_stop() -> list[executors.Exit]:
        nonlocal sent
        if not sent and saved(run):
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)  # to the driver, which is this process
        return poll()

    executor.poll = and_stop  # type: ignore[method-assign]
    assert drive(p, out, executor).interrupted
    assert history(out) == ["start", "interrupted"]
    until(lambda: experiment.read_json(run / "run.json")["status"] == "preempted")
    assert drive(p, out, InProcess()).done == 1
    assert [results(run)] == whole(p, tmp_path / "whole")


class Sabotage:
    """An executor that, once, kills the process called `name` above the cell, as soon as the cell has a checkpoint."""

    def __init__(self, inner: Executor, run: Path, name: str) -> None:
        self.inner, self.run, self.name, self.slots = inner, run, name, inner.slots
        self.killed = False
        self.start, self.stop, self.close, self.describe = inner.start, inner.stop, inner.close, inner.describe

    def poll(self) -> list[executors.Exit]:
        if not self.killed and saved(self.run):
            found = [p for p in psutil.process_iter() if self.name in " ".join(_cmdline(p)) and _has_cell(p)]
            assert found, f"no process {self.name} above the cell"
            found[0].kill()
            self.killed = True
        return self.inner.poll()


def _cmdline(p: psutil.Process) -> list[str]:
    try:
        return p.cmdline()
    except psutil.Error:
        return []


def _has_cell(p: psutil.Process) -> bool:
    try:
        return bool(workers(p.pid))
    except psutil.Error:
        return False


# ------------------------------------------------------------------------------------------------------------ slots
def test_slots() -> None:
    assert [s.cores for s in share_out([0, 1, 2, 3, 4], None, 2, [])] == [(0, 1), (2, 3)]
    assert [s.cores for s in share_out([0, 1], 4, 1, [])] == [(), (), (), ()]  # more than fit: none is pinned
    assert [s.cores for s in share_out([3], None, 2, [])] == [()]
    gpus = share_out([0, 1, 2, 3], None, 1, ["0", "2"])
    assert [(s.cores, s.variables()["CUDA_VISIBLE_DEVICES"]) for s in gpus] == [((0,), "0"), ((1,), "2")]
    assert [s.gpu for s in share_out([0, 1, 2, 3], 4, 1, ["0", "2"])] == ["0", "2", "0", "2"]


def test_unknown_executors_and_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'local'"):
        executors.make("locla", slots=1)
    with pytest.raises(UsageError, match="has no option 'partitoin'"):
        executors.make("slurm", slots=1, folder=tmp_path, partitoin="x")
    with pytest.raises(UsageError, match="local has no options, got address"):
        executors.make("local", address="auto")
