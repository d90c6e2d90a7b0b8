"""What a check says, and how checks are run one after the other."""

from __future__ import annotations

import time
import traceback
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeVar

from rlctl.errors import UsageError

S = TypeVar("S")
Check = Callable[[S], None]
"""Passes by returning, fails by raising, says that it does not apply by raising `Skip`. Its docstring's first line is
what it looks for."""


class CheckFailed(AssertionError):
    """The message is the reason."""


class Skip(Exception):  # not an error
    """The check does not apply; the message says why."""


@dataclass(frozen=True)
class Result:
    """What became of one check."""

    check: str
    status: Literal["pass", "fail", "skip"]
    looks_for: str
    reason: str = ""
    """Why it failed or was skipped; one line."""
    seconds: float = 0.0

    @property
    def ok(self) -> bool:
        """Whether nothing is wrong: passed, or does not apply."""
        return self.status != "fail"

    def line(self) -> str:
        """One line for a person."""
        why = f": {self.reason}" if self.reason else ""
        return f"{self.status:<4}  {self.check:<22} {self.looks_for}{why}"


def expect(condition: bool, reason: str) -> None:
    """Fail with `reason` unless `condition` holds."""
    if not condition:
        fail(reason)


def fail(reason: str) -> NoReturn:
    """Fail the check."""
    raise CheckFailed(reason)


def run_checks(checks: Mapping[str, Check[Any]], subject: Any, only: Collection[str] = ()) -> Iterator[Result]:
    """Run the checks named in `only` (all, if empty) on `subject` in their order; yields as they end."""
    for name in only:
        if name not in checks:
            close = get_close_matches(name, checks, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"there are {', '.join(checks)}"
            raise UsageError(f"no check '{name}': {hint}")
    for name, check in checks.items():
        if only and name not in only:
            continue
        looks_for = (check.__doc__ or "").strip().partition("\n")[0].rstrip(".")
        start = time.perf_counter()
        status: Literal["pass", "fail", "skip"] = "pass"
        reason = ""
        try:
            check(subject)
        except Skip as e:
            status, reason = "skip", str(e)
        except CheckFailed as e:
            status, reason = "fail", str(e)
        except Exception as e:  # whatever a plug-in does wrong is a finding, not the end of the suite
            status, reason = "fail", _describe(e)
        yield Result(name, status, looks_for, " ".join(reason.split()), time.perf_counter() - start)


def _describe(e: Exception) -> str:
    """The error and the place it comes from: the last frame outside of installed libraries."""
    frames = traceback.extract_tb(e.__traceback__)
    own = [f for f in frames if "site-packages" not in f.filename] or list(frames)
    where = f" ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else ""
    return f"{type(e).__name__}: {str(e) or 'no message'}{where}"
