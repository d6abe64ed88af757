"""Measured numbers in Markdown, and whether a file of the repository holds them.

Measured is what has a decimal point, a unit or an interval, outside code, formulas and links: "0.53 ±0.06", "12 ms",
"43%", and the first of "8 to 10 ms". Shapes, counts and seeds are no measurements.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from markdown_tables import agrees

NUMBER = r"(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+"
_UNIT = r"%|ms|s|seconds?|minutes?|hours?|[KMG]i?B|dB|bits?|points?|times|million"
_FIGURE = re.compile(
    rf"(?<![\w.^])(?<!\d,)(?<![\w)]-)(?P<sign>[+-]?)(?P<number>{NUMBER})(?![\w^]|\.\d)"
    rf"(?: ±(?P<half>{NUMBER}))?(?P<unit>[ -]?(?:{_UNIT})(?!\w))?"
    rf"(?:\*\*)?(?: \((?P<low>{NUMBER}) to (?P<high>{NUMBER})\))?"
)
_JOINED = re.compile(r" ?(,|,? and|to|or|/) ?")
"""What stands between numbers that share the unit of the last."""
_NO_PROSE = (
    re.compile(r"^ *```.*?^ *```$", re.M | re.S),
    re.compile(r"^(?: {4}|\t)(?! *[-|]).*$", re.M),  # indented code
    re.compile(r"`[^`]*`"),
    re.compile(r"\$\$.*?\$\$|\$[^$\n]+\$", re.S),
    re.compile(r"\]\([^)]*\)|https?://\S+"),
    re.compile(r"\b\d{4}\.\d{5}\b|\b\d{4}-\d\d-\d\d\b"),  # arXiv numbers, dates
    re.compile(r"\b(Python|torch|transformers|Megatron-core|CC[- ]BY|section) \d+\.\d+(\.\d+)?"),
    re.compile(r"\b95 ?%\s+intervals?|\b[Ii]n (16|8) bits|\b16 bits changed"),
)


class Passage(NamedTuple):
    """A paragraph, an item of a list, or a row of a table, in one line.

    Attributes:
        heading: the one above it.
        raw: as it is written.
        text: the same with dots in the place of code, formulas and addresses.
        titles: of the columns, where it is a row.
    """

    heading: str
    raw: str
    text: str
    titles: tuple[str, ...] = ()


class Figure(NamedTuple):
    """A measured number as it is written.

    Attributes:
        number: with its sign.
        beside: its half width, or the ends of its interval.
        unit: "" where none follows.
        start: where it stands in the passage.
    """

    number: str
    beside: tuple[str, ...] = ()
    unit: str = ""
    start: int = 0


class Group(NamedTuple):
    """Numbers of a file that stand together, and those that may stand beside each, as the half width beside a mean."""

    numbers: tuple[float, ...]
    beside: tuple[float, ...] = ()


def prose(page: str) -> str:
    """A page with dots in the place of code, formulas and addresses."""
    for pattern in _NO_PROSE:
        page = pattern.sub(lambda match: re.sub(r"[^\s|]", "·", match[0]), page)
    return page


def passages(page: str) -> Iterator[Passage]:
    """The passages of a page, in order."""
    heading, titles = "", ()
    starts = [0, *(match.end() for match in re.finditer(r"\n\s*\n|\n(?= *[-|#] ?)", page)), len(page)]
    clear = prose(page)
    for start, end in pairwise(starts):
        raw, text = " ".join(page[start:end].split()), " ".join(clear[start:end].split())
        if not raw.startswith("|"):
            titles = ()
            heading = raw.lstrip("# ") if raw.startswith("#") else heading
            yield Passage(heading, raw, text)
        elif not titles:
            titles = tuple(title.strip() for title in raw.strip("|").split("|"))
        else:
            yield Passage(heading, raw, text, titles)


def column(passage: Passage, start: int) -> int:
    """The number of the column that a place of a row is in, from 0."""
    return passage.text.count("|", 0, start) - 1


def figures(text: str) -> list[Figure]:
    """The measured numbers of a passage's text.

    >>> [figure.number for figure in figures("4 experts, 8 to 10 ms; D 64; 0.5 ±0.1 and -1.2")]
    ['8', '10', '0.5', '-1.2']
    >>> figures("1.15 (1.10 to 1.16)")[0].beside
    ('1.10', '1.16')
    """
    found = list(_FIGURE.finditer(text))
    kept = [_figure(match) for match in found]
    for place in range(len(found) - 2, -1, -1):
        joint = _JOINED.fullmatch(text[found[place].end() : found[place + 1].start()])
        own = bool(found[place + 1]["unit"])
        if joint and not kept[place].unit and not (joint[1] == "," and own):  # "a, b and c ms", but not "a, b ms"
            kept[place] = kept[place]._replace(unit=kept[place + 1].unit)
    return [figure for figure in kept if "." in figure.number or figure.beside or figure.unit]


def figure_at(text: str, start: int) -> Figure:
    """The number that starts at a place, measured or not."""
    match = _FIGURE.match(text, start)
    assert match is not None, text[start:]
    return _figure(match)


def _figure(match: re.Match[str]) -> Figure:
    beside = (match["half"],) if match["half"] else (match["low"], match["high"]) if match["low"] else ()
    number = (match["sign"] + match["number"]).replace(",", "")
    return Figure(number, beside, (match["unit"] or "").strip(" -"), match.start())


def groups(path: Path, *parts: str) -> list[Group]:
    """The numbers of a file that stand under all ``parts``.

    Of JSON: where the keys on the way, or texts beside them, hold the parts. Of Markdown: of the lines that hold them,
    with their heading. Of Python: of the lines that hold them. Of other files all numbers of such lines.
    """
    if path.suffix == ".json":
        return list(_entries(_read(path), frozenset(parts)))
    text = path.read_text(encoding="utf-8")
    lines, found = text.splitlines(), list[Group]()
    if path.suffix == ".py":
        nodes = [
            node for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Constant) and _is_number(node.value)
        ]
        return [Group((float(n.value),)) for n in nodes if all(part in lines[n.lineno - 1] for part in parts)]
    heading = ""
    for line in lines:
        heading = line if line.startswith("#") else heading
        if all(part in f"{heading} {line}" for part in parts):
            for one in map(_figure, _FIGURE.finditer(line)):
                found.append(Group((float(one.number),), tuple(map(float, one.beside))))
    return found


@cache
def _read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _entries(node: Any, parts: frozenset[str]) -> Iterator[Group]:
    items = list(node.items()) if isinstance(node, dict) else list(enumerate(node)) if isinstance(node, list) else []
    parts = _without(parts, *(value for _, value in items if isinstance(value, str)))
    own = [(key, float(value)) for key, value in items if _is_number(value)]
    if under := tuple(value for key, value in own if not _without(parts, str(key))):
        yield Group(under, under)
    for key, value in items:
        yield from _entries(value, _without(parts, str(key)))


def _without(parts: frozenset[str], *texts: str) -> frozenset[str]:
    return frozenset(part for part in parts if not any(part in text for text in texts))


SCALES = {
    "%": (1, 100), "point": (1, 100), "points": (1, 100), "ms": (1, 1e3), "MB": (1, 1e-6), "GB": (1, 1e-9),
    "million": (1, 1e-6),
}  # fmt: skip
"""What a stored value is multiplied with where a figure has this unit."""


def stands(figure: Figure, among: Iterable[Group], *, size: bool = False) -> bool:
    """Whether one group holds a figure and what is written beside it, rounded to the digits that it has.

    A figure without a sign may be the size of a negative number unless its interval holds 0, since words say the
    direction; with ``size`` always. One with sign and percent may be a ratio less 1.
    """
    signed = figure.number[0] in "+-"
    lone = len(figure.beside) == 1 and float(figure.number) <= float(figure.beside[0])
    turned = (1,) if signed or (lone and not size) else (1, -1)
    for group in among:
        for scale in SCALES.get(figure.unit, (1,)):
            found = any(agrees(figure.number, turn * value, scale) for value in group.numbers for turn in turned)
            if found and all(any(agrees(b, abs(value), scale) for value in group.beside) for b in figure.beside):
                return True
        if signed and figure.unit == "%" and any(agrees(figure.number, value - 1, 100) for value in group.numbers):
            return True
    return False
