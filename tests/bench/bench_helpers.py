"""What the tests of grids share: a suite of seconds, an executor in this process, the folder of a grid as facts."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import yaml

from rlctl import experiment
from rlctl.bench import suite
from rlctl.bench.driver import Driver, Summary
from rlctl.bench.executors import Executor, Exit
from rlctl.bench.ledger import Ledger
from rlctl.bench.process import Job
from rlctl.bench.suite import Plan
from rlctl.bench.view import View
from rlctl.errors import RlctlError

TINY_PPO = {"num_envs": 2, "horizon": 16, "minibatch_size": 32, "epochs": 1, "hidden": [8, 8]}
TINY: dict[str, Any] = {
    "seeds": 1,
    "budgets": {"on_policy": 128, "off_policy": 60},
    "evaluation": {"evaluations": 2, "episodes": 2, "final_episodes": 2},
    "set": {"run.tensorboard": False, "run.checkpoint_every": 32},
    "tasks": ["probe:both"],
    "algorithms": [{"algo": "ppo", "set": TINY_PPO}],
}


def write(folder: Path, name: str = "tiny", **changes: Any) -> Path:
    """A suite file: `TINY` with some keys replaced."""
    file = folder / f"{name}.yaml"
    file.write_text(yaml.safe_dump(TINY | changes))
    return file


def plan(folder: Path, name: str = "tiny", **changes: Any) -> Plan:
    """The same, loaded."""
    return suite.load(str(write(folder, name, **changes)))


class InProcess:
    """Runs each job at once, in this process; `before` may raise in its place."""

    slots = 1

    def __init__(self, before: Callable[[Job], None] = lambda job: None) -> None:
        self.before = before
        self.started: list[str] = []
        self._ended: list[Exit] = []
        self.stopped = False

    def start(self, job: Job) -> None:
        self.started.append(job.id)
        code: int | None = 0
        folder = Path(job.folder)
        Path(job.log).parent.mkdir(parents=True, exist_ok=True)
        try:
            self.before(job)
            if (folder / "config.yaml").exists():
                experiment.resume(folder, quiet=True)
            else:
                experiment.train(experiment.resolve(None, [job.config]), folder, quiet=True, note=job.note)
        except RlctlError as e:
            code = e.exit_code
            Path(job.log).write_text(f"rlctl: {e}\n")
        except Lost:
            code = -9
        except RuntimeError as e:
            code = 1
            Path(job.log).write_text(f"Traceback\nRuntimeError: {e}\n")
        self._ended.append(Exit(job.id, code))

    def poll(self) -> list[Exit]:
        ended, self._ended = self._ended, []
        return ended

    def adopt(self, ids: Collection[str]) -> list[str]:
        return []

    def stop(self, id: str | None = None) -> None:
        self.stopped = True

    def close(self) -> None:
        pass

    def describe(self) -> str:
        return "in this process"


class Lost(Exception):
    """The process of a cell was killed."""


def drive(p: Plan, folder: Path, executor: Executor, retries: int = 2) -> Summary:
    """One start of the driver."""
    ledger = Ledger(folder)
    try:
        ledger.begin(p, {})
        return Driver(p, ledger, executor, View(folder, p.cells, executor.slots, quiet=True), retries=retries).run()
    finally:
        executor.close()
        ledger.close()


def history(folder: Path) -> list[str]:
    """The events of the ledger, in order."""
    return [json.loads(line)["event"] for line in (folder / "ledger.jsonl").read_text().splitlines()]


def results(run: Path) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Metrics (less what measures the clock) and evaluations of a run directory."""
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in row.items() if not k.startswith(("time/", "charts/SPS"))} for row in metrics]
    return kept, [json.loads(line) for line in (run / "eval.jsonl").read_text().splitlines()]
