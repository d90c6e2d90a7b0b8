"""Finished and unfinished runs as records, read from their directories."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import yaml

from rlctl import agents
from rlctl.data.reference import dataset_labels
from rlctl.errors import UsageError
from rlctl.report.stats import Floats

Status = Literal["done", "diverged", "failed", "unfinished", "missing", "unreadable"]
COUNTED = ("done", "diverged")
"""A diverged run counts with the score it had reached: leaving it out would flatter its algorithm."""

PLAN = "bench.json"
"""What a suite meant to run; written into its folder by `rlctl bench`."""

LAST_AGENT = "deterministic episodes of the last agent"
LAST_EVALUATION = "deterministic episodes of the last evaluation in training"
_SafeLoader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class Task(NamedTuple):
    """What is compared across algorithms. Tasks of different families never share a table or an aggregate."""

    family: str
    """`online`, or where the data is from: `D4RL`, `Minari` (its re-collected sets included), `own data`."""
    name: str
    """Environment id with what differs from its published form, or the dataset's id with its version."""
    env: str | None = None
    unit: str = "environment steps"
    """Of the x axis: `environment steps`, `updates`, or what an imported log counts."""


@dataclass(frozen=True)
class RunRecord:
    """One run: who, on what, how it went, what it scored."""

    where: str
    """Its path as found."""
    algo: str
    task: Task
    seed: int | None
    status: Status
    _: KW_ONLY
    label: str = ""
    """Name of its column in the suite it belongs to; empty: the algorithm names it."""
    origin: str = "rlctl"
    """`rlctl`, or whose log was imported."""
    protocol: str = LAST_AGENT
    """What `episodes` are; scores of different protocols are not compared in claims."""
    episodes: tuple[float, ...] = ()
    """Raw returns of the episodes behind the score."""
    curve: tuple[Floats, Floats] = field(default_factory=lambda: (np.empty(0), np.empty(0)))
    """Step and mean raw return of each evaluation."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Resolved settings by dotted name, without seed, paths and what only concerns the logs."""
    config: str = ""
    """Hash of the settings that decide the result (all but seed and paths)."""
    steps: int = 0
    """Made so far, in the task's unit."""
    planned: int | None = None
    seconds: Mapping[str, float] = field(default_factory=dict)
    """Wall-clock by what it was spent on: collect, learn, eval; or `total`."""
    selection: tuple[float, int] | None = None
    """Best evaluation in training, and how many episodes it took to pick it."""
    note: str = ""
    """What went wrong, in a line."""
    started: str = ""
    physics: str = "unknown"
    """`published`, `native`, or `unknown` for imported runs."""
    engine: str = ""
    """Who simulated, where there was a choice: cpu or warp."""
    commit: str = "unknown"
    versions: Mapping[str, str | None] = field(default_factory=dict)
    machine: str = "unknown"
    command: tuple[str, ...] = ()
    dataset: str = ""
    """Fingerprint of the rows it learned from; empty: none, or none was written down."""
    suite: str = ""
    """Name and description of the suite it belongs to."""

    @property
    def score(self) -> float | None:
        """Mean raw return; None for a run that does not count or was never evaluated."""
        counts = self.status in COUNTED and len(self.episodes) > 0
        return float(np.mean(self.episodes)) if counts else None


# ------------------------------------------------------------------------------------------------------------- finding
def load(paths: Iterable[str | Path]) -> list[RunRecord]:
    """Every run under `paths`: our run directories and whatever `importers` knows. UsageError if there is none."""
    from rlctl.report import importers

    places = [Path(p) for p in paths]
    found: list[RunRecord] = []
    plans: list[Path] = []
    for path in places:
        if not path.exists():
            raise UsageError(f"{path} does not exist: give run directories, folders of them, or CSV files")
        if path.is_file():
            found += importers.from_file(path)
            continue
        for folder, files in _folders(path):
            if PLAN in files:
                plans.append(folder)
            found += [read_run(folder)] if is_run(folder, files) else importers.from_folder(folder, files, path)
    if not found:
        names = ", ".join(map(str, places))
        raise UsageError(f"no run in {names}: a run directory holds run.json; also read are {importers.KINDS}")
    unique = list({r.where: r for r in found if not r.where.endswith(".csv")}.values())
    for folder in dict.fromkeys(plans):
        unique = _as_planned(folder, unique)
    return [*unique, *(r for r in found if r.where.endswith(".csv"))]


def _as_planned(suite: Path, records: list[RunRecord]) -> list[RunRecord]:
    """The runs of a suite with its command and the names of its columns; cells without one become `missing` records."""
    try:
        plan = json.loads((suite / PLAN).read_text())
        cells = {str(suite / c["id"]): c for c in plan["cells"]}
        name, command = plan["suite"], tuple(plan.get("command") or ())
        about = ": ".join(x for x in (str(name), str(plan.get("description") or "")) if x)
    except (OSError, ValueError, KeyError, TypeError) as e:
        note = _line(f"{PLAN} cannot be read, so cells it planned may be missing unnoticed: {type(e).__name__}: {e}")
        task = Task("unknown", "unknown")
        return [*records, RunRecord(str(suite / PLAN), "unknown", task, None, "unreadable", note=note)]
    named = [
        replace(
            r,
            label=_label(cells[r.where]["column"], r.algo, r.task, cells[r.where]["data"]),
            command=r.command or command,
            suite=about,
        )
        if r.where in cells
        else r
        for r in records
    ]
    # data may be all there is to learn from, or stand beside an environment: two tasks of one source
    kinds = {where: (c["source"], _has_data_besides(c["algo"])) for where, c in cells.items()}
    tasks = {kinds[r.where]: r.task for r in records if r.where in cells}
    errors = _errors(suite / "ledger.jsonl")
    started = {r.where for r in records}
    for where, c in cells.items():
        if where in started:
            continue
        guess = Task("online", c["source"], c["env"])
        if c["data"] is not None:
            agent = {"learning_starts": 0} if kinds[where][1] else {}
            config = {"data": c["data"], "env": c["env"], "agent": agent}
            guess = _task({}, config, online=bool(c.get("offline_updates")))
        note = errors.get(c["id"]) or f"planned by the suite '{name}', not started"
        task = tasks.get(kinds[where], guess)
        more = {
            "label": _label(c["column"], c["algo"], task, c["data"]),
            "note": note,
            "planned": c["steps"],
            "suite": about,
        }
        named.append(RunRecord(where, c["algo"], task, c["seed"], "missing", **more))
    return named


def _has_data_besides(algo: str) -> bool:
    """Whether an algorithm learns in an environment and may be given data for it."""
    with contextlib.suppress(UsageError, ImportError):  # a plug-in that is not here any more
        return "data" in agents.get(algo).accepts
    return False


def _errors(ledger: Path) -> dict[str, str]:
    """The last error of each cell that has one."""
    found = {}
    for line in ledger.read_text(errors="replace").splitlines() if ledger.exists() else []:
        try:
            row = json.loads(line)
            if row.get("error"):
                found[str(row["cell"])] = _line(f"{row['event']}: {row['error']}")
        except (ValueError, KeyError, AttributeError):
            continue
    return found


def _folders(root: Path) -> Iterator[tuple[Path, list[str]]]:
    """Directories that may hold a run; not below one, and nothing hidden."""
    for folder, below, files in os.walk(root, followlinks=True):
        here = Path(folder)
        below[:] = [] if is_run(here, files) else sorted(d for d in below if not d.startswith("."))
        yield here, sorted(files)


def is_run(folder: Path, files: list[str]) -> bool:
    """Whether `folder` with these files is a run directory of ours."""
    if "run.json" in files:
        return True
    return "config.yaml" in files and any(f in files for f in ("console.log", ".lock")) and "run.json" not in files


# ------------------------------------------------------------------------------------------------------------- reading
def read_run(folder: Path) -> RunRecord:
    """One run directory, in whatever state it is. Never raises for what a killed run may leave behind."""
    try:
        file = folder / "config.yaml"
        config = yaml.load(file.read_text(), _SafeLoader) if file.exists() else {}  # noqa: S506 - a safe loader
        record = json.loads((folder / "run.json").read_text()) if (folder / "run.json").exists() else {}
        if not isinstance(config, dict) or not isinstance(record, dict):
            raise ValueError("not a mapping")
    except (OSError, ValueError, yaml.YAMLError) as e:
        note = f"{folder.name} cannot be read: {type(e).__name__}: {e}"
        return RunRecord(str(folder), "unknown", Task("unknown", "unknown"), None, "unreadable", note=_line(note))
    last = _last_row(folder / "metrics.jsonl")
    agent = config.get("agent") or {}
    offline_updates = agent.get("offline_updates")
    # asked of the settings too: such a run may end before its first step in the environment
    task = _task(record, config, online=last.get("env_steps", 0) > 0 or offline_updates is not None)
    label = _label(
        str(record.get("column") or ""), str(record.get("algo")), task, record.get("data", config.get("data"))
    )
    status, note = _status(record)
    counts = "updates" if task.unit == "updates" else "env_steps"
    before = offline_updates or 0 if counts == "env_steps" else 0  # `progress` counts both parts
    evaluations, final, damaged = _evaluations(folder / "eval.jsonl", counts)
    curve = np.array(sorted(evaluations)), np.array([np.mean(evaluations[k]) for k in sorted(evaluations)])
    episodes, protocol = final, LAST_AGENT
    if not episodes and evaluations:
        episodes, protocol = evaluations[max(evaluations)], LAST_EVALUATION
    if not all(map(math.isfinite, episodes)):
        status, note, episodes = "failed", "an evaluation returned a number that is not finite", []
    elif status in COUNTED and not episodes:
        note = _join(note, "never evaluated: it has no score")
    session = (record.get("sessions") or [{}])[-1]
    machine, git = session.get("machine") or {}, session.get("git") or {}
    outcome = record.get("final") or {}
    best, used = outcome.get("best_eval_mean"), outcome.get("eval_episodes_used_total")
    spent = record.get("spent_s") or {
        k: last[f"time/{k}_s"] for k in ("collect", "learn", "eval") if f"time/{k}_s" in last
    }
    return RunRecord(
        where=str(folder),
        algo=str(record.get("algo") or config.get("algo") or "unknown"),
        task=task,
        seed=record.get("seed", config.get("seed")),
        label=label,
        status=status,
        protocol=protocol,
        episodes=tuple(episodes),
        curve=curve,
        settings=_settings(config),
        config=str(record.get("config_key") or ""),
        steps=int(last[counts] if counts in last else max((record.get("progress") or 0) - before, 0)),
        planned=(config.get("agent") or {}).get("steps"),
        seconds={k: float(v) for k, v in spent.items()},
        selection=None if best is None or used is None else (float(best), int(used)),
        note=_join(note, f"{damaged} damaged rows in eval.jsonl" if damaged else ""),
        started=str(record.get("started") or ""),
        physics=str(record.get("physics") or "unknown"),
        engine=str(record.get("engine") or ""),
        commit=_commit(git),
        versions=session.get("versions") or {},
        machine=_machine(machine),
        command=_command(record.get("sessions") or []),
        dataset=str((record.get("dataset") or {}).get("sha256") or "")[:12],
    )


def _label(column: str, algo: str, task: Task, data: object) -> str:
    """What a run is called where that is not its algorithm: its column, and the data an online agent has besides."""
    return f"{column or algo} with {data}" if task.family == "online" and data else column


def _status(record: Mapping[str, Any]) -> tuple[Status, str]:
    """Status and the reason for it, from run.json (empty: the run was killed before it wrote any)."""
    said, error = record.get("status"), _line(record.get("error") or "")
    if said == "done":
        return "done", ""
    if said == "failed":
        return ("diverged" if error.startswith("Diverged") else "failed"), error
    if said == "preempted":
        return "unfinished", "interrupted; `rlctl resume` goes on with it"
    if said == "running":
        return "unfinished", f"running, or killed; last heard of {record.get('updated', 'never')}"
    return "unfinished", "never got to its first record"


def _task(record: Mapping[str, Any], config: Mapping[str, Any], online: bool) -> Task:
    """`online`: the run has made environment steps or was to make them, unlike one that only learns from a dataset."""
    data, trains_in = record.get("data", config.get("data")), record.get("env", config.get("env"))
    env = record.get("eval_env") or trains_in
    options = record.get("eval_env_options")  # may be empty, and then says so
    options = dict(config.get("env_options") or {} if options is None else options)
    if options.get("physics") == "published":
        del options["physics"]
    changed = f" ({', '.join(f'{k}={v}' for k, v in sorted(options.items()))})" if options else ""
    # an off-policy agent that is given data besides takes on the same task as one that is not: its label says so
    off_policy = "learning_starts" in (config.get("agent") or {})
    if data is None or off_policy:
        return Task("online", f"{env}{changed}", env)
    found = record.get("dataset") or {}
    labels = found if "benchmark" in found else dataset_labels(str(data), "")
    family = {"own": "own data"}.get(labels["benchmark"], str(labels["benchmark"]))
    name = str(labels["dataset"]) + ("" if record.get("dataset") is None else _version(labels)) + changed
    if trains_in and online:
        return Task(f"{family}, then online", f"{trains_in} from {name}", env)
    return Task(family, name, env, "updates")


def _version(labels: Mapping[str, Any]) -> str:
    version = labels.get("dataset_version")
    return "" if version is None or str(labels["dataset"]).endswith(f"-v{version}") else f" v{version}"


def _evaluations(file: Path, counts: str) -> tuple[dict[int, list[float]], list[float], int]:
    """Deterministic returns by step of the evaluations in training, those of the final one, and unreadable rows.

    Of several evaluations at one step the last counts: a run that learns from a dataset first is evaluated many times
    before its first environment step, and where its curve begins is what the whole offline part has led to.
    A last line that breaks off is what a killed run leaves and no damage.
    """
    during: dict[int, list[float]] = {}
    updates: dict[int, int] = {}
    final: list[float] = []
    damaged = 0
    lines = file.read_text(errors="replace").splitlines() if file.exists() else []
    for i, line in enumerate(lines):
        try:
            row = json.loads(line)
            if not row["deterministic"]:
                continue
            if row["final"]:
                final.append(float(row["return"]))
                continue
            at, made, ret = int(row[counts]), int(row.get("updates", 0)), float(row["return"])
            if made > updates.get(at, -1):
                updates[at], during[at] = made, []
            if made == updates[at]:
                during[at].append(ret)
        except (ValueError, KeyError, TypeError):
            damaged += i < len(lines) - 1
    return during, final, damaged


def _last_row(file: Path) -> dict[str, Any]:
    """The last whole row of a file of JSON lines; only its end is read."""
    if not file.exists():
        return {}
    with file.open("rb") as f:
        f.seek(max(0, file.stat().st_size - 20_000))
        lines = f.read().decode(errors="replace").splitlines()
    for line in reversed(lines):
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            return row
    return {}


_NOT_SETTINGS = ("seed", "device", "run", "env", "data", "algo")


def _settings(config: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings by dotted name; those of the agent without its section's name.

    Of the section run only an arithmetic of its own: the rest is about logs and checkpoints.
    """
    sections = {k: v for k, v in config.items() if k not in _NOT_SETTINGS and k != "agent"}
    run = config.get("run") or {}
    usual = {"precision": "float32", "compile": False}
    arithmetic = {k: run[k] for k, v in usual.items() if run.get(k, v) != v}
    return dict(_flat({**sections, **(config.get("agent") or {}), **({"run": arithmetic} if arithmetic else {})}))


def _flat(section: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in section.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _command(sessions: Sequence[Mapping[str, Any]]) -> tuple[str, ...]:
    """The command that began the run, and those that gave it another length; () where nobody wrote it down."""
    words: list[str] = []
    for k, session in enumerate(sessions):
        said = [str(w) for w in session.get("command") or ()]
        if said == ["worker.py"]:  # of `rlctl bench`, whose own command such an older record does not name
            continue
        if k == 0:
            words = said
        elif said != words and any(w == "--steps" or w.startswith("--steps=") for w in said):
            words += ["&&", *said]
    return tuple(words)


def _commit(git: Mapping[str, Any]) -> str:
    if not git.get("commit"):
        return "unknown"
    return str(git["commit"])[:10] + (f" + changes {git['dirty']}" if git.get("dirty") else "")


def _machine(machine: Mapping[str, Any]) -> str:
    """Without the host's name: what matters for speed."""
    if not machine:
        return "unknown"
    gpu = f", {machine['gpu']}" if machine.get("gpu") else ""
    return f"{machine.get('cpu', 'unknown CPU')}, {machine.get('cores', '?')} cores{gpu}"


def _line(text: str) -> str:
    return " ".join(str(text).split())


def _join(*parts: str) -> str:
    return "; ".join(p for p in parts if p)
