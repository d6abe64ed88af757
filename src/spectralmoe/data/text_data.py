"""Text by name, split once and for all into training, validation and test documents.

A document's part depends on its content alone, so it is in the same part whatever it is read with.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from spectralmoe.data.hub_data import split_name, title_of, whole_name
from spectralmoe.data.text_sources import HUB_OPTIONS, TEXTS, Document, Source, read_hub_text, read_path
from spectralmoe.errors import UserError, one_of

__all__ = ["TEXT_PARTS", "TextData", "TextPart", "load_text", "part_of", "read_named_text"]

HUB = "hf:"
TextPart = Literal["train", "validation", "test"]
TEXT_PARTS: tuple[TextPart, ...] = ("train", "validation", "test")


@dataclass(frozen=True, slots=True)
class TextData:
    """Documents in three disjoint parts; ``notes`` says how they were read.

    Attributes:
        name: "text:" and what ``load_text`` reads, whatever the current folder is then.
        domains: names of the domains, sorted.
        parts: part -> its documents, domain by domain.

    >>> data = load_text("pydoc")
    >>> data.domains, len(data.parts["train"]) > len(data.parts["test"]) > 0
    (('pydoc',), True)
    """

    name: str
    domains: tuple[str, ...]
    parts: Mapping[TextPart, Sequence[Document]]
    notes: tuple[str, ...] = ()


def load_text(name: str, data_dir: Path | None = None, download: bool = False) -> TextData:
    """Load text by a name of ``TEXTS``, a file or a folder (``read_path``), ``hf:NAME``, or several joined by "+".

    ``hf:NAME`` is a data set of the Hugging Face hub, or a folder that ``datasets`` reads (``read_hub_text``); of the
    hub it is fetched only with ``download``.

    A single text has domains of its own (the topics of "fortunes", the subfolders of a folder); of several that are
    joined each is one domain. About eight of ten documents are for training, one for validation and one for testing. A
    document that occurs twice is taken once.

    Raises:
        UserError: an unknown name; text that cannot be had or read; too few documents to fill all parts.
    """
    documents, notes = read_named_text(name, data_dir, download)
    parts: dict[TextPart, list[Document]] = {part: [] for part in TEXT_PARTS}
    once: dict[str, Document] = {}
    for document in documents:
        once.setdefault(document.text, document)
    for document in sorted(once.values(), key=lambda document: document.domain):
        parts[part_of(document.text)].append(document)
    domains = tuple(sorted({document.domain for document in once.values()}))
    for part in TEXT_PARTS:
        if not parts[part]:
            raise UserError(
                f"text {name!r} has too few documents: none of its {len(once)} falls into the {part} part; about "
                "30 fill all parts"
            )
    whole = "+".join(_names(each)[1] for each in _joined(name))
    return TextData(f"text:{whole}", domains, parts, notes)


def read_named_text(name: str, data_dir: Path | None = None, download: bool = False) -> Source:
    """All documents of a text by the name that ``load_text`` reads, each with its domain.

    Raises:
        UserError: an unknown name; text that cannot be had or read; a domain that is named twice.
    """
    if not name:
        raise one_of("text", name, [*TEXTS, "PATH", "hf:NAME"])
    names = _joined(name)
    sources = [_read(each, data_dir, download) for each in names]
    if len(names) == 1:
        return sources[0]
    titles = [_names(each)[0] for each in names]
    if len(set(titles)) < len(titles):
        raise UserError(f"text {name!r} names a domain twice: {', '.join(titles)}")
    documents = [
        Document(title, document.text)
        for title, source in zip(titles, sources, strict=True)
        for document in source.documents
    ]
    return Source(documents, tuple(note for source in sources for note in source.notes))


def part_of(text: str) -> TextPart:
    """The part that a document belongs to, by a digest of its content.

    >>> [part_of(text) for text in ("b", "a", "q")]
    ['train', 'validation', 'test']
    """
    tenth = int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") % 10
    return "validation" if tenth == 0 else "test" if tenth == 1 else "train"


def _joined(name: str) -> list[str]:
    """The texts that a name joins by "+"."""
    return [name] if name in TEXTS or Path(name).expanduser().exists() else name.split("+")


def _names(name: str) -> tuple[str, str]:
    """The title of a text as a domain, and its name, which does not depend on the current folder."""
    if name in TEXTS:
        return name, name
    if name.startswith(HUB):
        source, options = split_name(name.removeprefix(HUB), HUB_OPTIONS)
        return title_of(source), HUB + whole_name(source, options)
    return Path(name).stem, str(Path(name).expanduser().resolve())


def _read(name: str, data_dir: Path | None, download: bool) -> Source:
    folder = data_dir and data_dir.expanduser()
    if name in TEXTS:
        return TEXTS[name](folder)
    if name.startswith(HUB):
        return read_hub_text(name.removeprefix(HUB), folder, download)
    path = Path(name).expanduser()
    if not path.exists() and len(path.parts) < 2 and not path.suffix:
        raise one_of("text", name, [*TEXTS, "PATH", "hf:NAME"])
    return read_path(path)
