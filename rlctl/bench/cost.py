"""What a grid costs, from what its cells cost before: measured speed or nothing."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

from rlctl.bench.suite import Cell
from rlctl.experiment import read_json

LISTED = 3
"""Pairs without a measured speed that are named."""


@dataclass(frozen=True)
class Speed:
    """Steps per second of finished runs, evaluations included (the median of them)."""

    steps_per_second: float
    runs: int
    """0: none is finished, the beginning of one was measured, without evaluations (`rlctl.bench.probe`)."""
    same_settings: bool
    """Whether they had the very settings of the cell, or only its algorithm and, if any had it, its task."""


class Speeds:
    """Measured speeds of the finished runs under some folders."""

    def __init__(self, folders: list[Path]) -> None:
        self._by_key: dict[str, list[float]] = {}
        self._by_pair: dict[tuple[str, str], list[float]] = {}
        self._by_algo: dict[str, list[float]] = {}
        self._probed: dict[str, Speed] = {}
        for file in {f.resolve() for folder in folders for f in _records(folder)}:
            try:
                record = read_json(file)
            except (OSError, ValueError):
                continue
            seconds = sum((record.get("spent_s") or {}).values())
            if record.get("status") != "done" or not record.get("progress") or seconds <= 0:
                continue
            speed = record["progress"] / seconds
            self._by_key.setdefault(str(record.get("config_key")), []).append(speed)
            pair = str(record.get("algo")), str(record.get("data") or record.get("env"))
            self._by_pair.setdefault(pair, []).append(speed)
            self._by_algo.setdefault(pair[0], []).append(speed)

    def add(self, key: str, speed: Speed) -> None:
        """Of settings with this key, measured by a probe."""
        self._probed[key] = speed

    def of(self, cell: Cell, *, elsewhere: bool = True) -> Speed | None:
        """What is known of a cell, None if nothing like it was ever measured; `elsewhere` lets other tasks count."""
        s = cell.settings
        if seen := self._by_key.get(s.key()):
            return Speed(median(seen), len(seen), True)
        if probed := self._probed.get(s.key()):
            return probed
        if seen := self._by_pair.get((s.algo, str(s.data or s.env))):
            return Speed(median(seen), len(seen), False)
        if elsewhere and (seen := self._by_algo.get(s.algo)):
            return Speed(median(seen), len(seen), False)
        return None


def _records(folder: Path) -> Iterator[Path]:
    for at, folders, files in os.walk(folder):
        if "run.json" in files:
            yield Path(at) / "run.json"
            folders.clear()  # nothing below a run directory


@dataclass(frozen=True)
class Estimate:
    """Of the cells that are left to do."""

    cells: int
    steps: int
    seconds: float
    """Of one slot, of the cells whose speed is known."""
    unknown: list[str]
    """COLUMN on SOURCE without a measured speed."""
    loose: bool
    """Some speeds are those of other settings or tasks."""
    probed: bool = False
    """Some speeds are those of beginnings, without evaluations."""

    def lines(self, slots: int) -> list[str]:
        """For the person."""
        out = [f"to do: {self.cells} runs, {self.steps:,} steps"]
        if self.cells and self.seconds:
            notes = ["partly from runs with other settings or on other tasks"] if self.loose else []
            notes += ["evaluations not counted everywhere"] if self.probed else []
            about = f" ({'; '.join(notes)})" if notes else ""
            out.append(
                f"at measured speed{about}: {_hours(self.seconds)} of computing, {_hours(self.seconds / slots)} "
                f"with {slots} at a time"
            )
        if self.unknown:
            more = f" and {len(self.unknown) - LISTED} more" if len(self.unknown) > LISTED else ""
            out.append(
                f"time unknown, never measured here: {', '.join(self.unknown[:LISTED])}{more}; "
                "--dry-run --probe measures a few seconds of each"
            )
        return out


def _hours(seconds: float) -> str:
    if seconds < 60:
        return "under a minute"
    return f"{seconds / 3600:.1f} h" if seconds >= 3600 else f"{seconds / 60:.1f} min"


def estimate(cells: list[Cell], speeds: Speeds) -> Estimate:
    """Steps and time of `cells`, all of them from their start."""
    seconds, unknown, loose, probed = 0.0, [], False, False
    for c in cells:
        speed = speeds.of(c)
        if speed is None:
            unknown.append(f"{c.column} on {c.source}")
        else:
            seconds += c.steps / speed.steps_per_second
            loose |= not speed.same_settings
            probed |= not speed.runs
    return Estimate(len(cells), sum(c.steps for c in cells), seconds, list(dict.fromkeys(unknown)), loose, probed)


def as_json(e: Estimate) -> dict[str, Any]:
    """The same for programs."""
    return {"runs": e.cells, "steps": e.steps, "seconds": e.seconds if e.cells else 0.0, "unknown": e.unknown}
