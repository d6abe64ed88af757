"""Text that verbs train on or run: files, folders, and texts by name, as documents of domains."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from spectralmoe.data.text_sources import TEXTS, Source, read_path
from spectralmoe.errors import UserError

__all__ = ["read_domains"]


def read_domains(names: Sequence[str]) -> tuple[dict[str, list[str]], list[str]]:
    """Domain -> its documents, and notes on how they were read.

    Alone a text has the domains of its own, such as a folder's subfolders; of several each is one domain, called after
    its file or folder, or by the whole path where two would have one name.

    Args:
        names: files, folders and ``text:NAME``, such as "text:pydoc".

    Raises:
        UserError: no names; as ``read_path``.
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
    known = name.removeprefix("text:")
    return TEXTS[known](None) if name != known and known in TEXTS else read_path(Path(name).expanduser())
