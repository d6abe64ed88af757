"""Folders that plain transformers loads: written whole, or not at all."""

from __future__ import annotations

import errno
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError, first_line
from spectralmoe.files import make_folder, part_folder
from spectralmoe.hf.load import quiet

__all__ = ["make_new_folder", "refuse_unwritten", "save_stock"]


def make_new_folder(folder: Path) -> None:
    """Make ``folder``, and make sure that it can be written and holds nothing.

    Raises:
        UserError: it cannot be written, or holds something.
    """
    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(f"{folder} is not empty; name a new folder for the model")


def save_stock(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write a model of transformers and its tokenizer (None: it has none) to ``folder``, which is new or empty.

    Raises:
        UserError: the folder cannot be written or holds something.
    """
    make_new_folder(folder)
    folder = folder.resolve()
    with refuse_unwritten(folder), quiet(), part_folder(folder.parent) as part:
        for each in filter(None, (model, tokenizer)):
            each.save_pretrained(part / folder.name)
        _put(part / folder.name, folder)


@contextmanager
def refuse_unwritten(folder: Path) -> Iterator[None]:
    """Say in one line why ``folder`` cannot be written.

    Raises:
        UserError: the disk is full, or what else the system or safetensors says.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error


def _put(new: Path, folder: Path) -> None:
    """Put ``new`` in the place of the empty ``folder``: at once, or file by file where that is a mount point."""
    try:
        new.replace(folder)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        for path in sorted(new.iterdir(), key=lambda path: path.name == "config.json"):  # without it there is no model
            shutil.move(path, folder / path.name)
