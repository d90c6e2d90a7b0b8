"""Where the runs of a study happen. `Runner` is all that a study knows of it.

`ExecutorRunner` hands them to an executor of `rlctl bench`: processes on this machine, Ray, Slurm, a package's own.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from rlctl.bench import executors
from rlctl.bench.executors import Executor
from rlctl.bench.process import Job

LOST = -1
"""What a handle gives for a run whose machine was lost, and with it the exit code."""


@dataclass(frozen=True)
class Cell:
    """One run."""

    folder: Path
    """Its run directory. A run that was interrupted there is resumed."""
    config: dict[str, Any]
    """Its settings, as a layer of `rlctl.experiment.resolve`."""
    log: Path
    """Where its output goes."""


class Handle(Protocol):
    """A run under way."""

    def poll(self) -> int | None:
        """Its exit code, negative where it was killed or its machine lost, None while it runs; returns at once."""

    def stop(self) -> None:
        """Ask it to write a checkpoint and end; `poll` then gives 75. Asking again changes nothing."""


class Runner(Protocol):
    """Starts runs."""

    slots: int
    """Runs it carries out at a time."""

    def submit(self, cell: Cell) -> Handle:
        """Begin a run, or go on with it; called with fewer than `slots` under way."""

    def close(self) -> None:
        """Ask what still runs to end, and kill what does not."""


class ExecutorRunner:
    """Runs on an executor of `rlctl bench`, each in a process of its own with `threads` threads."""

    def __init__(self, executor: Executor, threads: int = 1) -> None:
        self.executor, self.threads, self.slots = executor, threads, executor.slots
        self._ended: dict[str, int] = {}
        executor.adopt([])  # what a killed study left running is asked to end; its runs are then resumed

    def submit(self, cell: Cell) -> Handle:
        """Start the job."""
        folder = cell.folder.resolve()
        self._ended.pop(str(folder), None)
        self.executor.start(Job(str(folder), str(folder), cell.config, str(cell.log.resolve()), self.threads))
        return _Job(self, str(folder))

    def ended(self, id: str) -> int | None:
        """The exit code of a job, None while it runs."""
        for e in self.executor.poll():
            self._ended[e.id] = LOST if e.code is None else e.code
        return self._ended.get(id)

    def close(self) -> None:
        """As the executor does it: SIGTERM, and SIGKILL to what has not ended in time."""
        self.executor.close()


@dataclass(frozen=True)
class _Job:
    runner: ExecutorRunner
    id: str

    def poll(self) -> int | None:
        return self.runner.ended(self.id)

    def stop(self) -> None:
        self.runner.executor.stop(self.id)


def local(slots: int = 1) -> ExecutorRunner:
    """One process per run on this machine, with one thread each, on whatever core is free."""
    return ExecutorRunner(executors.make("local", slots=slots, threads=1, pin=False))
