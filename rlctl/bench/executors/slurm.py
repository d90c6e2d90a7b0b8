"""Cells as Slurm jobs, through submitit. Extra `slurm`.

Each cell is a job of its own. Preempted or out of time, it writes a checkpoint and is requeued; the driver may stay on
the login node, or be stopped and started again. Driver and nodes need one file system.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlctl.bench.executors import Exit, check_options
from rlctl.bench.process import GRACE, CellProcess, Job
from rlctl.errors import UsageError

SLOTS = 64
"""Jobs in the queue at a time, if nothing is said."""


class SlurmCell:
    """What submitit sends: run a job; on preemption or timeout make it write its checkpoint, and requeue it."""

    def __init__(self) -> None:
        self._cell: CellProcess | None = None

    def __call__(self, job: Job) -> int:
        """The exit code of the cell."""
        self._cell = CellProcess(job)
        try:
            return self._cell.watch()
        finally:
            self._cell.ask_to_end()
            self._cell.wait(GRACE)
            self._cell.close()

    def checkpoint(self, job: Job) -> Any:
        """Called by submitit when Slurm takes the node away."""
        import submitit

        if self._cell is not None:
            self._cell.ask_to_end()
            self._cell.wait(GRACE)
        return submitit.helpers.DelayedSubmission(SlurmCell(), job)


class SlurmExecutor:
    """`slots` jobs in the queue at a time, each with `threads` cores.

    Options: `cluster` (`slurm`, or `local` to try things out here), `minutes` per job, `mem_gb`, `gpus_per_cell`,
    `partition`, `account`, `qos`.
    """

    def __init__(
        self,
        slots: int | None = None,
        threads: int = 1,
        gpus: list[str] | None = None,
        folder: Path | None = None,
        cluster: str = "slurm",
        minutes: int = 24 * 60,
        mem_gb: float | None = None,
        gpus_per_cell: int = 0,
        partition: str | None = None,
        account: str | None = None,
        qos: str | None = None,
        **unknown: Any,
    ) -> None:
        check_options("slurm", unknown, SlurmExecutor.__init__)
        try:
            import submitit
        except ImportError as e:
            raise UsageError("the executor slurm needs submitit: pip install 'rlctl[slurm]'") from e
        if gpus:
            raise UsageError("Slurm deals the GPUs itself: leave --gpus out, use --option gpus_per_cell=1")
        self.slots = SLOTS if slots is None else slots
        self._cluster = cluster
        try:
            self._executor = submitit.AutoExecutor(folder=(folder or Path()) / "submitit", cluster=cluster)
        except (RuntimeError, ValueError) as e:  # no srun on this machine
            raise UsageError(f"submitit finds no Slurm here ({e}): log in to the cluster's login node") from e
        parameters = {
            "timeout_min": minutes,
            "cpus_per_task": threads,
            "mem_gb": mem_gb,
            "gpus_per_node": gpus_per_cell or None,
            "slurm_partition": partition,
            "slurm_account": account,
            "slurm_qos": qos,
        }
        self._executor.update_parameters(name="rlctl", **{k: v for k, v in parameters.items() if v is not None})
        self._running: dict[str, Any] = {}
        self._stopped = False

    def start(self, job: Job) -> None:
        """Submit the job."""
        self._running[job.id] = self._executor.submit(SlurmCell(), job)

    def poll(self) -> list[Exit]:
        """Jobs that have ended; one that Slurm took and did not bring back has no exit code."""
        ended = [(id, job) for id, job in self._running.items() if job.done()]
        return [self._exit(id, self._running.pop(id)) for id, _ in ended]

    def _exit(self, id: str, job: Any) -> Exit:
        import submitit

        try:
            return Exit(id, int(job.result()))
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as e:
            if self._stopped:
                return Exit(id, 75)
            return Exit(id, None, f"job {job.job_id} is {job.state}: {str(e).strip().splitlines()[0]}")

    def stop(self) -> None:
        """scancel all jobs: Slurm sends SIGTERM first, and the cells write their checkpoints."""
        self._stopped = True
        for job in self._running.values():
            job.cancel(check=False)

    def close(self) -> None:
        """Cancel what still runs."""
        self.stop()
        self._running.clear()

    def describe(self) -> str:
        """Cluster and slots."""
        return f"Slurm through submitit (cluster {self._cluster}), up to {self.slots} jobs at a time"
