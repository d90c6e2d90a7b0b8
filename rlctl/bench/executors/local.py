"""Cells on this machine: one process each, pinned to the cores (and the GPU) of its slot."""

from __future__ import annotations

import os
from collections.abc import Collection
from dataclasses import dataclass

from rlctl.bench.executors import Exit, check_options
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

    Slots are pinned when they fill the machine. More than fit are allowed when asked for, and share; where fewer are,
    the system chooses: a second grid beside this one would otherwise keep to the same first cores, at half the speed.
    """
    fit = max(len(cores) // threads, 1)
    n = slots if slots is not None else min(fit, len(gpus)) if gpus else fit
    pinned = n == fit and threads <= len(cores)
    return [
        Slot(tuple(cores[k * threads : (k + 1) * threads]) if pinned else (), gpus[k % len(gpus)] if gpus else None)
        for k in range(n)
    ]


def visible_gpus(asked: list[str]) -> list[str]:
    """The GPUs `asked` for, counted among those this process may see (CUDA_VISIBLE_DEVICES), as CUDA names them."""
    visible = [x for x in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if x]
    if "CUDA_VISIBLE_DEVICES" not in os.environ:
        return asked
    for gpu in asked:
        if not gpu.isdigit() or int(gpu) >= len(visible):
            raise UsageError(
                f"--gpus names GPU {gpu}, and this process may use {len(visible)} (CUDA_VISIBLE_DEVICES="
                f"{','.join(visible)}): count from 0 among those, or unset the variable"
            )
    return [visible[int(gpu)] for gpu in asked]


class LocalExecutor:
    """`slots` processes side by side; `gpus` are indices, dealt to the slots in turn.

    Option: `pin` (true), whether each slot keeps to its own cores where the slots fill the machine; false leaves the
    choice to the system, which is better on a machine that does other work too.
    """

    def __init__(
        self,
        slots: int | None = None,
        threads: int = 1,
        gpus: list[str] | None = None,
        folder: object = None,
        pin: bool = True,
        **unknown: object,
    ) -> None:
        check_options("local", unknown, LocalExecutor.__init__)
        cores = (
            sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))
        )
        self._gpus, self._threads = visible_gpus(gpus or []), threads
        self._free = share_out(cores, slots, threads, self._gpus)
        if not pin:
            self._free = [Slot((), s.gpu) for s in self._free]
        self.slots = len(self._free)
        self._pinned = bool(self._free[0].cores)
        filled = self.slots * threads
        self._why_not = (
            "as asked" if not pin else "more threads than cores" if filled > len(cores) else "cores are left over"
        )
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

    def adopt(self, ids: Collection[str]) -> list[str]:
        """Nothing: cells here end with their driver."""
        return []

    def stop(self, id: str | None = None) -> None:
        """SIGTERM, and SIGKILL after `GRACE` seconds."""
        for key, (cell, _) in self._running.items():
            if id in (None, key):
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
        pinned = "pinned" if self._pinned else f"not pinned ({self._why_not})"
        gpus = f", GPUs {', '.join(self._gpus)}" if self._gpus else ""
        return f"this machine, {self.slots} at a time, {self._threads} thread(s) each, {pinned}{gpus}"
