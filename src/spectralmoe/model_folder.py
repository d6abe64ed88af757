"""Folders with a config and the weights that it describes; a reader always sees both of the same save.

``config.json`` holds the SHA-256 of the weights, and renaming it alone turns the old model into the new one. A save
writes its weights beside the old ones under a name made of their hash, renames ``config.json``, and then gives the
weights their plain name. If a save is killed before the last step, the folder can still be read, and the next save
finishes it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeGuard, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from spectralmoe.digests import sha256_of
from spectralmoe.errors import UserError, first_line
from spectralmoe.files import exists, make_folder, part_folder, publish, writing
from spectralmoe.json_files import read_json, to_json, write_json

__all__ = [
    "CONFIG",
    "PARTS",
    "WEIGHTS",
    "alone",
    "build_checked",
    "fill",
    "is_ours",
    "read_config_of",
    "read_model_folder",
    "refuse_others",
    "weights_file",
    "write_model",
]

Module = TypeVar("Module", bound=nn.Module)

CONFIG, WEIGHTS, PARTS = "config.json", "model.safetensors", "parts.safetensors"
_NAMES = {"spectralmoe": WEIGHTS, "spectralmoe_parts": PARTS, "spectralmoe_ranks": PARTS}
"""The key by which a config names its format -> the file of the weights."""

_COMING = ".spectralmoe-weights"
_TRIES = 100
_PATIENCE = 60.0


def read_config_of(folder: Path, key: str, version: int, content: str) -> dict[str, Any]:
    """Read the ``config.json`` of a folder, which must name its format by ``key`` and ``version``.

    Args:
        content: what such a folder holds, for the error message.

    Raises:
        UserError: the folder has another format, or its weights are missing.
    """
    config = read_json(folder / CONFIG)
    if not isinstance(config, dict) or config.get(key) != version:
        raise UserError(f"{folder} holds no {content} of a spectralmoe model of format {version}")
    if not weights_file(folder, config).is_file():
        raise UserError(f"{folder} lacks {_NAMES[key]}; fetch or save it again")
    return config


def write_model(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    """Write ``tensors``, and ``config`` with their SHA-256, to ``folder`` in place of the model in it.

    Processes that save to the same folder do so one after the other; the last one's model stays.

    Raises:
        UserError: ``config`` holds what JSON cannot; the folder cannot be written, is locked by another process for too
            long, or has a ``config.json`` of another program. The old model then stays, or the new one if only the last
            step failed.
    """
    to_json(config)
    make_folder(folder)
    refuse_others(folder)
    weights = folder / _weights_name(config)
    with writing(weights), part_folder(folder) as part:
        save_file(dict(tensors), part / weights.name)
        digest = sha256_of(part / weights.name)
        with alone(folder) as handle:
            replaced = refuse_others(folder)
            _finish(folder)
            try:
                publish(part / weights.name, _coming(folder, digest))
                _flush(handle)
                write_json(folder / CONFIG, {**config, "sha256": digest})
                _finish(folder)
            finally:
                _finish(folder)  # or take back what an error or an interrupt left half done
            if replaced is not None and _weights_name(replaced) != weights.name:
                (folder / _weights_name(replaced)).unlink(missing_ok=True)


def read_model_folder(
    folder: Path, read_config: Callable[[Path], dict[str, Any]]
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Read the config and the tensors of one save; if another save ends meanwhile, they are read again.

    Args:
        read_config: the function that reads and checks ``config.json``.

    Raises:
        UserError: the weights are not those that the config describes, or no safetensors file; or what ``read_config``
            raises.
    """
    for _ in range(_TRIES):
        before = _state(folder)
        result: tuple[dict[str, Any], dict[str, Tensor]] | UserError
        try:
            config = read_config(folder)
            result = config, _checked_tensors(weights_file(folder, config), config.get("sha256"))
        except UserError as error:
            result = error
        if _state(folder) == before:
            if isinstance(result, UserError):
                raise result
            return result
    raise UserError(f"{folder} is written again and again while it is read; wait until the writer has ended")


def build_checked(make: Callable[[], Module], check: Callable[[Module], object]) -> Module:
    """Return what ``make`` builds by a file, after ``check`` has accepted the same without memory (device "meta").

    So a file cannot ask for more memory than ``check`` lets it. Torch's random generator stays as it was.

    Raises:
        UserError: as ``make`` and ``check``.
    """
    with torch.random.fork_rng(devices=[]):
        with torch.device("meta"):
            shell = make()
        check(shell)
        return make()


def fill(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy ``tensors`` into ``module``, which takes over their dtypes."""
    for name, target in module.state_dict(keep_vars=True).items():
        target.data = target.data.to(tensors[name].dtype)
    module.load_state_dict(tensors)


def weights_file(folder: Path, config: Mapping[str, Any]) -> Path:
    """Return the file of the weights that ``config`` describes: their plain name, or where a killed save left them."""
    digest = config.get("sha256")
    coming = _coming(folder, digest) if isinstance(digest, str) and re.fullmatch("[0-9a-f]{64}", digest) else None
    return coming if coming is not None and coming.is_file() else folder / _weights_name(config)


def is_ours(config: Any) -> TypeGuard[dict[str, Any]]:
    """Return whether a value read from ``config.json`` was written by this library."""
    return isinstance(config, dict) and not _NAMES.keys().isdisjoint(config)


def refuse_others(folder: Path) -> dict[str, Any] | None:
    """Return the ``config.json`` of ``folder``, or None if there is none.

    Raises:
        UserError: it was written by another program, or is not readable.
    """
    if not exists(folder / CONFIG):
        return None
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder / CONFIG} is no regular file; choose another folder")
    config = read_json(folder / CONFIG)
    if not is_ours(config):
        raise UserError(f"{folder / CONFIG} belongs to another program; choose another folder")
    return config


def _weights_name(config: Mapping[str, Any]) -> str:
    return next(name for key, name in _NAMES.items() if key in config)


def _coming(folder: Path, digest: str) -> Path:
    """Where weights wait for ``config.json`` to describe them."""
    return folder / f".{digest}{_COMING}"


def _finish(folder: Path) -> None:
    """Give waiting weights that ``config.json`` describes their plain name, and remove the others."""
    for waiting in folder.glob(f".*{_COMING}"):
        config = refuse_others(folder)
        if config is not None and weights_file(folder, config) == waiting:
            waiting.replace(folder / _weights_name(config))
        else:
            waiting.unlink()


@contextmanager
def alone(folder: Path) -> Iterator[int]:
    """Lock ``folder`` for a ``with`` block and give its file descriptor; the system unlocks it if the process dies."""
    handle, patience_ends = os.open(folder, os.O_RDONLY), time.monotonic() + _PATIENCE
    try:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > patience_ends:
                    raise UserError(
                        f"another process has been saving to {folder} for more than {_PATIENCE:.0f} seconds; end it or "
                        "choose another folder"
                    ) from None
                time.sleep(0.01)
        yield handle
    finally:
        os.close(handle)


def _flush(handle: int) -> None:
    """Flush the names of a folder to disk, where its file system can."""
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise


def _state(folder: Path) -> list[tuple[int, ...] | None]:
    """What changes when one of the files is replaced."""
    stamps: list[tuple[int, ...] | None] = []
    for name in (CONFIG, WEIGHTS, PARTS):
        try:
            stat = (folder / name).stat()
            stamps.append((stat.st_dev, stat.st_ino, stat.st_mtime_ns, stat.st_size))
        except (OSError, ValueError):
            stamps.append(None)
    return stamps


def _checked_tensors(file: Path, digest: Any) -> dict[str, Tensor]:
    try:
        tensors = load_file(file)
        same = sha256_of(file) == digest
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{file} is not a whole safetensors file ({first_line(error)})") from error
    if not same:
        raise UserError(
            f"{file} is not the file that {CONFIG} describes: it was changed, or copied from elsewhere; "
            "save the model again"
        )
    return tensors
