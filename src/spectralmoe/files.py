"""Files that are whole or absent: written under a temporary name, then renamed."""

from __future__ import annotations

import json
import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError

__all__ = ["make_folder", "read_json", "remove_parts", "to_json", "write_json", "write_text", "write_whole"]

_PART = ".spectralmoe-part"


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path beside ``path``, flush it to disk, then rename it into place.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is a folder, a device or a pipe. What
            stood at ``path`` is untouched.
    """
    temporary: Path | None = None
    try:
        if path.exists() and not path.is_file():
            raise OSError("it is no regular file")  # a rename would put a file in place of a device
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=_PART, dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    except Exception as error:
        raise _cannot_write(path, error) from error
    finally:
        if temporary is not None:
            temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Infinite and undefined numbers become null.

    Raises:
        UserError: as ``write_whole`` and ``to_json``.
    """
    write_text(path, to_json(value))


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all; raises as ``write_whole``."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def to_json(value: Any) -> str:
    """``value`` as indented JSON text.

    Raises:
        UserError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"not a value for JSON ({error})") from error


def read_json(path: Path) -> Any:
    """The JSON value in ``path``.

    Raises:
        UserError: missing, unreadable, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({str(error).splitlines()[0]})") from error


def make_folder(path: Path) -> None:
    """Make the folder ``path`` with its parents, and make sure that it can be written.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except FileExistsError as error:
        raise UserError(f"cannot write to {path}: it is a file, not a folder; name a folder") from error
    except NotADirectoryError as error:
        raise UserError(f"cannot write to {path}: a part of its path is a file") from error
    except OSError as error:
        raise UserError(f"cannot write to {path}: {error.strerror or error}") from error


def remove_parts(folder: Path) -> None:
    """Remove what writes that were killed have left below ``folder``."""
    for part in folder.rglob(f".*{_PART}"):
        part.unlink(missing_ok=True)


def _cannot_write(path: Path, error: Exception) -> Exception:
    """A user's error for what the file system refuses; anything else stays what it is."""
    if isinstance(error, OSError):
        return UserError(f"cannot write {path}: {error.strerror or error}")
    if type(error).__name__ == "SafetensorError":
        return UserError(f"cannot write {path}: {error}")
    return error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (not math.isfinite(value)):
        return None
    return value


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
