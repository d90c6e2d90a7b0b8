"""The driver with cells in this process: what is skipped, repeated, resumed, given up; two drivers; torn ledgers."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import threading
from pathlib import Path

import pytest
from bench_helpers import TINY_PPO, InProcess, Lost, drive, history, plan, results

from rlctl import experiment
from rlctl.bench import probe as probe_module
from rlctl.bench import suite
from rlctl.bench.cost import Speeds, estimate
from rlctl.bench.driver import retry_diverged, retry_failed, to_do
from rlctl.bench.ledger import Ledger, events, states
from rlctl.bench.probe import probe
from rlctl.bench.process import Job
from rlctl.bench.view import share_done
from rlctl.errors import Diverged, UsageError


@pytest.fixture(autouse=True)
def no_fsync(monkeypatch: pytest.MonkeyPatch) -> None:
    """These tests read back through the same kernel."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


def failing(times: int, error: Exception, seen: list[str] | None = None):  # type: ignore[no-untyped-def]
    """`before` of an executor: raises `error` the first `times` times."""
    count = 0

    def before(job: Job) -> None:
        nonlocal count
        count += 1
        if count <= times:
            raise error

    return before


def test_a_grid_is_run_once(tmp_path: Path) -> None:
    p, out = plan(tmp_path, seeds=2), tmp_path / "out"
    executor = InProcess()
    summary = drive(p, out, executor)
    assert (summary.done, summary.left, executor.started) == (2, 0, [c.id for c in p.cells])
    record = experiment.read_json(out / p.cells[0].id / "run.json")
    assert (record["status"], record["suite"], record["column"]) == ("done", "tiny", "ppo")

    again = InProcess()
    assert drive(p, out, again).done == 2
    assert again.started == []
    # a seed more is a cell more, and nothing else
    assert drive(plan(tmp_path, seeds=3), out, again).done == 3
    assert [id.split("/")[-1][:2] for id in again.started] == ["s2"]


def test_failures_are_repeated_and_bounded(tmp_path: Path) -> None:
    p, out = plan(tmp_path), tmp_path / "out"
    once = InProcess(failing(1, RuntimeError("the disk is full")))
    assert drive(p, out, once).done == 1
    assert history(out) == ["start", "failed", "start", "done"]
    assert events(out)[1]["error"] == "RuntimeError: the disk is full"
    assert [f.name for f in sorted((out / "logs" / p.cells[0].id).iterdir())] == ["1.log"]  # kept

    out = tmp_path / "never"
    summary = drive(p, out, InProcess(failing(99, RuntimeError("no"))), retries=1)
    assert (summary.failed, history(out)) == (1, ["start", "failed"] * 2)
    idle = InProcess()
    assert drive(p, out, idle, retries=1).failed == 1
    assert idle.started == []
    ledger = Ledger(out)
    ledger.begin(p, {})
    assert retry_failed(ledger, p) == 1
    ledger.close()
    assert drive(p, out, idle, retries=1).done == 1


def test_what_cannot_get_better_is_not_repeated(tmp_path: Path) -> None:
    p = plan(tmp_path)
    summary = drive(p, tmp_path / "a", InProcess(failing(99, Diverged("losses/v became non-finite"))))
    assert (summary.diverged, history(tmp_path / "a")) == (1, ["start", "diverged"])
    again = InProcess()
    assert drive(p, tmp_path / "a", again).diverged == 1
    assert again.started == []
    summary = drive(p, tmp_path / "b", InProcess(failing(99, UsageError("no such thing"))))
    assert (summary.failed, history(tmp_path / "b")) == (1, ["start", "failed"])


def test_a_lost_cell_goes_on_from_its_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    p = plan(tmp_path)
    drive(p, tmp_path / "whole", InProcess())

    real, calls = experiment.Run.tick, 0

    def dying(self: experiment.Run, *args: object, **kwargs: object) -> None:
        nonlocal calls
        calls += 1
        if calls == 3:  # after a checkpoint at 32 steps and one at 64
            raise Lost
        real(self, *args, **kwargs)  # type: ignore[arg-type]

    monkeypatch.setattr(experiment.Run, "tick", dying)
    assert drive(p, tmp_path / "out", InProcess()).done == 1
    assert history(tmp_path / "out") == ["start", "lost", "start", "done"]
    assert calls == 4 + 1  # 4 updates in all, of which one was made twice
    assert results(tmp_path / "out" / p.cells[0].id) == results(tmp_path / "whole" / p.cells[0].id)


def test_a_signal_stops_the_grid_and_the_next_start_goes_on(tmp_path: Path) -> None:
    p, out = plan(tmp_path, seeds=3), tmp_path / "out"

    def interrupt(job: Job) -> None:
        if "/s1-" in job.id:
            os.kill(os.getpid(), signal.SIGTERM)

    executor = InProcess(interrupt)
    before = signal.getsignal(signal.SIGTERM)
    summary = drive(p, out, executor)
    assert signal.getsignal(signal.SIGTERM) is before
    assert summary.interrupted
    assert executor.stopped
    assert len(executor.started) == 2
    assert drive(p, out, InProcess()).done == 3


def test_who_only_asks_keeps_no_driver_out(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_SH)
        asking = threading.Timer(0.1, fcntl.flock, (f, fcntl.LOCK_UN))
        asking.start()
        Ledger(tmp_path).close()
        asking.join()


def test_what_gets_further_has_its_retries_again(tmp_path: Path) -> None:
    p, id = plan(tmp_path), plan(tmp_path).cells[0].id
    ledger = Ledger(tmp_path / "out")
    ledger.begin(p, {})
    for at, bad in ((0, 1), (32, 1), (32, 2), (64, 1), (32, 2), (64, 3)):
        ledger.note("start", id)
        ledger.note("lost", id, at=at)
        s = states(tmp_path / "out", [id], live=False)[id]
        assert (s.bad, to_do(s, retries=2)) == (bad, bad <= 2)
    ledger.close()


def test_a_diverged_cell_begins_anew_after_a_fix(tmp_path: Path) -> None:
    p, out = plan(tmp_path), tmp_path / "out"

    def diverging(job: Job) -> None:
        (Path(job.folder) / "checkpoints").mkdir(parents=True)
        raise Diverged("losses/v became non-finite")

    assert drive(p, out, InProcess(diverging)).diverged == 1
    ledger = Ledger(out)
    ledger.begin(p, {})
    assert retry_diverged(ledger, p) == 1
    ledger.close()
    assert (out / ".diverged" / p.cells[0].id / "1" / "checkpoints").is_dir()
    assert drive(p, out, InProcess()).done == 1
    assert history(out) == ["start", "diverged", "retry", "start", "done"]


def test_one_driver_at_a_time(tmp_path: Path) -> None:
    first = Ledger(tmp_path)
    with pytest.raises(UsageError, match=f"another driver .process {os.getpid()} on "):
        Ledger(tmp_path)
    first.close()
    Ledger(tmp_path).close()


def test_one_suite_per_folder(tmp_path: Path) -> None:
    drive(plan(tmp_path), tmp_path / "out", InProcess())
    with pytest.raises(UsageError, match="holds the suite 'tiny', not 'other'"):
        drive(plan(tmp_path, name="other"), tmp_path / "out", InProcess())


def test_the_copy_of_the_suite_is_the_suite(tmp_path: Path) -> None:
    p, out = plan(tmp_path), tmp_path / "out"
    drive(p, out, InProcess())
    copy = suite.load(str(out / "suite.yaml"))
    assert (copy.name, [c.id for c in copy.cells]) == (p.name, [c.id for c in p.cells])
    again = InProcess()
    assert drive(copy, out, again).done == 1
    assert again.started == []


def test_a_torn_ledger_loses_one_line(tmp_path: Path) -> None:
    p, out = plan(tmp_path, seeds=2), tmp_path / "out"
    drive(p, out, InProcess(failing(1, RuntimeError("once"))))
    whole = (out / "ledger.jsonl").read_text()
    (out / "ledger.jsonl").write_text(whole[:-20])  # the driver was killed while it wrote
    found = states(out, [c.id for c in p.cells], live=False)
    assert {s.status for s in found.values()} == {"done"}  # the run directories know
    ledger = Ledger(out)
    ledger.begin(p, {})
    ledger.note("retry", p.cells[0].id)
    ledger.close()
    assert events(out)[-1]["event"] == "retry"
    assert len(events(out)) == len(whole.splitlines())


def test_what_had_begun_is_interrupted_once_the_driver_is_gone(tmp_path: Path) -> None:
    p = plan(tmp_path)
    ledger = Ledger(tmp_path / "out")
    ledger.begin(p, {})
    ledger.note("start", p.cells[0].id, attempt=1)
    ledger.close()
    for live, status in ((True, "running"), (False, "interrupted")):
        assert states(tmp_path / "out", [p.cells[0].id], live=live)[p.cells[0].id].status == status


def test_progress_of_every_kind_of_run(tmp_path: Path) -> None:
    for rows, offline_updates, share in (
        ([], 0, 0.0),
        ([(25, 5)], 0, 0.25),  # online
        ([(0, 30)], 0, 0.3),  # offline
        ([(0, 30)], 60, 0.3),  # offline, later online
        ([(0, 30), (20, 95)], 60, 0.8),
    ):
        lines = [json.dumps({"env_steps": e, "updates": u}) + "\n" for e, u in rows]
        (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"env_st')  # a line under way
        assert share_done(tmp_path, 100, offline_updates) == share


def test_cost_is_measured_or_unknown(tmp_path: Path) -> None:
    p = plan(tmp_path)
    nothing = estimate(p.cells, Speeds([tmp_path / "out"]))
    assert (nothing.steps, nothing.seconds, nothing.unknown) == (128, 0.0, ["ppo on probe:both"])
    drive(p, tmp_path / "out", InProcess())
    run = experiment.read_json(tmp_path / "out" / p.cells[0].id / "run.json")
    same = estimate(plan(tmp_path, seeds=3).cells, Speeds([tmp_path / "out"]))
    assert same.seconds == pytest.approx(3 * sum(run["spent_s"].values()))
    assert not same.loose
    other = estimate(plan(tmp_path, budgets={"on_policy": 1280}).cells, Speeds([tmp_path / "out"]))
    assert other.seconds == pytest.approx(10 * sum(run["spent_s"].values()))
    assert other.loose
    assert "other settings" in other.lines(2)[1]
    elsewhere = plan(tmp_path, tasks=["probe:constant"])
    found = estimate(elsewhere.cells, Speeds([tmp_path / "out"]))
    assert found.loose and found.seconds == pytest.approx(sum(run["spent_s"].values()))
    assert Speeds([tmp_path / "out"]).of(elsewhere.cells[0], elsewhere=False) is None


def test_what_was_never_measured_is_counted_not_listed_for_pages(tmp_path: Path) -> None:
    tasks = [f"probe:{name}" for name in ("constant", "both", "action", "delayed", "observation")]
    (_, line) = estimate(plan(tmp_path, tasks=tasks).cells, Speeds([])).lines(1)
    assert line.startswith("time unknown, never measured here: ppo on probe:constant, ppo on probe:both, ")
    assert "and 2 more; --dry-run --probe" in line


def test_a_probe_measures_the_beginning_of_a_cell(tmp_path: Path) -> None:
    p = plan(tmp_path, budgets={"on_policy": 10_000_000}, algorithms=[{"algo": "ppo", "set": TINY_PPO}], seeds=2)
    speeds = Speeds([])
    said: list[str] = []
    assert probe(p.cells, speeds, seconds=0.3, say=said.append) == []
    assert said == ["measuring 1 of 1: ppo on probe:both"]  # both seeds are one experiment
    found = estimate(p.cells, speeds)
    assert found.unknown == [] and found.probed and not found.loose
    # between a hundred and a million steps per second, whatever the machine
    assert 20 < found.seconds < 200_000
    assert "evaluations not counted" in found.lines(1)[1]


def test_a_probe_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "_config", lambda cell: {"algo": "nobody"})
    (line,) = probe(plan(tmp_path).cells, Speeds([]), seconds=0.1)
    assert line.startswith("ppo on probe:both could not be measured: ") and "unknown algorithm 'nobody'" in line
