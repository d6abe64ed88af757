"""Image folders: their classes and parts, their images as tensors, and the files that are skipped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from spectralmoe.data.image_files import is_image_name, named, probe, read_image
from spectralmoe.data.sources import entries, files_below, subfolders
from spectralmoe.errors import UserError

__all__ = ["AT_RANDOM", "PARTS", "FolderImages", "common_format", "read_folder", "said_size"]

PARTS = {
    "train": "train",
    "training": "train",
    "val": "validation",
    "valid": "validation",
    "validation": "validation",
    "test": "test",
    "testing": "test",
}
"""Names of folders that hold a part of a data set, whatever their case."""

AT_RANDOM = "split at random into 70% for training, 10% for validation and 20% for testing"
LARGEST_KEPT, RESIZED = 64, (32, 32)


@dataclass(frozen=True, slots=True)
class FolderImages:
    """What an image folder holds, or another collection of images with classes.

    Attributes:
        classes: names of the class subfolders, sorted.
        parts: part -> its images, each (C, H, W), and their labels (N,); "train", "test" and perhaps "validation", or
            "all".
        notes: what a user should know of how the folder was read, a line each.
    """

    classes: tuple[str, ...]
    parts: dict[str, tuple[list[Tensor], Tensor]]
    notes: tuple[str, ...]


def read_folder(root: Path, side: int | None = None) -> FolderImages:
    """Read all images of a folder with a subfolder for each class, or with such subfolders in ``train/`` and ``test/``.

    A class has all images below its subfolder. Files that cannot be read are passed over, and ``notes`` says so.
    Images are RGB unless all are grey, and 32 x 32 unless all are alike and at most 64 pixels a side, or ``side`` says
    otherwise.

    Raises `UserError` when ``root`` is no folder, has fewer than two classes, only some of its parts, or no image that
    can be read.
    """
    if not root.is_dir():
        raise UserError(f"image folder {str(root)!r} {'is not a folder' if root.exists() else 'does not exist'}")
    folders = _part_folders(root)
    classes = _classes(root, folders)
    files, strangers = _files_of_classes(folders, classes)
    formats, broken = _formats(file for part in files.values() for file, _ in part)
    if not formats:
        first = f": {next(iter(broken.values()))}" if broken else ""
        raise UserError(f"image folder {str(root)!r} has no image that can be read{first}")
    channels, size = common_format(list(formats.values()), side)
    parts: dict[str, tuple[list[Tensor], Tensor]] = {}
    for part, listed in files.items():
        images, labels = [], []
        for file, label in listed:
            if file not in broken:
                try:
                    images.append(read_image(file, channels=channels, size=size))
                    labels.append(label)
                except UserError as error:
                    broken[file] = str(error)
        parts[part] = images, torch.tensor(labels, dtype=torch.int64)
    count = _count(sum(len(images) for images, _ in parts.values()), "image")
    stored_size = said_size(size, [stored for _, stored in formats.values()], chosen=side is not None)
    colour = "grey" if channels == 1 else "colour"
    summary = f"{count} of {len(classes)} classes, {_said_parts(folders)}, read as {stored_size}, {colour}"
    return FolderImages(classes, parts, (summary, *_passed_over(root, folders, strangers, broken)))


def _part_folders(root: Path) -> dict[str, Path]:
    """Part -> its folder: the named parts of ``root``, or "all"."""
    folders = [folder for folder in subfolders(root) if folder.name.lower() in PARTS and subfolders(folder)]
    parts: dict[str, Path] = {}
    for folder in folders:
        part = PARTS[folder.name.lower()]
        if part in parts:
            raise UserError(
                f"image folder {str(root)!r} has both {parts[part].name}/ and {folder.name}/; keep one of them"
            )
        parts[part] = folder
    for needed in ("train", "test"):
        if parts and needed not in parts:
            there = ", ".join(f"{folder.name}/" for folder in folders)
            raise UserError(
                f"image folder {str(root)!r} has {there} but no {needed}/ with class subfolders; add one, or rename "
                "the folder that is to serve as it"
            )
    return parts or {"all": root}


def _classes(root: Path, folders: dict[str, Path]) -> tuple[str, ...]:
    classes = sorted({folder.name for part in folders.values() for folder in subfolders(part)})
    if not classes:
        raise UserError(f"image folder {str(root)!r} has no class subfolders; put the images of each class in one")
    if len(classes) == 1:
        raise UserError(f"image folder {str(root)!r} has only one class, {classes[0]!r}; at least two are needed")
    return tuple(classes)


def _files_of_classes(
    folders: dict[str, Path], classes: Sequence[str]
) -> tuple[dict[str, list[tuple[Path, int]]], list[Path]]:
    """Part -> its image files with their labels; and the files of class folders that are no images."""
    files: dict[str, list[tuple[Path, int]]] = {part: [] for part in folders}
    strangers = []
    for part, folder in folders.items():
        for label, name in enumerate(classes):
            for file in files_below(folder / name) if (folder / name).is_dir() else ():
                if is_image_name(file):
                    files[part].append((file, label))
                else:
                    strangers.append(file)
    return files, strangers


def _formats(files: Iterable[Path]) -> tuple[dict[Path, tuple[int, tuple[int, int]]], dict[Path, str]]:
    """The channels and size of each file; and of those that cannot be read the reason."""
    formats: dict[Path, tuple[int, tuple[int, int]]] = {}
    broken: dict[Path, str] = {}
    for file in files:
        try:
            formats[file] = probe(file)
        except UserError as error:
            broken[file] = str(error)
    return formats, broken


def common_format(formats: Sequence[tuple[int, tuple[int, int]]], side: int | None) -> tuple[int, tuple[int, int]]:
    """The channels and the size (H, W) to read files of these formats with."""
    channels, sizes = zip(*formats, strict=True)
    if side is not None:
        return max(channels), (side, side)
    kept = len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_KEPT
    return max(channels), sizes[0] if kept else RESIZED


def _said_parts(folders: dict[str, Path]) -> str:
    if "all" in folders:
        return AT_RANDOM
    order = [part for part in ("train", "validation", "test") if part in folders]
    said = ", ".join(f"{folders[part].name}/ for {part}" for part in order)
    return f"split by its folders: {said}" + ("" if "validation" in folders else " (an eighth of it for validation)")


def said_size(size: tuple[int, int], stored: Sequence[tuple[int, int]], *, chosen: bool) -> str:
    """The size, the stored ones where they differ, and where to choose another if nobody chose this one."""
    if set(stored) <= {size}:
        return f"{size[0]} x {size[1]}"
    low, high = (f"{height} x {width}" for height, width in (min(stored), max(stored)))
    sizes = low if low == high else f"{low} to {high}"
    cure = "" if chosen else "; image_size in the settings or --image-size chooses another"
    return f"{size[0]} x {size[1]} (stored: {sizes}{cure})"


def _passed_over(
    root: Path, folders: dict[str, Path], strangers: Sequence[Path], broken: dict[Path, str]
) -> Iterator[str]:
    """A line for each kind of file or folder that is skipped."""
    if broken:
        reasons = [error.replace(str(file), str(file.relative_to(root))) for file, error in sorted(broken.items())]
        yield f"passed over: {_count(len(broken), 'image')} ({named(reasons)})"
    if strangers:
        names = named([file.relative_to(root) for file in sorted(strangers)])
        yield f"passed over: {_count(len(strangers), 'file')} without the name of an image ({names})"
    places = {root, *folders.values()}
    loose = [path for place in places for path in entries(place) if not path.is_dir() and is_image_name(path)]
    if loose:
        names = named([file.relative_to(root) for file in sorted(loose)])
        yield f"passed over: {_count(len(loose), 'image')} in no class folder ({names})"
    others = [] if "all" in folders else [path for path in subfolders(root) if path not in folders.values()]
    if others:
        names = named([f"{path.name}/" for path in others])
        yield f"passed over: {_count(len(others), 'folder')} beside the parts ({names})"


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"
