"""Cells on this machine: one process each, pinned to the cores (and the GPU) of its slot."""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlctl.bench.executors import Exit
from rlctl.bench.process import GRACE, CellProcess, Job
from rlctl.errors import UsageError


@dataclass(frozen=True)
class Slot:
    """A share of the machine."""

    cores: tuple[int, ...]
    gpu: str | None = None

    def variables(self) -> dict[str, str]:
        """What a process sees of the GPUs."""
        return {} if self.gpu is None else {"CUDA_VISIBLE_DEVICES": self.gpu}


def share_out(cores: list[int], slots: int | None, threads: int, gpus: list[str]) -> list[Slot]:
    """Slots of `threads` cores each; by default as many as fit, and no more than one per GPU if there are GPUs.

    More slots than fit are allowed when asked for: none of them is pinned then, and the cells share.
    """
    fit = max(len(cores) // threads, 1)
    n = slots if slots is not None else min(fit, len(gpus)) if gpus else fit
    pinned = n <= fit and threads <= len(cores)
    return [
        Slot(tuple(cores[k * threads : (k + 1) * threads]) if pinned else (), gpus[k % len(gpus)] if gpus else None)
        for k in range(n)
    ]


class LocalExecutor:
    """`slots` processes side by side; `gpus` are indices, dealt to the slots in turn."""

    def __init__(
        self,
        slots: int | None = None,
        threads: int = 1,
        gpus: list[str] | None = None,
        folder: object = None,
        **options: object,
    ) -> None:
        if options:
            raise UsageError(f"the executor local has no options, got {', '.join(options)}")
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self._free = share_out(cores, slots, threads, gpus or [])
        self.slots = len(self._free)
        self._pinned = bool(self._free[0].cores)
        self._threads, self._gpus = threads, gpus or []
        self._running: dict[str, tuple[CellProcess, Slot]] = {}

    def start(self, job: Job) -> None:
        """Take a slot and start the process."""
        slot = self._free.pop(0)
        self._running[job.id] = CellProcess(job, slot.variables(), slot.cores), slot

    def poll(self) -> list[Exit]:
        """Processes that have ended; their slots are free again."""
        ended = []
        for id, (cell, slot) in list(self._running.items()):
            if (code := cell.poll()) is not None:
                cell.close()
                del self._running[id]
                self._free.append(slot)
                ended.append(Exit(id, code))
        return ended

    def stop(self) -> None:
        """SIGTERM to all."""
        for cell, _ in self._running.values():
            cell.ask_to_end()

    def close(self) -> None:
        """Ask those that still run to end, and kill what has not ended in time."""
        self.stop()
        for cell, _ in self._running.values():
            cell.wait(GRACE)
            cell.close()
        self._running.clear()

    def describe(self) -> str:
        """Slots and what they hold."""
        pinned = "pinned" if self._pinned else "not pinned (more threads than cores)"
        gpus = f", GPUs {', '.join(self._gpus)}" if self._gpus else ""
        return f"this machine, {self.slots} at a time, {self._threads} thread(s) each, {pinned}{gpus}"
