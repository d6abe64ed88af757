"""The file of a monitor: one JSON object a line, each written as soon as it is known."""

from __future__ import annotations

import fcntl
import json
from pathlib import Path
from typing import Any, TextIO

from spectralmoe.errors import UserError
from spectralmoe.files import make_folder, write_text

__all__ = ["MonitorLog", "read_monitor"]

FORMAT = 1


def read_monitor(path: str | Path) -> list[dict[str, Any]]:
    """The lines that a ``Monitor`` wrote: "start" first, then "step", "load" and "finding" in the order of the steps.

    A last line that a stopped run left half written is left out.

    Raises:
        UserError: missing or unreadable; not such a file; a broken line before the last.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error})") from error
    *whole, _ = text.split("\n")
    lines = [_parsed(path, number, line) for number, line in enumerate(whole, 1)]
    if not lines or lines[0]["kind"] != "start":
        raise UserError(f"{path} is not the file of a monitor: its first line is no start")
    if lines[0].get("format") != FORMAT:
        raise UserError(f"{path} is of format {lines[0].get('format')}; this version of spectralmoe reads {FORMAT}")
    return lines


class MonitorLog:
    """The file that a monitor writes, one monitor at a time; lines are added to a file that is there.

    Raises:
        UserError: the file is not of a monitor, another one writes it, or its folder cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        make_folder(path.parent)
        self._file: TextIO | None = None
        self._read()

    def begin(self, start: dict[str, Any], first: int | None) -> int:
        """Write the start, and what the file holds of steps before ``first`` (None: all); returns the last of these.

        A run that goes on from a checkpoint does some steps again; their old lines go.

        Raises:
            UserError: the file is of a model with other layers, or another monitor writes it.
        """
        before = self._read()  # again: another one may have gone on with it since
        if before and before[0].get("layers") != start["layers"]:
            raise UserError(f"{self.path} holds the lines of a model with other MoE layers; choose another file")
        kept = [line for line in before[1:] if first is None or line["step"] < first]
        write_text(self.path, "".join(_text(line) for line in (start, *kept)))
        self._file = self.path.open("a", encoding="utf-8")
        _lock(self._file)
        return max((int(line["step"]) for line in kept), default=0)

    def _read(self) -> list[dict[str, Any]]:
        """The lines that are there; refused while another monitor holds the file."""
        if not self.path.is_file() or not self.path.stat().st_size:
            return []
        lines = read_monitor(self.path)
        with self.path.open("r", encoding="utf-8") as file:
            _lock(file)
        return lines

    def write(self, line: dict[str, Any]) -> None:
        """Append ``line``."""
        assert self._file is not None
        try:
            self._file.write(_text(line))
            self._file.flush()
        except OSError as error:
            raise UserError(f"cannot write {self.path}: {error.strerror or error}") from error

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def _lock(file: TextIO) -> None:
    """Hold ``file`` until it is closed."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"another monitor is writing to {file.name}; wait for it or choose another file") from error


def _text(line: dict[str, Any]) -> str:
    return json.dumps(line, allow_nan=False) + "\n"


def _parsed(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        line = json.loads(text)
    except ValueError as error:
        raise UserError(f"{path}, line {number}: not JSON; the file of a monitor has one JSON object a line") from error
    if (
        not isinstance(line, dict)
        or "kind" not in line
        or (line["kind"] != "start" and type(line.get("step")) is not int)
    ):
        raise UserError(f"{path}, line {number}: not a line of a monitor; give the JSON lines that Monitor wrote")
    return line
