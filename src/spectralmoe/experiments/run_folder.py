"""The folder of one run: made by one set of settings, locked by one command at a time, resumed after a stop."""

from __future__ import annotations

import fcntl
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TextIO

from spectralmoe.errors import UserError
from spectralmoe.files import locked, make_folder, remove_parts
from spectralmoe.json_files import dotted, read_json, write_json

__all__ = ["run_folder"]

SETTINGS, LOCK, CLAIM = "settings.json", ".lock", ".claim"


@contextmanager
def run_folder(
    out: Path,
    settings: dict[str, Any],
    writes: Sequence[str],
    *,
    grows: Sequence[str] = (),
    adds: Sequence[str] = (),
    shared: bool = False,
) -> Iterator[dict[str, Any]]:
    """Hold ``out`` for a run with ``settings`` that writes the files ``writes``.

    A new folder gets ``settings.json``; one that this run made before is gone on with. Yields the settings of all that
    the folder holds: those given, but for the lists and numbers that have grown. A run that is refused before it has
    written anything leaves the folder to other settings.

    Args:
        grows: settings that may differ between two runs in one folder, since they change no finished cell: lists are
            united, of two numbers the larger one counts.
        adds: settings that a folder may lack, since they change no cell that it holds then; it takes them over.
        shared: whether others that are shared, too, may write there at the same time, as slices of one grid do.

    Raises:
        UserError: ``out`` cannot be written, is in use by another run, was made with other settings, or holds one of
            the files without being the folder of a run.
    """
    make_folder(out)
    with _opened(out / LOCK) as file:
        try:
            fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is writing to {out}; wait for it or choose another --out") from error
        except OSError as error:
            raise UserError(f"cannot lock {out / LOCK}: {error.strerror or error}") from error
        with locked(out / CLAIM) if shared else nullcontext():
            claimed = _claim(out, settings, writes, grows, adds)
        remove_parts(out)
        try:
            yield claimed
        except UserError:
            if {path.name for path in out.iterdir()} <= {SETTINGS, LOCK}:
                (out / SETTINGS).unlink()
            raise


def _opened(path: Path) -> TextIO:
    try:
        return path.open("a+")  # some file systems lock only what is open for reading and for writing
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from error


def _claim(
    out: Path, settings: dict[str, Any], writes: Sequence[str], grows: Sequence[str], adds: Sequence[str]
) -> dict[str, Any]:
    if not (out / SETTINGS).exists():
        for name in writes:
            if (out / name).exists():
                raise UserError(
                    f"{out / name} is there already and was not written by this command; choose another --out"
                )
        write_json(out / SETTINGS, settings)
        return settings
    stored = found = read_json(out / SETTINGS)
    if isinstance(stored, dict):
        stored = {**{key: settings[key] for key in adds}, **stored}
    if not isinstance(stored, dict) or not _same_keys(stored, settings):
        raise UserError(f"{out / SETTINGS} is not from a run of this command; choose another --out")
    old, new = (dotted({key: value for key, value in one.items() if key not in grows}) for one in (stored, settings))
    for key in sorted(new.keys() | old.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{out} holds a run with {key} = {old.get(key)}, not {new.get(key)}; "
                "go on with the same settings or choose another --out"
            )
    grown = {**settings, **{key: _united(stored.get(key), settings[key], out / SETTINGS) for key in grows}}
    if grown != found:
        write_json(out / SETTINGS, grown)
    return grown


def _united(old: Any, new: Any, path: Path) -> Any:
    """Both lists without repeats, the old one first; the larger of two numbers."""
    if isinstance(old, list) and isinstance(new, list):
        return [*old, *(item for item in new if item not in old)]
    if isinstance(old, int) and isinstance(new, int):
        return max(old, new)
    raise UserError(f"{path} is not from a run of this command; choose another --out")


def _same_keys(stored: dict[str, Any], settings: dict[str, Any]) -> bool:
    """Whether both are settings of one command; an option of a later version is None for a run of an earlier one."""
    return all({**stored, **settings}[key] is None for key in stored.keys() ^ settings.keys())
