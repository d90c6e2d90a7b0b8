"""Grids of real processes: kill -9 of a worker, of the driver; stops; the same bits on every executor."""

from __future__ import annotations

import fcntl
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
from bench_helpers import TINY_PPO, InProcess, drive, history, plan, results, write

from rlctl import experiment, provenance
from rlctl.bench import executors, process, worker
from rlctl.bench.executors import Executor
from rlctl.bench.executors.local import share_out, visible_gpus
from rlctl.bench.process import Job
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
    (session,) = experiment.read_json(tmp_path / "local" / p.cells[0].id / "run.json")["sessions"]
    assert session["command"] == provenance.command()  # of whoever started the grid, not of the worker


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
def test_jobs_of_a_driver_that_was_killed_are_taken_over(tmp_path: Path) -> None:
    pytest.importorskip("submitit")
    file, out = write(tmp_path, **LONG), tmp_path / "out"
    p = plan(tmp_path, **LONG)
    run = out / p.cells[0].id
    args = [file, "--out", out, "--jobs", "1", "--executor", "slurm", "--option", "cluster=local"]
    driver = bench(*args)
    until(lambda: saved(run))
    (cell,) = [q for q in psutil.process_iter() if "rlctl.bench.worker" in " ".join(_cmdline(q)) and _has_open(q, run)]
    cell.suspend()  # it must not come to its end before the next driver looks
    driver.kill()
    driver.wait(PATIENCE)  # not end_of: the job has inherited its pipes, and lives
    again = bench(*args)
    lines: list[str] = []
    until(lambda: "taken over" in (lines.append(again.stderr.readline() if again.stderr else "") or lines[-1]))
    cell.resume()
    code, _, stderr = end_of(again)
    assert code == 0, stderr
    assert history(out) == ["start", "done"]  # the same job, from start to end
    assert [results(run)] == whole(p, tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["local", "ray", "slurm"])
def test_one_job_is_stopped_and_the_other_is_not(name: str, tmp_path: Path) -> None:
    if name != "local":
        pytest.importorskip("ray" if name == "ray" else "submitit")
    changes = LONG | {"seeds": 2}
    p = plan(tmp_path, **changes)
    options: dict[str, Any] = {"slurm": {"folder": tmp_path, "cluster": "local"}}.get(name, {})
    executor = executors.make(name, slots=2, threads=1, **options)
    jobs = [
        Job(c.id, str(tmp_path / c.id), c.settings.plain(), str(tmp_path / f"{c.seed}.log"), note={}) for c in p.cells
    ]
    codes: dict[str, int | None] = {}
    try:
        for job in jobs:
            executor.start(job)
        until(lambda: saved(Path(jobs[0].folder)))
        for _ in range(2):  # asked twice: the second time changes nothing
            executor.stop(jobs[0].id)
        until(lambda: codes.update({e.id: e.code for e in executor.poll()}) or len(codes) == 2)
    finally:
        executor.close()
    assert codes == {jobs[0].id: 75, jobs[1].id: 0}, [Path(j.log).read_text() for j in jobs]
    until(lambda: experiment.read_json(Path(jobs[0].folder) / "run.json")["status"] == "preempted")


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


# ------------------------------------------------------------------------------------------------- what does not end
HANGS = """
import time
from pathlib import Path
from rlctl.agents.ppo import PPO

class Hangs(PPO):
    def update(self, batch):
        done = super().update(batch)
        if not Path("hung").exists():
            Path("hung").touch()
            time.sleep(3600)
        return done
"""


def hanging(folder: Path, monkeypatch: pytest.MonkeyPatch, **changes: Any) -> Plan:
    (folder / "hanging.py").write_text(HANGS)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    algorithm = {"algo": "hanging:Hangs", "name": "hangs", "set": TINY_PPO}
    return plan(folder, algorithms=[algorithm], **changes)


@pytest.mark.slow
def test_a_cell_that_hangs_is_ended_and_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = hanging(tmp_path, monkeypatch, stall_minutes=0.5)
    out = tmp_path / "out"
    assert drive(p, out, executors.make("local", slots=1, threads=1)).done == 1
    assert history(out) == ["start", "failed", "start", "done"]
    assert "it hung" in (out / "ledger.jsonl").read_text()
    log = (out / "logs" / p.cells[0].id / "1.log").read_text()
    assert "hanging.py" in log and "in update" in log  # the stack


@pytest.mark.slow
def test_a_cell_that_hangs_does_not_keep_a_stop_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p, out = hanging(tmp_path, monkeypatch), tmp_path / "out"
    monkeypatch.setattr(process, "GRACE", 1.0)
    executor = executors.make("local", slots=1, threads=1)
    poll, sent = executor.poll, False

    def and_stop() -> list[executors.Exit]:
        nonlocal sent
        if not sent and (tmp_path / "hung").exists():
            sent = True
            os.kill(os.getpid(), signal.SIGTERM)
        return poll()

    executor.poll = and_stop  # type: ignore[method-assign]
    assert drive(p, out, executor).interrupted
    assert history(out) == ["start", "interrupted"]


def test_a_run_that_stays_held_is_for_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "WAIT_FOR_LOCK", 0.3)
    (tmp_path / "config.yaml").touch()
    with (tmp_path / ".lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        assert worker._run({"folder": str(tmp_path)}) == 75


class Sabotage:
    """An executor that, once, kills the process called `name` above the cell, as soon as the cell has a checkpoint."""

    def __init__(self, inner: Executor, run: Path, name: str) -> None:
        self.inner, self.run, self.name, self.slots = inner, run, name, inner.slots
        self.killed = False
        self.start, self.stop, self.close, self.describe = inner.start, inner.stop, inner.close, inner.describe
        self.adopt = inner.adopt

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


def _has_open(p: psutil.Process, run: Path) -> bool:
    try:
        return any(f.path.startswith(f"{run}/") for f in p.open_files())
    except psutil.Error:
        return False


# ------------------------------------------------------------------------------------------------------------ slots
def test_gpus_are_counted_among_those_one_may_use(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    assert visible_gpus(["0", "3"]) == ["0", "3"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,GPU-abc")
    assert visible_gpus(["1", "0"]) == ["GPU-abc", "5"]
    with pytest.raises(UsageError, match="names GPU 2, and this process may use 2"):
        visible_gpus(["2"])
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(UsageError, match="may use 0"):
        executors.make("local", gpus=["0"])


def test_slots() -> None:
    assert [s.cores for s in share_out([0, 1, 2, 3, 4], None, 2, [])] == [(0, 1), (2, 3)]
    assert [s.cores for s in share_out([0, 1], 4, 1, [])] == [(), (), (), ()]  # more than fit: none is pinned
    assert [s.cores for s in share_out([0, 1, 2], 2, 1, [])] == [(), ()]  # a second grid would take the same two
    assert [s.cores for s in share_out([3], None, 2, [])] == [()]
    gpus = share_out([0, 1, 2, 3], None, 1, ["0", "2"])
    assert [(s.cores, s.variables()["CUDA_VISIBLE_DEVICES"]) for s in gpus] == [((), "0"), ((), "2")]
    assert [s.gpu for s in share_out([0, 1, 2, 3], 4, 1, ["0", "2"])] == ["0", "2", "0", "2"]


def test_unknown_executors_and_options(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="did you mean 'local'"):
        executors.make("locla", slots=1)
    with pytest.raises(UsageError, match="has no option 'partitoin'"):
        executors.make("slurm", slots=1, folder=tmp_path, partitoin="x")
    with pytest.raises(UsageError, match="local has no option 'address': it has pin"):
        executors.make("local", address="auto")
