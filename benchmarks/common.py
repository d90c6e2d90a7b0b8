"""What the benchmark scripts share: interleaved timing, provenance, results on disk."""

from __future__ import annotations

import datetime
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rlctl.provenance import git, machine, versions

RESULTS = Path(__file__).resolve().parent / "results"


def interleaved(contenders: dict[str, Callable[[], float]], rounds: int) -> dict[str, dict[str, Any]]:
    """Call every contender once per round, in turn, so that a noisy machine is noisy to all of them alike.

    A contender returns units per second. Gives median, all rounds, and the median over rounds of the ratio to the last
    contender of the dict (the peer).
    """
    seen: dict[str, list[float]] = {name: [] for name in contenders}
    for r in range(rounds):
        for name, measure in contenders.items():
            seen[name].append(measure())
            print(f"  round {r + 1}/{rounds}  {name:<44} {seen[name][-1]:>12,.1f} /s", flush=True)
    peer = seen[list(contenders)[-1]]
    return {
        name: {
            "median": statistics.median(values),
            "ratio": statistics.median([v / p for v, p in zip(values, peer, strict=True)]),
            "rounds": values,
        }
        for name, values in seen.items()
    }


def rate(step: Callable[[], int], seconds: float, clock: Callable[[], float] = time.perf_counter) -> float:
    """Units per second of `step`, which returns the units it did; `clock` time.process_time counts CPU seconds."""
    start, done = clock(), 0
    while (spent := clock() - start) < seconds:
        done += step()
    return done / spent


def write(name: str, result: dict[str, Any], out: Path | None = None, *, quiet: bool = False) -> Path:
    """Store a result with who, what and when."""
    file = out or RESULTS / f"{name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    mine = {k: v for k, v in machine().items() if k != "host"}
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    record = {"benchmark": name, "date": now, "git": git(), "versions": versions(), "machine": mine, **result}
    part = file.with_name(f"{file.name}.part")
    part.write_text(json.dumps(record, indent=1) + "\n")
    part.replace(file)  # whoever is ended meanwhile leaves no half of it
    if not quiet:
        print(f"written to {file}")
    return file
