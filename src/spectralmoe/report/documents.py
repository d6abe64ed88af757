"""Find and read the documents of a page; every mistake in a file is one line that names it."""

from __future__ import annotations

import base64
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from spectralmoe.adaptation import Receipt
from spectralmoe.errors import UserError
from spectralmoe.instruments.monitor_log import read_monitor
from spectralmoe.json_files import read_json
from spectralmoe.report.runs import few_shot_comparison
from spectralmoe.report.schema import Inspection
from spectralmoe.report.schema_runs import Comparison, History, Monitor

__all__ = ["Document", "ReceiptFile", "as_document", "read_documents", "tell_apart"]

NAMES = ("inspection.json", "results.json", "fewshot.json", "history.json", "receipt.json")
PICTURE, PICTURE_BYTES = "receipt.svg", 300_000
LARGEST = 1e100
_KINDS = (
    "inspection.json, history.json or a monitor's .jsonl of train, results.json of compare, fewshot.json, "
    "receipt.json of adapt"
)
_RECEIPT: TypeAdapter[Receipt] = TypeAdapter(Receipt)


@dataclass(frozen=True, slots=True)
class ReceiptFile:
    """A receipt with what its file says beside it.

    Attributes:
        title: the corrected sample.
        picture: ``receipt.svg`` as a data: address; None where there is none.
    """

    title: str
    receipt: Receipt
    model: str
    picture: str | None = None


Body = Inspection | Monitor | History | Comparison | ReceiptFile


@dataclass(frozen=True, slots=True)
class Document:
    """One thing to show.

    Attributes:
        kind: "inspection", "monitor", "history", "comparison" (a few-shot run too) or "receipt".
        source: the file, for people.
    """

    kind: str
    source: str
    body: Body


def read_documents(paths: Sequence[Path]) -> list[Document]:
    """The documents in ``paths``: files, or folders that hold them; each file once.

    Raises:
        UserError: a path that is missing, of an unknown kind or broken; a folder without any.
    """
    files = dict.fromkeys(file for path in paths for file in _files(Path(path)))
    return [_read(file) for file in files]


def as_document(value: Any, source: str) -> Document:
    """A JSON value in memory as a document.

    Raises:
        UserError: of an unknown kind, or broken.
    """
    with _checked(source, value):
        return _document(value, source)


def tell_apart(documents: Sequence[Document]) -> list[Document]:
    """The same documents; those of a kind that share a title get their source, or else a number, behind it."""
    titles = Counter((document.kind, document.body.title) for document in documents)
    places = Counter((document.kind, document.body.title, document.source) for document in documents)
    told_apart = []
    for number, document in enumerate(documents, 1):
        kind, body, source = document.kind, document.body, document.source
        if titles[kind, body.title] > 1:
            title = f"{body.title} ({source if places[kind, body.title, source] == 1 else number})"
            named = replace(body, title=title) if isinstance(body, ReceiptFile) else _named(body, title)
            document = replace(document, body=named)
        told_apart.append(document)
    return told_apart


def _named(
    body: Inspection | Monitor | History | Comparison, title: str
) -> Inspection | Monitor | History | Comparison:
    return body.model_copy(update={"title": title})


def _document(value: Any, source: str) -> Document:
    if isinstance(value, dict):
        if value.get("kind") == "inspection":
            if value.get("format") != 1:
                raise UserError(f"{source} has format {value.get('format')!r}, not 1: inspect the model again")
            return Document("inspection", source, Inspection.model_validate({"title": source, **value}))
        if "summary" in value and "cells" in value:
            return Document("comparison", source, _comparison(value, source))
        if "epochs" in value and ("metric" in value or "test_accuracy" in value):
            return Document("history", source, History.model_validate({"title": source, **value}))
        if "touched" in value and "carried_before" in value:
            return Document("receipt", source, _receipt(value, source))
    raise UserError(f"{source} is no document of this library's; a report reads {_KINDS}, or a folder with one")


def _comparison(value: Mapping[str, Any], source: str) -> Comparison:
    settings, summary = value.get("settings"), value["summary"]
    if isinstance(summary, list) and summary and isinstance(summary[0], dict) and "shots" in summary[0]:
        try:
            value = few_shot_comparison(value)
        except (KeyError, TypeError) as error:
            raise UserError(f"{source} is broken: not the file of a few-shot run; write it again") from error
    name = settings.get("data") if isinstance(settings, dict) else None
    return Comparison.model_validate({"title": f"comparison on {name}" if name else source, **value})


def _files(path: Path) -> Iterator[Path]:
    if not path.is_dir():
        yield path
        return
    files = [path / name for name in NAMES if (path / name).is_file()] + sorted(path.glob("*.jsonl"))
    if not files:
        raise UserError(f"{path} holds nothing to report: no {_KINDS}")
    yield from files


def _read(path: Path) -> Document:
    if path.suffix == ".jsonl":
        return Document("monitor", str(path), _monitor(path))
    document = as_document(read_json(path), str(path))
    picture = path.parent / PICTURE
    if isinstance(document.body, ReceiptFile) and picture.is_file() and picture.stat().st_size <= PICTURE_BYTES:
        address = "data:image/svg+xml;base64," + base64.b64encode(picture.read_bytes()).decode()
        body = document.body
        return Document("receipt", str(path), ReceiptFile(body.title, body.receipt, body.model, address))
    return document


def _monitor(path: Path) -> Monitor:
    start, *lines = read_monitor(path)
    by_kind = {kind: [line for line in lines if line["kind"] == kind] for kind in ("step", "load", "finding")}
    findings = [
        {**line["finding"], "step": line["step"]} if isinstance(line["finding"], dict) else line["finding"]
        for line in by_kind["finding"]
        if "finding" in line
    ]
    body = {"title": path.stem, **start, "steps": by_kind["step"], "loads": by_kind["load"], "findings": findings}
    with _checked(str(path), body):
        return Monitor.model_validate(body)


@contextmanager
def _checked(source: str, value: Any) -> Iterator[None]:
    """Numbers that no chart can hold, and what the schema finds wrong, as one line."""
    if not _drawable(value):
        raise UserError(f"{source} is broken: it holds a number beyond {LARGEST:g}")
    try:
        yield
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        text = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{source} is broken: {' '.join(text.split())[:300]}") from error


def _drawable(value: Any) -> bool:
    """Whether sums and products of the numbers in a JSON value stay finite; infinite ones are no data."""
    left = [value]
    while left:
        item = left.pop()
        if isinstance(item, dict):
            left += item.values()
        elif isinstance(item, list | tuple):
            left += item
        elif isinstance(item, int | float) and LARGEST < abs(item) < math.inf:
            return False
    return True


def _receipt(value: Mapping[str, Any], source: str) -> ReceiptFile:
    for part in ("reference", "test"):
        change = side.get("interference") if isinstance(side := value.get(part), dict) else None
        if isinstance(change, dict):  # null: measured on no sample
            change |= {key: math.nan for key in ("mean", "low", "high") if change.get(key) is None}
    receipt = _RECEIPT.validate_python(dict(value))
    moved = [flip for side in (receipt.reference, receipt.test) if side is not None for flip in side.flipped]
    used = {receipt.label, receipt.before.prediction, receipt.after.prediction}
    used |= {number for flip in moved for number in (flip.label, flip.before, flip.after) if number is not None}
    if receipt.classes and not used <= set(range(len(receipt.classes))):
        raise UserError(f"{source} is broken: a class that is not among its {len(receipt.classes)}")
    return ReceiptFile(str(value.get("image") or source), receipt, str(value.get("model") or ""))
