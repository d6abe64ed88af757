"""Text files that verbs read: UTF-8, one file or a folder of them a domain."""

from __future__ import annotations

import codecs
import sys
from collections.abc import Sequence
from pathlib import Path

from spectralmoe.errors import UserError

__all__ = ["read_domains", "read_text"]


def read_domains(names: Sequence[str]) -> dict[str, list[str]]:
    """Domain -> its documents, for files and folders, each a domain of its own.

    A domain is called after its file or folder, or by the whole path where two would have one name. Of a folder every
    file is a document, those in its folders too; hidden ones are passed over.

    Args:
        names: paths; "-" is standard input.

    Raises:
        UserError: no names; as ``read_text``; a folder without files, or a domain without a word.
    """
    if not names:
        raise UserError("there is no text: give a file or a folder with --text")
    short = [Path(name).stem if Path(name).is_file() else Path(name).resolve().name for name in names]
    domains: dict[str, list[str]] = {}
    for name, word in zip(names, short, strict=True):
        files = _files(Path(name)) if Path(name).is_dir() else [name]
        documents = [text for file in files if (text := read_text(file)).strip()]
        if not documents:
            raise UserError(f"--text {name} holds no text: there is no word in it")
        domains[word if short.count(word) == 1 else name] = documents
    return domains


def read_text(name: str) -> str:
    """The text in a file, with line ends as ``\\n``; "-" is standard input.

    Raises:
        UserError: there is no such file, or it is no UTF-8 text.
    """
    path = Path(name)
    if name != "-" and path.is_dir():
        raise UserError(f"--text {name} is a folder; name a file, several with --text each")
    if name != "-" and not path.exists():
        raise UserError(f"--text {name}: no such file")
    raw = path.read_bytes() if name != "-" else sys.stdin.buffer.read() if sys.stdin else b""
    if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UserError(f"--text {name} is UTF-16 or UTF-32 text by its first bytes; save it as UTF-8")
    try:
        text = raw.decode("utf-8-sig")  # a byte order mark is no part of the text
    except UnicodeDecodeError as error:
        raise UserError(f"--text {name} is not UTF-8 text (byte {error.start}); save it as UTF-8") from error
    if "\0" in text:
        raise UserError(f"--text {name} is no text: it holds zero bytes")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _files(folder: Path) -> list[str]:
    """All files below ``folder``, but for hidden ones."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return [str(path) for path in paths if not any(part.startswith(".") for part in path.relative_to(folder).parts)]
