"""The driver: starts cells on an executor, keeps the ledger, retries, stops when asked.

It holds no state that the disk does not: killed at any moment and started again, it goes on. What a cell's exit code
means is decided here: done; diverged (a repeat would diverge at the same step, so there is none); interrupted (goes on
from its checkpoint, and is no fault of its own); failed or lost (goes on from its checkpoint, `retries` times at most).
"""

from __future__ import annotations

import contextlib
import signal
import time
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from rlctl.bench.executors import Executor, Exit
from rlctl.bench.ledger import Ledger, State, is_held, states
from rlctl.bench.process import GRACE, Job
from rlctl.bench.suite import Cell, Plan
from rlctl.bench.view import View
from rlctl.checkpoint import progress
from rlctl.errors import Diverged, Interrupted, UsageError

POLL = 0.2
"""Seconds between two looks at the executor."""
LOOK_AGAIN = 1.0
"""Seconds between two looks at a cell that somebody else still holds."""
PATIENCE = GRACE + 30.0
"""Seconds that a stop may take: executors kill after GRACE what does not end, and need a moment for it."""


@dataclass
class Summary:
    """How a grid ended."""

    done: int = 0
    failed: int = 0
    diverged: int = 0
    left: int = 0
    interrupted: bool = False


class Driver:
    """Runs `plan` in `ledger.folder` until every cell is done, has diverged or has used up its retries."""

    def __init__(self, plan: Plan, ledger: Ledger, executor: Executor, view: View, *, retries: int = 2) -> None:
        self.plan, self.ledger, self.executor, self.view, self.retries = plan, ledger, executor, view, retries
        self.cells = {c.id: c for c in plan.cells}
        self.states = states(ledger.folder, list(self.cells), live=False)
        self._running: set[str] = set()
        self._not_before: dict[str, float] = {}
        self._stop = False

    def run(self) -> Summary:
        """See the grid through. After SIGINT or SIGTERM: checkpoints are written, the summary says interrupted."""
        queue = deque(id for id, s in self.states.items() if to_do(s, self.retries))
        with self._signals(), self.view:
            if taken := self.executor.adopt(list(queue)):
                self.view.say(f"{len(taken)} cells still run as jobs of an earlier driver: taken over")
                self._running |= set(taken)
                queue = deque(id for id in queue if id not in self._running)
                self.states |= states(self.ledger.folder, taken, live=True)
            self.view.show(self.states)
            while queue or self._running:
                if self._stop:
                    self._wind_up()
                    break
                self._fill(queue)
                for ended in self.executor.poll():
                    if self._ended(ended):
                        queue.append(ended.id)
                self.view.show(self.states)
                time.sleep(POLL)
            self.view.show(self.states, last=True)
        statuses = [s.status for s in self.states.values()]
        done, failed, diverged = (statuses.count(x) for x in ("done", "failed", "diverged"))
        return Summary(done, failed, diverged, len(statuses) - done - failed - diverged, self._stop)

    def _fill(self, queue: deque[str]) -> None:
        """Start what fits; a cell that a worker of an earlier driver still holds waits its turn."""
        now = time.monotonic()
        for _ in range(len(queue)):
            if len(self._running) >= self.executor.slots:
                return
            id = queue.popleft()
            if self._not_before.get(id, 0.0) > now:
                queue.append(id)
            elif is_held(self.ledger.folder / id / ".lock"):
                if id not in self._not_before:
                    self.view.say(f"{id} is held by a worker of an earlier driver: waiting for its checkpoint")
                self._not_before[id] = now + LOOK_AGAIN
                queue.append(id)
            else:
                self._start(self.cells[id])

    def _start(self, cell: Cell) -> None:
        folder, n = self.ledger.folder.resolve(), self.states[cell.id].attempts + 1
        log = self.ledger.log_of(cell.id, n)
        job = Job(
            id=cell.id,
            folder=str(folder / cell.id),
            config=cell.settings.plain(),
            log=str(folder / log.relative_to(self.ledger.folder)),
            threads=self.plan.threads,
            stall=self.plan.stall,
            note={"suite": self.plan.name, "column": cell.column},
        )
        self.ledger.note("start", cell.id, attempt=n, log=str(log.relative_to(self.ledger.folder)))
        self.executor.start(job)
        self._running.add(cell.id)
        self._refresh(cell.id)
        self.view.started(cell, self.states[cell.id])

    def _ended(self, e: Exit) -> bool:
        """Note how a cell ended; whether it is to be started again."""
        self._running.discard(e.id)
        before = self.states[e.id]
        log = self.ledger.log_of(e.id, before.attempts)
        seconds = round(time.time() - before.since, 1)
        fields = {"attempt": before.attempts, "seconds": seconds, "log": str(log.relative_to(self.ledger.folder))}
        at = progress(self.ledger.folder / e.id / "checkpoints")
        asked = self._stop and (e.code is None or e.code < 0)  # it was on its way to the first step, and just died
        if e.code == 0:
            self.ledger.note("done", e.id, **fields)
        elif e.code == Interrupted.exit_code or asked:
            self.ledger.note("interrupted", e.id, **fields)
        elif e.code == Diverged.exit_code:
            self.ledger.note("diverged", e.id, error=last_line(log), **fields)
        elif e.code is None or e.code < 0:
            why = e.detail or f"its process was ended by signal {-e.code if e.code else '?'}"
            self.ledger.note("lost", e.id, error=why, at=at, **fields)
        else:
            self.ledger.note("failed", e.id, error=e.detail or last_line(log), at=at, **fields)
        self._refresh(e.id)
        s = self.states[e.id]
        # settings that are refused will be refused again
        again = s.status == "interrupted" or (s.status == "failed" and s.bad <= self.retries)
        again &= e.code != UsageError.exit_code
        self.view.ended(self.cells[e.id], s, seconds, again and not self._stop)
        return again

    def _refresh(self, id: str) -> None:
        self.states |= states(self.ledger.folder, [id], live=True)

    def _wind_up(self) -> None:
        """Ask everything that runs to end, and wait for it; closing the executor kills what then still runs."""
        self.view.say(f"stopping: {len(self._running)} running cells write their checkpoints")
        self.executor.stop()
        end = time.monotonic() + PATIENCE
        while self._running:
            if time.monotonic() > end:
                self.view.say(f"{len(self._running)} cells do not end and are left to the executor to kill")
                return
            for ended in self.executor.poll():
                self._ended(ended)
            self.view.show(self.states)
            time.sleep(POLL)

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """SIGINT and SIGTERM ask to stop; the same signal again is not caught."""

        def ask(signum: int, _: FrameType | None) -> None:
            self._stop = True
            signal.signal(signum, signal.SIG_DFL if signum != signal.SIGINT else signal.default_int_handler)

        before = {s: signal.signal(s, ask) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)


def to_do(s: State, retries: int) -> bool:
    """Whether a driver with so many `retries` starts a cell in this state."""
    return s.status not in ("done", "diverged") and s.bad <= retries


def retry_failed(ledger: Ledger, plan: Plan) -> int:
    """Forget the failures of the plan's cells, so that they are tried again; how many there were."""
    found = states(ledger.folder, [c.id for c in plan.cells], live=False)
    again = [id for id, s in found.items() if s.status == "failed"]
    for id in again:
        ledger.note("retry", id)
    return len(again)


def retry_diverged(ledger: Ledger, plan: Plan) -> int:
    """Let the plan's diverged cells begin anew, after a fix; how many there were.

    What they made is moved to .diverged/CELL/ATTEMPT, which no report reads: their checkpoints are of before the fix.
    """
    found = states(ledger.folder, [c.id for c in plan.cells], live=False)
    again = [id for id, s in found.items() if s.status == "diverged"]
    for id in again:
        run = ledger.folder / id
        if run.exists():
            aside = ledger.folder / ".diverged" / id / str(found[id].attempts)
            aside.parent.mkdir(parents=True, exist_ok=True)
            run.rename(aside)
        ledger.note("retry", id)
    return len(again)


def last_line(log: Path) -> str:
    """What a failed attempt said last; of one that hung, that it did."""
    try:
        lines = [x.strip() for x in log.read_text(errors="replace").splitlines() if x.strip()]
    except OSError:
        return "its log cannot be read"
    if any(x.startswith("Timeout (") and x.endswith(")!") for x in lines):  # faulthandler's head of the stacks
        return "it hung: no new metrics, evaluation or checkpoint for too long (its stacks are in the log)"
    return lines[-1].removeprefix("rlctl: ")[:400] if lines else "it said nothing"
