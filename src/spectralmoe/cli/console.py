"""Output for people: progress with time left, tables, findings; plain lines if there is no terminal."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from shutil import get_terminal_size
from textwrap import fill
from typing import TYPE_CHECKING, Any

import typer

from spectralmoe.json_files import to_json

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from spectralmoe.training.loop import Progress
    from spectralmoe.training.settings import Settings

__all__ = [
    "count",
    "over_seeds",
    "print_finding",
    "print_json",
    "print_settings",
    "print_table",
    "say",
    "show_progress",
]

_PLAIN_SECONDS = 10.0
_SOON = 2.0  # seconds of work that a forecast rests on
_LONGEST = 100 * 24 * 3600  # seconds; beyond it a forecast says nothing


class Clock:
    """Time left, from the share of work that has been done since this process started.

    Args:
        now: seconds.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.started, self.first = now(), -1.0

    def left(self, done: float) -> str:
        """``3:05 left``, ``2:03:05 left`` or ``4 days left``; "" until enough work was seen to tell.

        >>> seconds = iter([0.0, 0.0, 60.0, 60.0])
        >>> clock = Clock(lambda: next(seconds))
        >>> clock.left(0.0), clock.left(0.25), clock.left(1.0)
        ('', '3:00 left', '')
        """
        elapsed = self.now() - self.started
        if self.first < 0:
            self.first = done
            self.started += elapsed
            return ""
        share = done - self.first
        if share <= 0 or elapsed < _SOON or done >= 1:
            return ""
        seconds = elapsed / share * (1 - done)
        return f"{_duration(seconds)} left" if seconds < _LONGEST and elapsed > seconds / 500 else ""


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{round(hours / 24)} days"
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


@contextmanager
def show_progress(quiet: bool = False) -> Iterator[Progress]:
    """Shows how far a long run has come: a progress bar on a terminal, else a line now and then; both on stderr."""
    if quiet:
        yield lambda text, done, detail="": None
        return
    from rich.console import Console
    from rich.progress import BarColumn, TextColumn
    from rich.progress import Progress as Bars
    from rich.table import Column

    console, clock = Console(stderr=True), Clock()
    if not console.is_terminal:
        yield _plain(console, clock)
        return
    columns = (
        TextColumn("{task.description}", markup=False, table_column=Column(ratio=1, overflow="fold")),
        BarColumn(bar_width=max(8, min(40, console.width // 5))),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[left]}", table_column=Column(no_wrap=True)),
    )
    with Bars(*columns, console=console, transient=True, expand=True) as bar:
        task = bar.add_task("starting", total=1.0, left="")

        def progress(text: str, done: float, detail: str = "") -> None:
            shown = f"{text}; now {detail}" if detail else text
            bar.update(task, description=shown, completed=done, left=clock.left(done))

        yield progress


def _plain(console: Console, clock: Clock) -> Progress:
    from rich.text import Text

    last: dict[str, Any] = {"text": None, "at": 0.0}

    def progress(text: str, done: float, detail: str = "") -> None:
        left, now = clock.left(done), time.monotonic()
        if text != last["text"] or now - last["at"] > _PLAIN_SECONDS:
            shown = f"{text}; now {detail}" if detail and text == last["text"] else text
            last.update(text=text, at=now)
            console.print(Text(f"{done:4.0%}  {shown}  {left}".rstrip()), soft_wrap=True)

    return progress


def count(number: int, name: str) -> str:
    """``1 seed``, ``3 seeds``."""
    return f"{number} {name}{'' if number == 1 else 's'}"


def over_seeds(seeds: int) -> str:
    """The meaning of the values in a table of estimates; one seed has no interval."""
    return "mean ± 95% interval" if seeds > 1 else "one value each"


def say(text: str, *, indent: str = "", err: bool = False) -> None:
    """Text for people, wrapped to the terminal; lines after the first are indented. In a pipe each stays one line."""
    stream = typer.get_text_stream("stderr" if err else "stdout")
    if stream.isatty():
        text = fill(
            text,
            max(get_terminal_size().columns, 40),
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
        )
    typer.echo(text, err=err)


def print_finding(severity: str, kind: str, messages: Sequence[str], cure: str, *, err: bool = False) -> None:
    """Print one finding with the places where it was found, and its cure."""
    typer.echo(f"{severity:>8}  {kind.replace('_', ' ')}", err=err)
    for message in messages:
        say(f"{'':>8}  - {message}", indent=" " * 12, err=err)
    say(f"{'':>8}  to do: {cure}", indent=" " * 12, err=err)


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]], *, key: int = 1) -> None:
    """A table on stdout; on a narrow terminal several, each with the ``key`` columns that name the rows."""
    from rich.console import Console
    from rich.text import Text

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
    from rich.table import Table
    from rich.text import Text

    table = Table(title_justify="left", header_style="bold")
    for index, heading in enumerate([*headings[:key], *headings[first:last]]):
        table.add_column(Text(heading), justify="left" if index == 0 else "right", no_wrap=True)
    for row in rows:
        table.add_row(*map(Text, [*row[:key], *row[first:last]]))
    return table


def print_json(value: Any) -> None:
    """One JSON value on stdout, as ``write_json`` writes it."""
    print(to_json(value), end="")


def print_settings(settings: Settings, json: bool) -> None:
    """All settings of a run as TOML that reads back as the same, or as JSON."""
    from spectralmoe.training.settings.toml_text import to_toml

    if json:
        print_json(settings.model_dump(mode="json"))
    else:
        typer.echo(to_toml(settings), nl=False)
