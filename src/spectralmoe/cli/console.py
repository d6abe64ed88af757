"""What a person sees: progress with time left, tables; plain lines where there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from spectralmoe.files import to_json
from spectralmoe.training.loop import Watcher

__all__ = ["print_json", "print_table", "watching"]

_PLAIN_SECONDS = 10.0


class _Clock:
    """Time left, from the share of work done since this process started."""

    def __init__(self) -> None:
        self.started, self.first = time.monotonic(), 0.0
        self.seen = False

    def left(self, done: float) -> str:
        if not self.seen:
            self.first, self.seen = done, True
        elapsed, share = time.monotonic() - self.started, done - self.first
        if share <= 0 or elapsed < 1:
            return ""
        seconds = round(elapsed / share * (1 - done))
        return f"{seconds // 60}:{seconds % 60:02d} left"


@contextmanager
def watching(quiet: bool = False) -> Iterator[Watcher]:
    """A watcher for a long run: a progress bar on a terminal, else a line now and then; both on stderr."""
    console, clock = Console(stderr=True), _Clock()
    if quiet:
        yield lambda text, done: None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeElapsedColumn(),
            TextColumn("{task.fields[left]}"),
        )
        with Progress(*columns, console=console, transient=True) as bar:
            task = bar.add_task("starting", total=1.0, left="")
            yield lambda text, done: bar.update(task, description=text, completed=done, left=clock.left(done))
    else:
        yield _plain(console, clock)


def _plain(console: Console, clock: _Clock) -> Watcher:
    last: dict[str, Any] = {"text": None, "at": 0.0}

    def watch(text: str, done: float) -> None:
        left, now = clock.left(done), time.monotonic()
        if text != last["text"] or now - last["at"] > _PLAIN_SECONDS:
            last.update(text=text, at=now)
            console.print(Text(f"{done:4.0%}  {text}  {left}".rstrip()), soft_wrap=True)

    return watch


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, key: int = 1) -> None:
    """A table on stdout; on a narrow terminal several, each with the ``key`` columns that name the rows."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=max(200, console.width))
    first = key
    while first < len(headings):
        last = len(headings)
        while last > first + 1 and _width(console, headings, rows, key, first, last) > console.width:
            last -= 1
        table = _table(headings, rows, key, first, last)
        table.title = Text(title) if first == key else None
        console.print(table)
        first = last


def _width(
    console: Console, headings: Sequence[str], rows: Sequence[Sequence[str]], key: int, first: int, last: int
) -> int:
    return console.measure(
        _table(headings, rows, key, first, last), options=console.options.update(width=10_000)
    ).maximum


def _table(headings: Sequence[str], rows: Sequence[Sequence[str]], key: int, first: int, last: int) -> Table:
    """The key columns and the columns from ``first`` up to ``last``."""
    table = Table(title_justify="left", header_style="bold")
    for index, heading in enumerate([*headings[:key], *headings[first:last]]):
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, [*row[:key], *row[first:last]]))
    return table


def print_json(value: Any) -> None:
    """One JSON value on stdout, as ``write_json`` writes it."""
    print(to_json(value), end="")
