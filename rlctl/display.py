"""What a person sees of a run: a live bar on a terminal, plain lines in a pipe, the same lines in console.log."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import IO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeElapsedColumn

PLAIN_PERIOD = 10.0
"""Seconds between lines in a pipe, of progress or of an evaluation; what comes more often goes to the log alone."""


class Display:
    """Prints to stderr, so that stdout stays free for results."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self.console = Console(stderr=True, highlight=False, soft_wrap=True)
        self.live = self.console.is_terminal and not quiet
        self._log: IO[str] | None = None
        self._bar: Progress | None = None
        self._task: TaskID | None = None
        self._total = 0
        self._begun = (0.0, 0)  # when, and at which progress, this process began
        self._last_line = 0.0
        self._latest_eval = ""

    def log_to(self, file: Path) -> None:
        """Also append every line to `file`."""
        self._log = file.open("a")

    def say(self, line: str) -> None:
        """One line for the person and the log."""
        if self._log is not None:
            self._log.write(line + "\n")
            self._log.flush()
        if not self.quiet:
            console = self._bar.console if self._bar is not None else self.console
            console.print(line, markup=False)

    def start(self, total: int, progress: int) -> None:
        """The run (or its next stage) begins; `total` steps at its end."""
        self._total = total
        if not self._begun[0]:
            self._begun = (time.monotonic(), progress)
        if not self.live:
            return
        if self._bar is None:
            self._bar = Progress(
                TextColumn("{task.fields[head]}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TextColumn("{task.fields[tail]}"),
                TimeElapsedColumn(),
                console=self.console,
                refresh_per_second=4,
            )
            self._task = self._bar.add_task("run", total=total, completed=progress, head="steps", tail="")
            self._bar.start()
        assert self._task is not None
        self._bar.update(self._task, total=total)

    def progress(self, progress: int, online: bool, row: dict[str, float], *, collect: float, learn: float) -> None:
        """A log row was written; `collect` and `learn` are the seconds spent on each since the row before."""
        seconds, done = time.monotonic() - self._begun[0], progress - self._begun[1]
        eta = seconds / done * (self._total - progress) if done else 0.0
        parts = []
        if "charts/episodic_return" in row:
            parts.append(f"return {row['charts/episodic_return']:.1f}")
        if self._latest_eval:
            parts.append(f"eval {self._latest_eval}")
        unit = "steps/s" if online else "updates/s"
        speed = row["charts/SPS"]
        share = collect / (collect + learn) if collect + learn else 0.0
        split = f" (collect {share:.0%}, learn {1 - share:.0%})" if online else ""
        parts += [f"{speed:,.0f} {unit}{split}", f"ETA {clock(eta)}"]
        tail = "  ".join(parts)
        if self._bar is not None and self._task is not None:
            self._bar.update(self._task, completed=progress, tail=tail)
        now = time.monotonic()
        if now - self._last_line >= PLAIN_PERIOD or progress >= self._total:
            self._last_line = now
            self._plain(f"{progress:>12,} / {self._total:,}  {progress / max(self._total, 1):4.0%}  {tail}")

    def evaluated(self, progress: int, mean: float, std: float, episodes: int, score: float | None) -> None:
        """An evaluation during training has ended."""
        self._latest_eval = f"{mean:.1f}"
        normalized = "" if score is None else f"  (normalised {score:.1f})"
        result = f"{mean:.1f} ± {std:.1f} over {episodes} episodes{normalized}"
        line = f"{progress:>12,} / {self._total:,}  evaluation: {result}"
        now = time.monotonic()
        if now - self._last_line >= PLAIN_PERIOD or progress >= self._total:
            self._last_line = now
            self._plain(line)
        elif self._log is not None:
            self._log.write(line + "\n")

    def _plain(self, line: str) -> None:
        """A line for pipe and log; the terminal has its bar instead."""
        if self._log is not None:
            self._log.write(line + "\n")
            self._log.flush()
        if not self.quiet and not self.live:
            print(line, file=sys.stderr, flush=True)

    def stop(self) -> None:
        """Take the bar away."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
        if self._log is not None:
            self._log.flush()


def clock(seconds: float) -> str:
    """12:34 or 1:23:45."""
    s = round(max(seconds, 0))
    return f"{s // 3600}:{s // 60 % 60:02d}:{s % 60:02d}" if s >= 3600 else f"{s // 60:02d}:{s % 60:02d}"
