"""Where cells run: `local` (the default), `ray`, `slurm`, or what an installed package adds under `rlctl.executors`.

An executor starts jobs and says which have ended, nothing else: retries, the ledger and the order are the driver's.
Every one of them runs `rlctl.bench.worker` in a process of its own with the job's number of threads, so a cell computes
the same bits on each.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import entry_points
from typing import Any, Protocol

from rlctl.bench.process import Job
from rlctl.errors import UsageError


@dataclass(frozen=True)
class Exit:
    """A job that has ended."""

    id: str
    code: int | None
    """Exit code of its process, negative for a signal; None where the machine under it was lost."""
    detail: str = ""
    """What the executor knows beyond the code."""


class Executor(Protocol):
    """The protocol."""

    slots: int
    """Jobs it runs at a time."""

    def start(self, job: Job) -> None:
        """Begin a job; called with fewer than `slots` running."""

    def poll(self) -> list[Exit]:
        """The jobs that have ended since the last call; returns at once."""

    def adopt(self, ids: Collection[str]) -> list[str]:
        """Take over what an earlier driver of the same folder started and left running, as if started here.

        Called once, before anything is started. Returns those of `ids` that are running now; jobs it finds beside them
        are asked to end. [] where jobs end with their driver.
        """

    def stop(self, id: str | None = None) -> None:
        """Ask a running job (None: all) to write a checkpoint and end; `poll` reports it (exit code 75).

        One that does not end is killed after a while. Asking again changes nothing.
        """

    def close(self) -> None:
        """Give everything back; jobs that still run are killed."""

    def describe(self) -> str:
        """One line for the person."""


def _local(**options: Any) -> Executor:
    from rlctl.bench.executors.local import LocalExecutor

    return LocalExecutor(**options)


def _ray(**options: Any) -> Executor:
    from rlctl.bench.executors.ray import RayExecutor

    return RayExecutor(**options)


def _slurm(**options: Any) -> Executor:
    from rlctl.bench.executors.slurm import SlurmExecutor

    return SlurmExecutor(**options)


EXECUTORS: dict[str, Callable[..., Executor]] = {"local": _local, "ray": _ray, "slurm": _slurm}


def make(name: str, **options: Any) -> Executor:
    """The executor called `name`: slots (None: its own choice), threads, gpus, folder, and `options` of its own."""
    plugins = {e.name: e for e in entry_points(group="rlctl.executors")}
    if name not in EXECUTORS and name not in plugins:
        known = [*EXECUTORS, *plugins]
        close = get_close_matches(name, known, n=1, cutoff=0.4)
        hint = f"did you mean '{close[0]}'? " if close else ""
        raise UsageError(f"unknown executor '{name}': {hint}Known: {', '.join(known)}")
    factory = EXECUTORS[name] if name in EXECUTORS else plugins[name].load()
    return factory(**options)


def check_options(name: str, options: dict[str, Any], allowed: Callable[..., Any]) -> None:
    """Refuse an option that `allowed` does not take."""
    known = [
        p for p in inspect.signature(allowed).parameters if p not in ("self", "slots", "threads", "gpus", "folder")
    ]
    for key in options:
        if key not in known:
            raise UsageError(f"the executor {name} has no option '{key}': it has {', '.join(known) or 'none'}")
