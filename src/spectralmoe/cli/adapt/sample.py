"""The sample that is corrected, and its class, as the command line names them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from spectralmoe.data.image_data import ImageData
from spectralmoe.data.image_files import conversions, read_image
from spectralmoe.errors import UserError
from spectralmoe.training.network import ModelMeta

__all__ = ["Sample", "find_label", "read_place", "sample_in_file", "sample_of_data"]

PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}
_LISTED = 20


@dataclass(frozen=True, slots=True)
class Sample:
    """What is corrected: an image (1, C, H, W), its class, where it comes from, and how it was converted ("": not)."""

    image: Tensor
    label: int
    about: dict[str, Any]
    converted: str = ""


def read_place(text: str) -> tuple[str, int]:
    """The part of the data and the number in it that PART:N names.

    Raises:
        UserError: ``text`` has another form.
    """
    name, _, number = text.partition(":")
    if name not in PARTS or not number.isdecimal():
        raise UserError(f"--sample {text!r} is not a part and a number such as test:43; parts: train, validation, test")
    return PARTS[name], int(number)


def sample_of_data(text: str, label: str | None, data: ImageData, meta: ModelMeta) -> Sample:
    """Sample N of a part of ``data``: ``text`` is PART:N.

    Raises:
        UserError: there is no such sample, or as ``read_place`` and ``find_label``.
    """
    part, index = read_place(text)
    split = getattr(data, part)
    if index >= len(split):
        raise UserError(f"--sample {text}: the {part} part of {data.name} has the samples 0 to {len(split) - 1}")
    y = int(split.labels[index]) if label is None else find_label(label, meta)
    about = {"data": data.name, "part": part, "number": index}
    return Sample(split.images[index : index + 1], y, {"image": None, "sample": about, "converted": None})


def sample_in_file(file: Path, label: str, meta: ModelMeta) -> Sample:
    """The image in ``file``, read as ``predict`` reads it.

    Raises:
        UserError: as ``find_label`` and ``read_image``.
    """
    y = find_label(label, meta)
    image = read_image(file, channels=meta.channels, size=meta.image_size)[None]
    converted = conversions([file], channels=meta.channels, size=meta.image_size)
    return Sample(image, y, {"image": str(file), "sample": None, "converted": converted or None}, converted)


def find_label(text: str, meta: ModelMeta, option: str = "--label") -> int:
    """The number of a class given by its name or its number; a name goes first.

    Raises:
        UserError: neither.
    """
    if text in meta.classes:
        return meta.classes.index(text)
    if text.isdecimal() and int(text) < len(meta.classes):
        return int(text)
    names = ", ".join(meta.classes[:_LISTED]) + (", ..." if len(meta.classes) > _LISTED else "")
    last = len(meta.classes) - 1
    raise UserError(f"{option}: label {text} is neither a class ({names}) nor a class number from 0 to {last}")
