"""Folders that plain transformers loads: written whole, or not at all."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError, first_line
from spectralmoe.files import make_folder, part_folder
from spectralmoe.hf.load import quiet

__all__ = ["make_new_folder", "save_stock"]


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
    try:
        with quiet(), part_folder(folder.parent) as part:
            for each in filter(None, (model, tokenizer)):
                each.save_pretrained(part / folder.name)
            (part / folder.name).replace(folder)
    except Exception as error:
        if not isinstance(error, OSError) and type(error).__name__ != "SafetensorError":
            raise
        raise UserError(f"cannot write {folder}: {first_line(error)}") from error
