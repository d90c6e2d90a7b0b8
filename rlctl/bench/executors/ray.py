"""Cells as Ray tasks: on a cluster that is there, or on a Ray started here. Extra `ray`.

Ray places a task where its cores (and GPUs) are free; the task starts the cell's process and waits for it. Driver and
nodes need one file system, since the run directories are the result. Ray's own retries are off: the driver counts.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlctl.bench.executors import Exit, check_options
from rlctl.bench.process import Job, run_to_end
from rlctl.errors import UsageError


class RayExecutor:
    """`slots` tasks of `threads` cores each; by default as many as the cluster has cores for.

    Options: `address` of a cluster (`auto`, HOST:PORT; none: a running one that Ray finds, else a new one here),
    `gpus_per_cell` (a fraction shares a GPU).
    """

    def __init__(
        self,
        slots: int | None = None,
        threads: int = 1,
        gpus: list[str] | None = None,
        folder: object = None,
        address: str | None = None,
        gpus_per_cell: float = 0.0,
        **unknown: Any,
    ) -> None:
        check_options("ray", unknown, RayExecutor.__init__)
        try:
            import ray
        except ImportError as e:
            raise UsageError("the executor ray needs Ray: pip install 'rlctl[ray]'") from e
        if gpus:
            raise UsageError("Ray deals the GPUs itself: leave --gpus out, use --option gpus_per_cell=1")
        self._ray = ray
        self._mine = not ray.is_initialized()
        if self._mine:
            ray.init(address=address, include_dashboard=False, log_to_driver=False, configure_logging=False)
        cores = float(ray.cluster_resources().get("CPU", 1))
        self.slots = max(int(cores // threads), 1) if slots is None else slots
        if threads > cores:
            raise UsageError(f"a cell wants {threads} cores and the whole Ray cluster has {cores:g}: lower `threads`")
        # one worker process per task: a cell must not meet what another has left behind
        remote = ray.remote(num_cpus=threads, num_gpus=gpus_per_cell, max_retries=0, max_calls=1)
        self._task = remote(run_to_end)
        self._running: dict[Any, str] = {}
        self._asked: set[Any] = set()

    def start(self, job: Job) -> None:
        """Submit the task."""
        self._running[self._task.remote(job)] = job.id

    def poll(self) -> list[Exit]:
        """Tasks that have ended; a lost worker or node has no exit code."""
        if not self._running:
            return []
        ready, _ = self._ray.wait(list(self._running), num_returns=len(self._running), timeout=0)
        return [self._exit(ref, self._running.pop(ref)) for ref in ready]

    def _exit(self, ref: Any, id: str) -> Exit:
        try:
            return Exit(id, int(self._ray.get(ref)))
        except self._ray.exceptions.TaskCancelledError:
            return Exit(id, 75)
        except self._ray.exceptions.RayError as e:
            return Exit(id, None, f"{type(e).__name__}: {str(e).strip().splitlines()[0]}")

    def adopt(self, ids: Collection[str]) -> list[str]:
        """Nothing: Ray ends the tasks of a driver that is gone, and the cells with them."""
        return []

    def stop(self, id: str | None = None) -> None:
        """Cancel the task: it asks its cell to end, and waits `GRACE` seconds for the checkpoint."""
        for ref, key in self._running.items():
            if id in (None, key) and ref not in self._asked:
                self._asked.add(ref)
                self._ray.cancel(ref, force=False)

    def close(self) -> None:
        """Leave the cluster; one that was started here ends."""
        if self._mine and self._ray.is_initialized():
            self._ray.shutdown()
        self._running.clear()

    def describe(self) -> str:
        """Nodes and slots."""
        return f"Ray {self._ray.__version__} with {len(self._ray.nodes())} node(s), {self.slots} at a time"
