"""Where text comes from: what Python and Debian ship, files and folders; each a list of documents with a domain."""

from __future__ import annotations

import codecs
import re
import sysconfig
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from spectralmoe.data.hub_data import column_of, open_hub, split_name, title_of
from spectralmoe.data.image_files import named
from spectralmoe.data.sources import files_below, one_line, subfolders
from spectralmoe.errors import UserError, one_of

__all__ = ["HUB_OPTIONS", "TEXTS", "Document", "Source", "decoded", "read_hub_text", "read_path", "read_text"]

HUB_OPTIONS = ("config", "split", "text")
"""Options after ``text:hf:NAME``."""

FORTUNES_SYSTEM = Path("/usr/share/games/fortunes")

FEW, SECTION = 100, 2048


class Document(NamedTuple):
    """A text that belongs together, and the domain that it is of."""

    domain: str
    text: str


class Source(NamedTuple):
    """Documents, and notes on how they were read, a line each."""

    documents: list[Document]
    notes: tuple[str, ...] = ()


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, without a byte order mark.

    Raises:
        UserError: it cannot be read; as ``decoded``.
    """
    with one_line(f"cannot read {str(path)!r}"):
        content = path.read_bytes()
    return decoded(content, repr(str(path)))


def decoded(content: bytes, name: str) -> str:
    """Text from bytes in UTF-8, without a byte order mark.

    Args:
        name: of what was read, for errors.

    Raises:
        UserError: it is empty, or no text: of another encoding by its first bytes, or with a NUL byte or bytes that are
            not UTF-8.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    if not content.strip():
        raise UserError(f"{name} is empty")
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"{name} is UTF-16 or UTF-32 text by its first bytes; save it as UTF-8")
    if (nul := content.find(0)) >= 0:
        raise UserError(f"{name} is not text: byte {nul} is NUL")
    try:
        return content.decode()
    except UnicodeDecodeError as error:
        wrong = f"byte {error.start} is {content[error.start]:#04x}"
        raise UserError(f"{name} is not UTF-8 text: {wrong}; save it as UTF-8") from error


def read_pydoc(_data_dir: Path | None = None) -> Source:
    """Help topics of the running Python (``pydoc_data.topics``), about 0.5 MB; always there."""
    topics: dict[str, str] = import_module("pydoc_data.topics").topics
    return Source(_documents("pydoc", [topics[topic] for topic in sorted(topics)]))


def read_stdlib(_data_dir: Path | None = None) -> Source:
    """Source files of the running Python's standard library without its tests, about 11 MB."""
    root = Path(sysconfig.get_path("stdlib"))
    others = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data"}
    files = [path for path in files_below(root) if path.suffix == ".py"]
    files = [path for path in files if not others.intersection(path.relative_to(root).parts)]
    if not files:
        raise UserError(f"text 'stdlib' was not found: {root} has no source files; install Python's, or use text:pydoc")
    return Source(_documents("stdlib", list(_readable(files, root)[0].values())))


def read_fortunes(data_dir: Path | None = None) -> Source:
    """Sayings of Debian's package fortunes, about 2 MB; each is a document, its topic the domain."""
    places = [*([data_dir, data_dir / "fortunes"] if data_dir else []), FORTUNES_SYSTEM]
    folder = next((place for place in places if (place / "fortunes").is_file()), None)
    if folder is None:
        where = " and ".join(map(str, places))
        raise UserError(
            f"text 'fortunes' was not found: looked for a file 'fortunes' in {where}; install it with "
            "'apt-get install fortunes', or name its folder with --data-dir"
        )
    topics = [path for path in files_below(folder) if not path.suffix and not path.is_symlink()]
    texts, _ = _readable(topics, folder)
    sayings = {path.name: re.split(r"(?m)^%\s*\n?", text) for path, text in texts.items()}
    return Source([Document(topic, said) for topic, all_said in sayings.items() for said in all_said if said.strip()])


TEXTS: dict[str, Callable[[Path | None], Source]] = {
    "pydoc": read_pydoc,
    "stdlib": read_stdlib,
    "fortunes": read_fortunes,
}
"""Texts by name; the argument is the folder to look in first."""


def read_path(path: Path) -> Source:
    """The documents of a file, or of a folder, whose subfolders are domains; else the domain is the path's name.

    Each file is a document, or several where a domain has few files (``_documents``). Files of a folder that are empty
    or no text are passed over; ``notes`` says so.

    Raises:
        UserError: there is no such path; as ``read_text`` for a file; a folder without text.
    """
    if path.is_file():
        return Source(_documents(path.stem, [read_text(path)]))
    if not path.is_dir():
        raise UserError(f"text {str(path)!r} does not exist; name a file or a folder, or one of {', '.join(TEXTS)}")
    folders = {folder.name: list(files_below(folder)) for folder in subfolders(path)}
    loose = [file for file in files_below(path) if file.parent == path]
    domains = {name: files for name, files in {path.name: loose, **folders}.items() if files}
    documents, passed_over = [], list[str]()
    for domain, files in domains.items():
        texts, broken = _readable(files, path)
        passed_over += broken
        documents += _documents(domain, list(texts.values()))
    if not documents:
        first = f": {passed_over[0]}" if passed_over else ""
        raise UserError(f"folder {str(path)!r} has no text{first}")
    notes = (f"{path}: passed over: {named(passed_over)}",) if passed_over else ()
    return Source(documents, notes)


def read_hub_text(given: str, data_dir: Path | None = None, download: bool = False) -> Source:
    """The documents of a data set of Hugging Face: a row each, or parts of it where there are few (``_documents``).

    All its splits are read, since a document's part follows from its content; ``split=`` names one. The text is in the
    one column of strings, or in the one called "text"; ``text=`` names another. Rows without text are passed over.

    Args:
        given: what stands after ``hf:``, such as "roneneldan/TinyStories,split=validation".

    Raises:
        UserError: as ``open_hub``; a split or column that is not there, or could be several; no text.
    """
    source, options = split_name(given, HUB_OPTIONS)
    splits = open_hub(source, options.get("config"), data_dir, download)
    if "split" in options and options["split"] not in splits:
        raise one_of(f"split of 'hf:{source}'", options["split"], list(splits))
    chosen = {name: table for name, table in splits.items() if options.get("split", name) == name}
    rows = list[str]()
    for table in chosen.values():
        usual = "text" if "text" in table.features else None
        column = column_of(table, options.get("text", usual), "string", source, "text")
        values = list(table[column])
        if strange := next((value for value in values if not isinstance(value, str | None)), None):
            raise UserError(
                f"'hf:{source}': column {column!r} holds no text, but {type(strange).__name__}; name one by "
                "',text=COLUMN'"
            )
        rows += [value for value in values if value and value.strip()]
    if not rows:
        raise UserError(f"'hf:{source}' has no text in its splits {', '.join(chosen)}")
    note = f"hf:{source}: {len(rows):,} rows with text, of {', '.join(chosen)}; split anew by their content"
    return Source(_documents(title_of(source), rows), (note,))


def _readable(files: Sequence[Path], root: Path) -> tuple[dict[Path, str], list[str]]:
    """The text of each readable file, and notes on the others."""
    texts, broken = {}, []
    for file in files:
        try:
            texts[file] = read_text(file)
        except UserError as error:
            broken.append(str(error).replace(str(file), str(file.relative_to(root))))
    return texts, broken


def _documents(domain: str, texts: Sequence[str]) -> list[Document]:
    """The documents of a domain: its texts, or their sections where it has fewer than ``FEW`` texts."""
    return [Document(domain, part) for text in texts for part in (_sections(text) if len(texts) < FEW else [text])]


def _sections(text: str) -> list[str]:
    """Consecutive pieces of ``text``, cut at blank lines as soon as they have ``SECTION`` characters."""
    pieces, sections = re.split(r"(?<=\n)(?=\s*\n)", text), [""]
    for piece in pieces:
        if len(sections[-1]) >= SECTION:
            sections.append("")
        sections[-1] += piece
    return sections
