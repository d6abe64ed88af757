"""Writes files completely or not at all: each is written in a temporary folder beside its place, then renamed."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from spectralmoe.errors import UserError, first_line

__all__ = [
    "exchange",
    "exists",
    "flush",
    "locked",
    "make_folder",
    "part_folder",
    "publish",
    "remove_parts",
    "write_text",
    "write_whole",
    "writing",
]

_PART = ".spectralmoe-part"
_HELD = ".held"  # a file, since network file systems share no locks of folders
_ABSENT = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP}
_SHOWN = 200
_HERE, _RENAME_EXCHANGE = -100, 2  # AT_FDCWD; both of Linux
_CANNOT = {errno.ENOSYS, errno.EINVAL, errno.ENOTSUP, errno.EPERM}  # the last of a sandbox


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Call ``write`` with a temporary path, flush what it wrote to disk, then rename it to ``path``.

    Raises:
        UserError: the disk is full or the folder cannot be written; ``path`` is a folder, a device or a pipe, or no
            path at all. What stood at ``path`` is untouched.
    """
    with writing(path), part_folder(path.parent) as part:
        write(part / path.name)
        publish(part / path.name, path)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn errors of a block that writes ``path`` into a ``UserError`` of one line.

    Raises:
        UserError: as ``write_whole``.
    """
    if exists(path) and not path.is_file():  # a rename would put a file in place of a device
        raise UserError(f"cannot write {path}: it is no regular file")
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error
    except Exception as error:
        if type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"cannot write {path}: {first_line(error)}") from error


@contextmanager
def part_folder(parent: Path) -> Iterator[Path]:
    """Make a folder inside ``parent`` for files that are being written; it is removed when the block ends.

    The block holds a lock on a file in the folder, which the system releases when the process ends. So the folders of
    killed writers can be told from those of running ones, also on other machines that share ``parent``. Those of killed
    writers are removed first.
    """
    for part in parent.glob(f".*{_PART}"):
        _remove_part(part)
    path, handle = _locked_part(parent)
    try:
        yield path
    finally:
        shutil.rmtree(path, ignore_errors=True)
        os.close(handle)


@contextmanager
def locked(file: Path) -> Iterator[None]:
    """Keep other processes out of blocks with the same ``file``, also on other machines that share its folder.

    The file exists while the block runs. If a process is killed, the system releases its lock.

    Raises:
        UserError: the folder cannot be written, or its file system has no locks.
    """
    try:
        while (handle := _hold(file)) is None:
            pass
    except OSError as error:
        raise UserError(f"cannot lock {file}: {error.strerror or error}") from error
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(handle)


def publish(file: Path, path: Path) -> None:
    """Flush ``file`` of a part folder to disk, give it the permissions of a new file and rename it to ``path``."""
    flush(file)
    file.chmod(_mode_of_new_files(file.parent))
    file.replace(path)


def exchange(one: Path, other: Path) -> bool:
    """Swap what stands at two paths in one step; return False, with nothing done, if the system cannot.

    Raises:
        OSError: the system can, and fails.
    """
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None) if sys.platform == "linux" else None
    if rename is None:
        return False
    if not rename(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _RENAME_EXCHANGE):
        return True
    number = ctypes.get_errno()
    if number in _CANNOT:
        return False
    raise OSError(number, os.strerror(number), str(one))


def flush(file: Path) -> None:
    """Flush what was written to ``file`` to disk."""
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())


def exists(path: Path) -> bool:
    """Return whether something stands at ``path``.

    Raises:
        UserError: the path cannot be looked up: its name is too long or holds a null character, or a folder may not be
            entered.
    """
    try:
        path.stat()
    except ValueError as error:
        raise UserError(f"{str(path)!r} is no path: it holds a null character") from error
    except OSError as error:
        if error.errno in _ABSENT:
            return False
        name = str(path) if len(str(path)) <= _SHOWN else f"{str(path)[:_SHOWN]}..."
        raise UserError(f"{name}: {error.strerror or error}") from error
    return True


def write_text(path: Path, text: str) -> None:
    """Write ``text`` whole or not at all; it raises what ``write_whole`` raises."""
    write_whole(path, lambda temporary: temporary.write_text(text, encoding="utf-8", errors="backslashreplace"))


def make_folder(path: Path) -> None:
    """Make the folder ``path`` with its parents, and make sure that it can be written.

    Raises:
        UserError: it is a file, or cannot be written.
    """
    exists(path)  # or why no file system could have it
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
    """Remove the temporary folders that killed processes have left in ``folder`` and below."""
    for part in folder.rglob(f".*{_PART}"):
        _remove_part(part)


def _locked_part(parent: Path) -> tuple[Path, int]:
    """A new part folder and the handle that holds its lock."""
    while True:
        path = Path(tempfile.mkdtemp(prefix=".", suffix=_PART, dir=parent))
        with suppress(FileNotFoundError):  # another process took it for the folder of a killed writer
            handle = _hold(path / _HELD)
            if handle is not None:
                return path, handle


def _hold(file: Path) -> int | None:
    """A handle that holds the lock of ``file``, which is made; None: another process removed the file meanwhile."""
    handle = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with suppress(FileNotFoundError):
        if os.path.samestat(os.fstat(handle), file.stat()):
            return handle
    os.close(handle)
    return None


def _remove_part(part: Path) -> None:
    """Remove ``part`` unless a running process holds it or another user owns it."""
    try:
        handle = os.open(part / _HELD, os.O_RDWR | os.O_CREAT)
    except OSError:
        return
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return
    else:
        shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(handle)


def _mode_of_new_files(folder: Path) -> int:
    """The permissions that the process gives to new files (asking for the umask would change it in all threads)."""
    handle = os.open(folder / ".mode", os.O_CREAT | os.O_WRONLY, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
