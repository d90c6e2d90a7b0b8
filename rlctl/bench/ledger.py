"""What has happened to each cell, on disk, so that a grid survives anything.

    DIR/bench.json       the plan of the last start: every cell with its folder, steps and seed
    DIR/suite.yaml       the suite it came from, as it was then
    DIR/ledger.jsonl     one line per event: start, done, failed, diverged, lost, interrupted, retry
    DIR/logs/CELL/N.log  what attempt N of a cell printed
    DIR/.lock            held by the driver
    DIR/COLUMN/SOURCE/sSEED-KEY/     the run directory of a cell

Only the driver writes the first three; each event is one appended and synced line, and a line torn by a crash is passed
over. A cell is finished when its run directory says so: the ledger is the memory of attempts, not the truth of results.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import socket
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

from rlctl.bench.suite import Plan
from rlctl.checkpoint import write_atomically
from rlctl.errors import UsageError
from rlctl.experiment import read_json

Event = Literal["start", "done", "failed", "diverged", "lost", "interrupted", "retry"]
Status = Literal["waiting", "running", "interrupted", "done", "failed", "diverged"]
SCHEMA = 1
BAD_ENDS = ("failed", "lost")
"""Events that count as an attempt gone wrong."""


@dataclass(frozen=True)
class State:
    """Where a cell stands."""

    status: Status
    attempts: int = 0
    """Times it was started."""
    bad: int = 0
    """Attempts that failed or were lost since the last `retry`, and since one of them got further than all before."""
    error: str = ""
    log: str = ""
    since: float = 0.0
    """When the last attempt began, seconds since the epoch."""
    score: float | None = None
    """Mean return of the final evaluation."""
    normalized: float | None = None


class Ledger:
    """The ledger of a folder, opened for writing: takes the folder's lock. UsageError if another driver has it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._lock = (folder / ".lock").open("a+")
        if not _locked(self._lock):
            raise UsageError(
                f"{folder} is being worked on by another driver ({holder(folder)}): watch it with "
                f"`rlctl bench --status {folder}`, or stop it first"
            )
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        self._lock.flush()
        self._file: IO[str] | None = None

    def begin(self, plan: Plan, about: Mapping[str, Any]) -> None:
        """Write the plan down. UsageError if the folder belongs to another suite."""
        old = read_json(self.folder / "bench.json")
        if old and old["suite"] != plan.name:
            raise UsageError(f"{self.folder} holds the suite '{old['suite']}', not '{plan.name}': choose another --out")
        cells = [
            {
                "id": c.id,
                "algo": c.settings.algo,
                "column": c.column,
                "source": c.source,
                "env": c.settings.env,
                "data": c.settings.data,
                "seed": c.seed,
                "steps": c.steps,
                "offline_updates": c.offline_updates,
                "config_key": c.settings.key(),
            }
            for c in plan.cells
        ]
        record = {"schema": SCHEMA, "suite": plan.name, "description": plan.description, **about, "cells": cells}
        write_atomically(self.folder / "bench.json", json.dumps(record, indent=1) + "\n")
        text = plan.file.read_text()
        if not re.search(r"^name:", text, re.MULTILINE):
            text = f"name: {plan.name}\n{text}"  # the copy has another file's name
        write_atomically(self.folder / "suite.yaml", text)
        self._file = _open_lines(self.folder / "ledger.jsonl")

    def note(self, event: Event, cell: str, **fields: Any) -> None:
        """Append an event."""
        assert self._file is not None, "begin() first"
        row = {"time": round(time.time(), 3), "event": event, "cell": cell} | fields
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def log_of(self, cell: str, attempt: int) -> Path:
        """The file of an attempt's output."""
        return self.folder / "logs" / cell / f"{attempt}.log"

    def close(self) -> None:
        """Give the folder back."""
        if self._file is not None:
            self._file.close()
        self._lock.close()


def _locked(file: IO[str]) -> bool:
    """Take the lock; more than one try, for somebody who only asks whether it is held (`is_held`) has it a moment."""
    for wait in (0.05, 0.1, 0.2, 0.0):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except OSError:
            time.sleep(wait)
    return False


def _open_lines(file: Path) -> IO[str]:
    """For appending, after a line that a crash tore off."""
    f = file.open("a+")
    if f.tell():
        with file.open("rb") as tail:
            tail.seek(-1, os.SEEK_END)
            if tail.read(1) != b"\n":
                f.write("\n")
    return f


def events(folder: Path) -> list[dict[str, Any]]:
    """Every intact line of the ledger, oldest first."""
    file = folder / "ledger.jsonl"
    out = []
    for line in file.read_text(errors="replace").splitlines() if file.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict) and {"time", "event", "cell"} <= row.keys():
            out.append(row)
    return out


def states(folder: Path, cells: list[str], *, live: bool) -> dict[str, State]:
    """Where each cell stands; `live`: a driver is at work, so what has begun and not ended is running."""
    of: dict[str, list[dict[str, Any]]] = {id: [] for id in cells}
    for row in events(folder):
        if row["cell"] in of:
            of[row["cell"]].append(row)
    return {id: _state(folder / id, rows, live) for id, rows in of.items()}


def _state(run: Path, rows: list[dict[str, Any]], live: bool) -> State:
    attempts = sum(r["event"] == "start" for r in rows)
    begun = [r["time"] for r in rows if r["event"] == "start"]
    since = begun[-1] if begun else 0.0
    try:
        record = read_json(run / "run.json") if run.is_dir() else {}
    except UsageError:  # damaged: one cell's trouble, which its next attempt will run into and report
        record = {}
    if record.get("status") == "done":
        final = record.get("final") or {}
        return State("done", attempts, 0, "", "", since, final.get("return_mean"), final.get("normalized_score"))
    fresh = rows
    for k, r in enumerate(rows):
        if r["event"] == "retry":
            fresh = rows[k + 1 :]
    bad = [r for r in fresh if r["event"] in BAD_ENDS]
    last = fresh[-1] if fresh else None
    error, log = (str(bad[-1].get("error", "")), str(bad[-1].get("log", ""))) if bad else ("", "")
    status: Status
    if last is None:
        status = "interrupted" if attempts else "waiting"
    elif last["event"] == "start":
        status = "running" if live else "interrupted"
    elif last["event"] == "diverged":
        status, error, log = "diverged", str(last.get("error", "")), str(last.get("log", ""))
    elif last["event"] in BAD_ENDS:
        status = "failed"
    else:  # interrupted, or done by a run directory that is no longer there
        status = "interrupted" if last["event"] == "interrupted" else "waiting"
    return State(status, attempts, _stuck(bad), error, log, since)


def holder(folder: Path) -> str:
    """Who has the lock of `folder`, as he wrote it."""
    file = folder / ".lock"
    return (file.read_text().strip() if file.exists() else "") or "unknown"


def is_held(file: Path) -> bool:
    """Whether somebody holds the lock `file`, that of a driver or of a run."""
    if not file.exists():
        return False
    with file.open("a") as f:
        try:
            fcntl.flock(f, fcntl.LOCK_SH | fcntl.LOCK_NB)  # shared: two who ask do not deceive each other
        except OSError:
            return True
    return False


def _stuck(bad: list[dict[str, Any]]) -> int:
    """How many attempts ended badly since the last one that got further (`at`, steps) than all before it."""
    count, best = 0, -1
    for r in bad:
        at = int(r.get("at", 0))
        count = 1 if at > best else count + 1
        best = max(best, at)
    return count
