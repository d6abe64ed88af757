"""Images and their classes from a data set of Hugging Face, with the splits that it has."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralmoe.data.hub_data import column_of, open_hub, split_name, whole_name
from spectralmoe.data.image_files import convert, format_of
from spectralmoe.data.image_folders import AT_RANDOM, PARTS, FolderImages, common_format, said_size
from spectralmoe.data.sources import one_line
from spectralmoe.errors import UserError, one_of

__all__ = ["read_hub_images"]

NAMED = ("train", "validation", "test")


def read_hub_images(
    given: str, data_dir: Path | None = None, download: bool = False, side: int | None = None
) -> tuple[str, FolderImages]:
    """The whole name of an image classification data set, and its images.

    A split belongs to the part that its name says ("val" to validation); ``train=``, ``validation=`` and ``test=`` name
    others. Of one split alone the parts are cut. The column of images is the one of type Image, that of classes the
    one of type ClassLabel; ``image=`` and ``label=`` name others, of classes also one of plain values.

    Args:
        given: what stands after ``hf:``, such as "uoft-cs/cifar100,label=fine_label".

    Raises:
        UserError: as ``open_hub``; columns or splits that are not there or could be several; images without a class.
    """
    source, options = split_name(given, ("config", "image", "label", *NAMED))
    tables = _by_part(open_hub(source, options.get("config"), data_dir, download), options, source)
    name = f"hf:{whole_name(source, options)}"
    first = next(iter(tables.values()))[1]
    image = column_of(first, options.get("image"), "Image", source, "image")
    label = column_of(first, options.get("label"), "ClassLabel", source, "label")
    classes, labels = _labels({part: table for part, (_, table) in tables.items()}, label, source)
    formats = [format_of(picture) for _, table in tables.values() for picture in _pictures(table, image, source)]
    channels, size = common_format(formats, side)
    parts = {
        part: (
            [convert(x, channels=channels, size=size, name=name) for x in _pictures(table, image, source)],
            labels[part],
        )
        for part, (_, table) in tables.items()
    }
    summary = f"{len(formats):,} images of {len(classes)} classes, {_said_splits(tables)}, read as "
    summary += said_size(size, [stored for _, stored in formats], chosen=side is not None)
    return name, FolderImages(classes, parts, (f"{summary}, {'grey' if channels == 1 else 'colour'}",))


def _by_part(splits: Mapping[str, Any], options: Mapping[str, str], source: str) -> dict[str, tuple[str, Any]]:
    """Part -> its split and table; "all" where there is one split and no option names another."""
    chosen = {part: options[part] for part in NAMED if part in options}
    for split in chosen.values():
        if split not in splits:
            raise one_of(f"split of 'hf:{source}'", split, list(splits))
    if len(splits) == 1 and not chosen:
        return {"all": next(iter(splits.items()))}
    for split in splits:
        part = PARTS.get(split.lower())
        if part is not None and part not in options and split not in chosen.values():
            if part in chosen:
                raise UserError(f"'hf:{source}' has splits {chosen[part]} and {split}; name one by ',{part}=SPLIT'")
            chosen[part] = split
    for part in ("train", "test"):
        if part not in chosen:
            raise UserError(f"'hf:{source}' has no split for {part}; name one by ',{part}=SPLIT': {', '.join(splits)}")
    if len(set(chosen.values())) < len(chosen):
        raise UserError(f"'hf:{source}': one split cannot be two parts: {', '.join(chosen.values())}; name another")
    return {part: (chosen[part], splits[chosen[part]]) for part in NAMED if part in chosen}


def _said_splits(tables: Mapping[str, tuple[str, Any]]) -> str:
    if "all" in tables:
        return AT_RANDOM
    said = ", ".join(f"{split} for {part}" for part, (split, _) in tables.items())
    return f"split as they come: {said}" + ("" if "validation" in tables else " (an eighth of train for validation)")


def _labels(tables: Mapping[str, Any], column: str, source: str) -> tuple[tuple[str, ...], dict[str, Tensor]]:
    """The names of the classes, and part -> labels (N,)."""
    feature = next(iter(tables.values())).features[column]
    if type(feature).__name__ not in ("ClassLabel", "Value"):
        raise UserError(
            f"'hf:{source}': column {column!r} holds no classes, but {feature}; name one by ',label=COLUMN'"
        )
    values = {part: list(table[column]) for part, table in tables.items()}
    there = set[Any]().union(*values.values())
    names = getattr(feature, "names", None)
    missing = sorted(part for part, given in values.items() if None in given or (names and -1 in given))
    if missing:
        raise UserError(
            f"'hf:{source}' has images without a class for {missing[0]}; name another split by ',{missing[0]}=SPLIT'"
        )
    if not names:
        places = {value: place for place, value in enumerate(sorted(there))}
        names, values = list(map(str, places)), {k: [places[x] for x in given] for k, given in values.items()}
    if len(names) < 2:
        raise UserError(f"'hf:{source}' has only one class, {names[0]!r}; at least two are needed")
    return tuple(names), {part: torch.tensor(given, dtype=torch.int64) for part, given in values.items()}


def _pictures(table: Any, column: str, source: str) -> Iterator[Any]:
    """The images of Pillow, one at a time."""
    if type(table.features[column]).__name__ != "Image":
        raise UserError(
            f"'hf:{source}': column {column!r} holds no images, but {table.features[column]}; name one by "
            "',image=COLUMN'"
        )
    rows = table.select_columns([column])
    for row in range(len(rows)):
        with one_line(f"cannot read image {row} of 'hf:{source}'"):
            picture = rows[row][column]
        if picture is None:
            raise UserError(f"'hf:{source}' has no image in row {row}")
        yield picture
