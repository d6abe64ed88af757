"""Tables of a Markdown text, and the numbers in them."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

NUMBER = re.compile(r"[-+]?(?:\d+\.?\d*|\.\d+)")


class Row(NamedTuple):
    """One line of a table: heading above it, column title -> field."""

    heading: str
    fields: dict[str, str]


def rows_of(text: str) -> Iterator[Row]:
    """Every line of every table. An empty first field repeats the one above, as it is read."""
    heading, titles, above = "", list[str](), ""
    for line in text.splitlines():
        if line.startswith("#"):
            heading, titles = line.lstrip("# "), []
        elif not line.startswith("|"):
            titles = []
        elif not titles:
            titles = _fields(line)
        elif not set(line) <= set("|- "):
            fields = _fields(line)
            above = fields[0] = fields[0] or above
            yield Row(heading, dict(zip(titles, fields, strict=True)))


def _fields(line: str) -> list[str]:
    return [field.strip() for field in line.strip().strip("|").split("|")]


def plain(field: str) -> str:
    """Without bold and code marks."""
    return field.replace("*", "").replace("`", "")


def numbers(field: str) -> list[str]:
    """The numbers of a field as they are written."""
    return NUMBER.findall(plain(field))


def agrees(written: str, value: float, scale: float = 1.0) -> bool:
    """Whether a written number is ``value`` rounded to the digits that it has."""
    digits = len(written.partition(".")[2])
    return abs(float(written) - scale * value) <= 0.5 * 10.0**-digits + 1e-9
