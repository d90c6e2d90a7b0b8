"""Cells as Slurm jobs, through submitit. Extra `slurm`.

Each cell is a job of its own. Preempted or out of time, it writes a checkpoint and is requeued; the driver may stay on
the login node, or be stopped and started again. Driver and nodes need one file system.

Jobs outlive a driver that is killed. Which cell is which job stands in FOLDER/submitit/running.json, and the next
driver takes over those that still run.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection
from pathlib import Path
from typing import Any

from rlctl.bench.executors import Exit, check_options
from rlctl.bench.process import GRACE, CellProcess, Job
from rlctl.checkpoint import write_atomically
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
        self._folder = (folder or Path()).absolute() / "submitit"
        try:
            self._executor = submitit.AutoExecutor(folder=self._folder, cluster=cluster)
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
        self._asked: set[str] = set()

    def start(self, job: Job) -> None:
        """Submit the job."""
        self._running[job.id] = self._executor.submit(SlurmCell(), job)
        self._asked.discard(job.id)
        self._note()

    def poll(self) -> list[Exit]:
        """Jobs that have ended; one that Slurm took and did not bring back has no exit code."""
        ended = [self._exit(id, job) for id, job in self._running.items() if job.done()]
        for e in ended:
            del self._running[e.id]
        if ended:
            self._note()
        return ended

    def adopt(self, ids: Collection[str]) -> list[str]:
        """Jobs of running.json that Slurm still knows as queued or running; those of other cells are cancelled."""
        file = self._folder / "running.json"
        noted: dict[str, str] = json.loads(file.read_text()) if file.exists() else {}
        for id, job_id in noted.items():
            job = self._job(job_id)
            # what Slurm does not know is left to the lock of its run directory, as any stranger is
            if job.state.upper() == "UNKNOWN" or job.done():
                continue
            if id in ids:
                self._running[id] = job
            else:
                job.cancel(check=False)
        self._note()
        return list(self._running)

    def _job(self, job_id: str) -> Any:
        """A job by its number."""
        import submitit
        from submitit.local.local import LocalJob

        if self._cluster == "local":
            return LocalJob(self._folder, job_id, process=_Controller(int(job_id)))
        return submitit.SlurmJob(self._folder, job_id)

    def _note(self) -> None:
        """Which cell is which job, for the next driver."""
        if self._running or self._folder.exists():
            self._folder.mkdir(parents=True, exist_ok=True)
            noted = {id: job.job_id for id, job in self._running.items()}
            write_atomically(self._folder / "running.json", json.dumps(noted, indent=1) + "\n")

    def _exit(self, id: str, job: Any) -> Exit:
        import submitit

        try:
            return Exit(id, int(job.result()))
        except (submitit.core.utils.UncompletedJobError, submitit.core.utils.FailedJobError) as e:
            if id in self._asked:
                return Exit(id, 75)
            return Exit(id, None, f"job {job.job_id} is {job.state}: {str(e).strip().splitlines()[0]}")

    def stop(self, id: str | None = None) -> None:
        """scancel: Slurm sends SIGTERM first, the cell writes its checkpoint, and after KillWait it is killed."""
        for key, job in self._running.items():
            if id in (None, key) and key not in self._asked:
                self._asked.add(key)
                job.cancel(check=False)

    def close(self) -> None:
        """Cancel what still runs."""
        self.stop()
        self._running.clear()
        self._note()

    def describe(self) -> str:
        """Cluster and slots."""
        return f"Slurm through submitit (cluster {self._cluster}), up to {self.slots} jobs at a time"


class _Controller:
    """The process of a job of submitit's local executor that another process started: as much of Popen as is asked."""

    def __init__(self, pid: int) -> None:
        self.pid = pid

    def poll(self) -> int | None:
        """None while it runs; -1 when it is gone (its result, if there is one, is found by its file)."""
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_bytes()
        except OSError:
            return -1
        return None if b"submitit.local._local" in command else -1  # not another process of that number

    def send_signal(self, signum: int) -> None:
        """As Popen does."""
        if self.poll() is None:
            os.kill(self.pid, signum)
