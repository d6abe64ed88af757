"""Image files and image folders: what is in them, and one image as a tensor."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from types import ModuleType

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from spectralmoe.errors import UserError
from spectralmoe.training.sources import INSTALL, one_line

__all__ = ["common_format", "probe", "read_image", "scan_folder"]

SUFFIXES = {".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".npy"}
PARTS = {"train": "train", "val": "validation", "validation": "validation", "test": "test"}
LARGEST_KEPT, RESIZED = 64, (32, 32)
LUMA = (0.299, 0.587, 0.114)


def read_image(path: Path, *, channels: int, size: tuple[int, int]) -> Tensor:
    """Read one image as a float32 tensor (channels, H, W) in [0, 1] with (H, W) = ``size``.

    ``path`` is a file that Pillow reads (the first frame, without its transparency) or a ``.npy`` array of shape
    (H, W), (H, W, 1) or (H, W, 3): integers from 0 to 255 or floats from 0 to 1. Grey and RGB are converted into
    each other as ``channels`` (1 or 3) asks; another size is reached by bilinear, antialiased resizing.

    Raises `UserError`, naming the file, when it is missing, broken, or holds pixels that are not finite or out of
    range, and when Pillow is needed but not installed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "white.npy")
    >>> np.save(path, np.ones((8, 8)))
    >>> image = read_image(path, channels=3, size=(4, 4))
    >>> image.shape, image.min().item()
    (torch.Size([3, 4, 4]), 1.0)
    """
    if channels not in (1, 3):
        raise UserError(f"channels must be 1 (grey) or 3 (RGB), got {channels}")
    path = Path(path)
    image = _pixels(path)
    if channels == 1 < len(image):
        image = torch.tensordot(torch.tensor(LUMA), image, dims=1).unsqueeze(0)
    if image.shape[1:] != size:
        image = functional.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)
    return image.clamp(0, 1).expand(channels, *size).contiguous()


def probe(path: Path) -> tuple[int, tuple[int, int]]:
    """The channels (1 for grey, else 3) and the size (H, W) of an image file, from its header alone."""
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        return (3 if array.shape[2:] == (3,) else 1), (array.shape[0], array.shape[1])
    pillow = _pillow(path)
    with one_line(f"cannot read {str(path)!r}"), pillow.open(path) as image:
        return (1 if _is_grey(image.mode) else 3), (image.height, image.width)


def common_format(paths: Iterable[Path]) -> tuple[int, tuple[int, int]]:
    """The channels and the size (H, W) to read these files with: 1 if all are grey, their size if alike and small."""
    channels, sizes = zip(*map(probe, paths), strict=True)
    kept = len(set(sizes)) == 1 and max(sizes[0]) <= LARGEST_KEPT
    return max(channels), sizes[0] if kept else RESIZED


def scan_folder(root: Path) -> tuple[tuple[str, ...], dict[str, list[list[Path]]]]:
    """Find the classes of an image folder and, for each part, the sorted image files of each class.

    The parts are ``train``, ``test`` and perhaps ``validation`` where ``root`` has such folders of class subfolders,
    otherwise the single part ``all``. Whatever else lies there, and hidden files, are passed over.

    Raises `UserError` when ``root`` is no folder, or has fewer than two classes, or only some of its parts.
    """
    if not root.is_dir():
        raise UserError(f"image folder {str(root)!r} {'is not a folder' if root.exists() else 'does not exist'}")
    parts = _part_folders(root)
    classes = sorted({folder.name for part in parts.values() for folder in _subfolders(part)})
    if not classes:
        raise UserError(f"image folder {str(root)!r} has no class subfolders; put the images of each class in one")
    if len(classes) == 1:
        raise UserError(f"image folder {str(root)!r} has only one class, {classes[0]!r}; at least two are needed")
    return tuple(classes), {part: [_images(folder / name) for name in classes] for part, folder in parts.items()}


def _part_folders(root: Path) -> dict[str, Path]:
    named = [folder for folder in _subfolders(root) if folder.name in PARTS and _subfolders(folder)]
    parts = {PARTS[folder.name]: folder for folder in named}
    if len(parts) < len(named):
        raise UserError(f"image folder {str(root)!r} has both val/ and validation/; keep one of them")
    for needed in ("train", "test"):
        if parts and needed not in parts:
            there = ", ".join(f"{folder.name}/" for folder in named)
            raise UserError(f"image folder {str(root)!r} has {there} but no {needed}/ with class subfolders")
    return parts or {"all": root}


def _entries(folder: Path) -> list[Path]:
    with one_line(f"cannot list {str(folder)!r}"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def _subfolders(folder: Path) -> list[Path]:
    return [path for path in _entries(folder) if path.is_dir()]


def _images(folder: Path) -> list[Path]:
    if not folder.is_dir():
        return []
    return [path for path in _entries(folder) if path.suffix.lower() in SUFFIXES and not path.is_dir()]


def _pixels(path: Path) -> Tensor:
    """The image as it is stored: float32 (1 or 3, H, W) in [0, 1]."""
    array, white = _decode(path)
    if not np.isfinite(array).all():
        raise UserError(f"{str(path)!r} has NaN or infinite pixels")
    low, high = array.min(), array.max()
    if low < 0 or high > white:
        raise UserError(f"{str(path)!r} has pixels from {low:.9g} to {high:.9g}; expected 0 to {white}")
    pixels = torch.from_numpy(array.astype(np.float32) / white)
    return pixels.reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _decode(path: Path) -> tuple[npt.NDArray[np.generic], int]:
    """The raw array (H, W) or (H, W, channels) of a file, and its value for white."""
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        return (array, 255) if array.dtype.kind in "iu" else (array, 1)
    pillow = _pillow(path)
    with one_line(f"cannot read {str(path)!r}"), pillow.open(path) as image:
        if image.mode == "F":
            return np.asarray(image), 1
        if image.mode.startswith("I"):
            return np.asarray(image), 65535  # Pillow's own conversion to 8 bits would clip these
        return np.asarray(image.convert("L" if _is_grey(image.mode) else "RGB")), 255


def _read_array(path: Path) -> npt.NDArray[np.generic]:
    with one_line(f"cannot read {str(path)!r}"):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(array, np.ndarray) or array.dtype.kind not in "biuf":
        raise UserError(f"{str(path)!r} is not an array of numbers")
    if array.size == 0 or not (array.ndim == 2 or (array.ndim == 3 and array.shape[2] in (1, 3))):
        raise UserError(f"{str(path)!r} has shape {array.shape}; expected (H, W), (H, W, 1) or (H, W, 3)")
    return array


def _is_grey(mode: str) -> bool:
    return mode in {"1", "L", "LA", "La", "F"} or mode.startswith("I")


def _pillow(path: Path) -> ModuleType:
    """Pillow's module ``Image``, to read ``path`` with."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"reading {str(path)!r} needs Pillow; {INSTALL}") from error
    return Image
