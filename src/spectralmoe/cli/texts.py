"""Text that verbs train on or run: files, folders, and texts by name, as documents of domains."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from spectralmoe.data.text_data import read_named_text
from spectralmoe.data.text_sources import Document, Source, decoded, read_path
from spectralmoe.errors import UserError

__all__ = ["read_domains"]


def read_domains(names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Domain -> its documents, and notes on how they were read.

    Alone a text has the domains of its own, such as a folder's subfolders; of several each is one domain, called after
    its file or folder, or by the whole path where two would have one name.

    Args:
        names: files, folders, ``text:NAME`` as ``load_text`` reads it, such as "text:pydoc", and "-", standard input.

    Raises:
        UserError: no names; as ``read_path`` and ``read_named_text``.
    """
    if not names:
        raise UserError("there is no text: give a file or a folder with --text")
    sources = [_source(name) for name in names]
    words = [name if name.startswith("text:") else Path(name).stem for name in names]
    domains: dict[str, list[str]] = {}
    for name, word, source in zip(names, words, sources, strict=True):
        for document in source.documents:
            domain = document.domain if len(names) == 1 else word if words.count(word) == 1 else name
            domains.setdefault(domain, []).append(document.text)
    return domains, [note for source in sources for note in source.notes]


def _source(name: str) -> Source:
    if name == "-":
        return Source([Document(name, decoded(sys.stdin.buffer.read() if sys.stdin else b"", "standard input"))])
    if name.startswith("text:"):
        return read_named_text(name.removeprefix("text:"))
    return read_path(Path(name).expanduser())
