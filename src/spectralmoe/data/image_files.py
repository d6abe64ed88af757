"""Image files: what is stored in one, how it is converted, and one image as a tensor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from spectralmoe.data.sources import INSTALL, one_line
from spectralmoe.errors import UserError

__all__ = ["conversions", "convert", "format_of", "is_image_name", "named", "probe", "read_image"]

LUMA = (0.299, 0.587, 0.114)
ORIENTATION, TURNED = 0x0112, (5, 6, 7, 8)
"""The EXIF tag of a camera's position, and its values that swap height and width."""

_LISTED = 3


def read_image(path: Path, *, channels: int, size: tuple[int, int]) -> Tensor:
    """Read one image as a float32 tensor (channels, H, W) in [0, 1] with (H, W) = ``size``.

    ``path`` is a file that Pillow reads or a ``.npy`` array of shape (H, W), (H, W, 1) or (H, W, 3): integers from 0
    to 255 or floats from 0 to 1. An image is read as it is shown: turned upright by its EXIF orientation, transparent
    parts on white, of several frames the first. Grey and RGB are converted into each other as ``channels`` (1 or 3)
    asks; another size is reached by bilinear, antialiased resizing. `conversions` says what of this changes a file.

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
    array, white = _decode(Path(path))
    return _fitted(_pixels(array, white, repr(str(path))), channels, size)


def convert(image: Any, *, channels: int, size: tuple[int, int], name: str) -> Tensor:
    """An image of Pillow as `read_image` reads a file; ``name`` is what an error calls it."""
    return _fitted(_pixels(*_shown(image), name), channels, size)


def format_of(image: Any) -> tuple[int, tuple[int, int]]:
    """The channels (1 for grey, else 3) and the size (H, W) of an upright image of Pillow."""
    return (1 if _is_grey(image.mode) else 3), (image.height, image.width)


def _fitted(image: Tensor, channels: int, size: tuple[int, int]) -> Tensor:
    if channels == 1 < len(image):
        image = torch.tensordot(torch.tensor(LUMA), image, dims=1).unsqueeze(0)
    if image.shape[1:] != size:
        image = functional.interpolate(image.unsqueeze(0), size, mode="bilinear", antialias=True).squeeze(0)
    return image.clamp(0, 1).expand(channels, *size).contiguous()


def probe(path: Path) -> tuple[int, tuple[int, int]]:
    """The channels (1 for grey, else 3) and the size (H, W) of an image file as `read_image` finds them.

    Raises `UserError`, naming the file, when it is missing or broken. Pixels are decoded only where a format hides
    the orientation behind them.
    """
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        return (3 if array.shape[2:] == (3,) else 1), (array.shape[0], array.shape[1])
    with _opened(path) as image:
        turned = image.getexif().get(ORIENTATION) in TURNED
        if turned and image.format == "TIFF":  # it turns itself when it is decoded
            image.load()
            turned = False
        size = (image.width, image.height) if turned else (image.height, image.width)
        return (1 if _is_grey(image.mode) else 3), size


def conversions(files: Sequence[Path], *, channels: int, size: tuple[int, int]) -> str:
    """One line that says which of ``files`` `read_image` converts, from what to what; "" where it converts none.

    Raises `UserError`, naming the file, when one is missing or broken.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp(), "digit.npy")
    >>> np.save(path, np.ones((30, 20, 3)))
    >>> conversions([path], channels=1, size=(28, 28)).replace(str(path), "digit.npy")
    'read as 28 x 28 pixels (height x width), grey: digit.npy (30 x 20, colour)'
    >>> conversions([path], channels=3, size=(30, 20))
    ''
    """
    changed = []
    for file in files:
        stored_channels, (height, width) = probe(file)
        flattened = _flattened(file)
        if (stored_channels, (height, width)) != (channels, size) or flattened:
            changed.append(f"{file} ({', '.join([f'{height} x {width}', _colour(stored_channels), *flattened])})")
    if not changed:
        return ""
    return f"read as {size[0]} x {size[1]} pixels (height x width), {_colour(channels)}: {named(changed)}"


def named(names: Sequence[object]) -> str:
    """The first three of ``names``, and how many more there are.

    >>> named(["a", "b", "c", "d", "e"])
    'a, b, c and 2 more'
    """
    more = f" and {len(names) - _LISTED} more" if len(names) > _LISTED else ""
    return ", ".join(map(str, names[:_LISTED])) + more


def is_image_name(path: Path) -> bool:
    """Whether a file of this name can hold an image: a ``.npy`` array, or a format that the installed Pillow reads.

    Raises `UserError` when Pillow is needed but not installed.
    """
    suffix = path.suffix.lower()
    if suffix == ".npy":
        return True
    pillow = _pillow(path)
    return bool(suffix) and pillow.registered_extensions().get(suffix) in pillow.OPEN


def _colour(channels: int) -> str:
    return "grey" if channels == 1 else "colour"


def _flattened(path: Path) -> list[str]:
    """The parts of an image that reading drops or replaces: further frames, transparency."""
    if path.suffix.lower() == ".npy":
        return []
    with _opened(path) as image:
        frames = ["the first of several frames"] if getattr(image, "is_animated", False) else []
        transparent = _has_opacity(image) and bool((_colours_and_opacity(image)[1] < 1).any())
        return frames + (["transparent parts on white"] if transparent else [])


def _pixels(array: npt.NDArray[np.generic], white: int, name: str) -> Tensor:
    """The image as it is stored: float32 (1 or 3, H, W) in [0, 1]."""
    if not np.isfinite(array).all():
        raise UserError(f"{name} has NaN or infinite pixels")
    low, high = array.min(), array.max()
    if low < 0 or high > white:
        raise UserError(f"{name} has pixels from {low:.9g} to {high:.9g}; expected 0 to {white}")
    pixels = torch.from_numpy(array.astype(np.float32) / white)
    return pixels.reshape(*array.shape[:2], -1).permute(2, 0, 1)


def _decode(path: Path) -> tuple[npt.NDArray[np.generic], int]:
    """The raw array (H, W) or (H, W, channels) of a file, upright and opaque, and its value for white."""
    if path.suffix.lower() == ".npy":
        array = _read_array(path)
        return (array, 255) if array.dtype.kind in "iu" else (array, 1)
    with _opened(path) as image:
        return _shown(image)


def _shown(image: Any) -> tuple[npt.NDArray[np.generic], int]:
    """As `_decode`, of an image of Pillow, which is turned upright in place."""
    from PIL import ImageOps

    ImageOps.exif_transpose(image, in_place=True)
    if image.mode == "F":
        return np.asarray(image), 1
    if image.mode.startswith("I"):
        return np.asarray(image), 65535  # Pillow's own conversion to 8 bits would clip these
    if _has_opacity(image):
        colours, opacity = _colours_and_opacity(image)
        return 255 - opacity * (255 - colours), 255
    return np.asarray(image.convert("L" if _is_grey(image.mode) else "RGB")), 255


def _has_opacity(image: Any) -> bool:
    """Whether an image of 8 bits has an alpha channel or a transparent colour."""
    return image.mode != "F" and not image.mode.startswith("I") and image.has_transparency_data


def _colours_and_opacity(image: Any) -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """The colours (H, W, 1 or 3) from 0 to 255 and the opacity (H, W, 1) from 0 to 1 of a transparent image."""
    layers = np.asarray(image.convert("RGBA"), np.float32)
    return layers[..., : 1 if _is_grey(image.mode) else 3], layers[..., 3:] / np.float32(255)


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


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """Pillow's image in ``path``, closed afterwards; whatever Pillow raises inside becomes one line."""
    pillow = _pillow(path)
    with one_line(f"cannot read {str(path)!r}"), pillow.open(path) as image:
        yield image


def _pillow(path: Path) -> ModuleType:
    """Pillow's module ``Image``, to read ``path`` with."""
    try:
        from PIL import Image
    except ImportError as error:
        raise UserError(f"reading {str(path)!r} needs Pillow; {INSTALL}") from error
    return Image
