"""Shared ways of printing results."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.table import Table


def print_json(value: Any) -> None:
    """One JSON value and nothing else on stdout."""
    print(json.dumps(value))


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A plain aligned table on stdout; long cells fold instead of being cut."""
    table = Table(title=title, box=None, pad_edge=False, title_justify="left", header_style="bold")
    for name in columns:
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(*["" if x is None else str(x) for x in row])
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)


@contextmanager
def busy(what: str, quiet: bool = False) -> Iterator[Callable[[str], None]]:
    """A sign of life on a terminal, for work of unknown length; call what it yields to say what is done now."""
    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield lambda _: None
        return
    with console.status(what) as status:
        yield status.update
