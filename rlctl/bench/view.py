"""What a person sees of a grid: a live table on a terminal, one line per event in a pipe."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from types import TracebackType
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from rlctl.bench.ledger import State
from rlctl.bench.suite import Cell
from rlctl.display import clock

GLYPHS = {
    "done": ("●", "green"),
    "running": ("◐", "cyan"),
    "interrupted": ("◌", "yellow"),
    "waiting": ("·", "dim"),
    "failed": ("✗", "red"),
    "diverged": ("∞", "magenta"),
}
LEGEND = (
    "● done  ◐ running  ◌ interrupted  · waiting  ✗ failed  ∞ diverged; number: mean return of the done, "
    "or normalised score where the task has one"
)
REFRESH, PLAIN_PERIOD = 1.0, 60.0
"""Seconds between two drawings of the table; between two lines of progress in a pipe."""


class View:
    """Prints to stderr, so that stdout stays free for results."""

    def __init__(self, folder: Path, cells: list[Cell], slots: int, *, quiet: bool = False) -> None:
        self.folder, self.cells, self.slots, self.quiet = folder, {c.id: c for c in cells}, slots, quiet
        self.console = Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._drawn = time.monotonic()
        self._took: dict[tuple[str, str], list[float]] = {}
        """Seconds of the cells that ended here, by column and source."""
        self._begun: dict[str, float] = {}
        """Share of a cell that was done when its running attempt began."""

    def __enter__(self) -> View:
        if self.console.is_terminal and not self.quiet:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, e: BaseException | None, tb: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def say(self, line: str) -> None:
        """One line."""
        if self.quiet:
            return
        if self._live is not None:
            self._live.console.print(line, markup=False, soft_wrap=True)
        else:
            print(line, file=sys.stderr, flush=True)

    def started(self, cell: Cell, s: State) -> None:
        """A cell has begun, or goes on."""
        self._begun[cell.id] = self._share(cell)
        if self._live is None:
            at = f" (attempt {s.attempts}, from {self._begun[cell.id]:.0%})" if s.attempts > 1 else ""
            self.say(f"start     {cell.id}{at}")

    def ended(self, cell: Cell, s: State, seconds: float, again: bool) -> None:
        """A cell has ended, well or not."""
        if s.status == "done":
            whole = 1.0 - self._begun.get(cell.id, 0.0)
            if whole > 0.2:
                self._took.setdefault((cell.column, cell.source), []).append(seconds / whole)
            score = "" if s.score is None else f"  return {s.score:.1f}"
            score += "" if s.normalized is None else f"  normalised {s.normalized:.1f}"
            if self._live is None:
                self.say(f"done      {cell.id}  {clock(seconds)}{score}")
            return
        more = "; will be tried again" if again and s.status == "failed" else ""
        where = f"; log {self.folder / s.log}" if s.log and s.status in ("failed", "diverged") else ""
        self.say(f"{s.status:<9} {cell.id}{': ' + s.error if s.error else ''}{more}{where}")

    def show(self, found: Mapping[str, State], last: bool = False) -> None:
        """Draw, if it is time to."""
        now = time.monotonic()
        if self.quiet or (now - self._drawn < (PLAIN_PERIOD if self._live is None else REFRESH) and not last):
            return
        self._drawn = now
        shares = {id: self._share(self.cells[id]) for id, s in found.items() if s.status == "running"}
        if self._live is not None:
            rows = [(c.column, c.source, c.seed, found[c.id]) for c in self.cells.values()]
            self._live.update(
                Group(grid(rows), Text(LEGEND, "dim"), *self._running(found, shares), self._foot(found, shares)),
                refresh=True,
            )
        elif not last:
            self.say(self._foot(found, shares).plain)

    def _share(self, cell: Cell) -> float:
        return share_done(self.folder / cell.id, cell.steps, cell.offline_updates)

    def _running(self, found: Mapping[str, State], shares: Mapping[str, float]) -> list[Text]:
        out = []
        for id, share in list(shares.items())[:12]:
            rest = self._rest(id, found[id], share)
            out.append(Text(f"◐ {id}  {share:4.0%}  ETA {'unknown' if rest is None else clock(rest)}"))
        return out

    def _foot(self, found: Mapping[str, State], shares: Mapping[str, float]) -> Text:
        counts = [f"{n} {status}" for status in GLYPHS if (n := sum(s.status == status for s in found.values()))]
        return Text(f"{len(found)} cells: {', '.join(counts)}  ETA {self._eta(found, shares)}")

    def _rest(self, id: str, s: State, share: float) -> float | None:
        """Seconds until a running cell ends."""
        begun, spent = self._begun.get(id, 0.0), time.time() - s.since
        if share - begun > 0.02:
            return spent / (share - begun) * (1 - share)
        took = self._took.get((self.cells[id].column, self.cells[id].source))
        return None if took is None else max(fmean(took) * (1 - begun) - spent, 0.0)

    def _eta(self, found: Mapping[str, State], shares: Mapping[str, float]) -> str:
        """Of the whole grid; what was never measured is taken to cost the mean of the rest, and marked with >."""
        rest: list[float | None] = [self._rest(id, found[id], share) for id, share in shares.items()]
        running: dict[tuple[str, str], float] = {}
        for id, share in shares.items():
            if share - self._begun.get(id, 0.0) > 0.02:
                c = self.cells[id]
                running[c.column, c.source] = (time.time() - found[id].since) / (share - self._begun.get(id, 0.0))
        for id, s in found.items():
            if s.status in ("waiting", "interrupted"):
                pair = self.cells[id].column, self.cells[id].source
                took = fmean(self._took[pair]) if pair in self._took else running.get(pair)
                rest.append(took)
        known = [r for r in rest if r is not None]
        if not known:
            return "unknown" if rest else clock(0)
        unknown = len(rest) - len(known)
        return f"{'> ' if unknown else ''}{clock((sum(known) + unknown * fmean(known)) / self.slots)}"


def grid(rows: list[tuple[str, str, int, State]]) -> Table:
    """Columns of the suite down, its sources across, one glyph per seed and the mean score of the finished ones."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("")
    sources = list(dict.fromkeys(r[1] for r in rows))
    for source in sources:
        table.add_column(source, overflow="fold")
    for column in dict.fromkeys(r[0] for r in rows):
        row: list[Any] = [column]
        for source in sources:
            here = sorted(((seed, s) for c, x, seed, s in rows if (c, x) == (column, source)), key=lambda p: p[0])
            text = Text()
            for _, s in here:
                text.append(*GLYPHS[s.status])
            scores = [s.normalized if s.normalized is not None else s.score for _, s in here if s.status == "done"]
            if known := [x for x in scores if x is not None]:
                text.append(f" {fmean(known):.1f}")
            row.append(text)
        table.add_row(*row)
    return table


def share_done(run: Path, steps: int, offline_updates: int = 0) -> float:
    """Progress of a run as its last metric row tells it, in [0, 1]; see `Cell` for the numbers."""
    try:
        with (run / "metrics.jsonl").open("rb") as f:
            f.seek(0, 2)
            f.seek(max(f.tell() - 8192, 0))
            lines = f.read().split(b"\n")
    except OSError:
        return 0.0
    for line in reversed(lines[:-1]):  # what follows the last newline is not whole
        try:
            row = json.loads(line)
            made = row["env_steps"] + min(row["updates"], offline_updates) or row["updates"]
            return min(made / steps, 1.0)
        except (ValueError, KeyError, TypeError):
            continue
    return 0.0
