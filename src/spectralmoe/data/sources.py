"""Folders of files, and readers of the formats that the named data sets come in: packaged CSV tables and IDX files."""

from __future__ import annotations

import gzip
import math
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = [
    "INSTALL",
    "download_fashion",
    "entries",
    "fetched_to",
    "files_below",
    "one_line",
    "packaged_file",
    "read_idx",
    "read_idx_pair",
    "read_table",
    "subfolders",
]

INSTALL = "install it with 'pip install spectralmoe[data]'"


@contextmanager
def one_line(failure: str) -> Iterator[None]:
    """Turn whatever is raised inside into a `UserError` of one line, ``<failure>: <reason>``.

    Decoders answer a broken file with nearly any exception, so all of them are caught here.

    >>> with one_line("cannot read 'a.png'"):
    ...     raise SyntaxError("broken PNG file")
    Traceback (most recent call last):
    spectralmoe.errors.UserError: cannot read 'a.png': broken PNG file
    """
    try:
        yield
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise UserError(f"{failure}: {' '.join(str(reason).split())}") from error


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> Iterator[Path]:
    """All files below ``folder`` but hidden ones, sorted; a link back to a folder above is not followed."""
    above = (*above, folder.resolve())
    for path in entries(folder):
        if not path.is_dir():
            yield path
        elif path.resolve() not in above:
            yield from files_below(path, above)


def entries(folder: Path) -> list[Path]:
    """What ``folder`` holds, sorted, without hidden files.

    Raises:
        UserError: it cannot be listed.
    """
    with one_line(f"cannot list {str(folder)!r}"):
        return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def subfolders(folder: Path) -> list[Path]:
    """The folders in ``folder``, sorted."""
    return [path for path in entries(folder) if path.is_dir()]


def fetched_to(data_dir: Path | None) -> Path:
    """The folder for what is fetched: ``data_dir``, or this library's cache."""
    return data_dir or Path.home() / ".cache" / "spectralmoe"


def packaged_file(data_set: str, package: str, inside: str, project: str) -> Path:
    """The path of a data file that an installed package ships, found without importing the package.

    Raises `UserError` when the package or its file is missing; it says how to install ``project`` without what it
    depends on, of which reading the file needs nothing.

    >>> packaged_file("digits", "sklearn", "datasets/data/digits.csv.gz", "scikit-learn").name
    'digits.csv.gz'
    """
    spec = find_spec(package)
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, inside)
        if path.is_file():
            return path
    raise UserError(
        f"data set {data_set!r} was not found: looked for {package}/{inside} among the installed packages; install it "
        f"with 'pip install --no-deps {project}', which is all that it needs"
    )


def read_table(path: Path, side: int, white: float) -> tuple[Tensor, Tensor]:
    """Read a gzipped CSV table of grey square images: ``side * side`` pixels from 0 to ``white``, then a label 0..9.

    Returns images (N, 1, side, side) float32 in [0, 1] and labels (N,) int64.
    Raises `UserError`, naming the file, when it cannot be read or holds anything else.
    """
    with one_line(f"cannot read {str(path)!r}"), gzip.open(path, "rt") as lines:
        table = np.loadtxt(lines, delimiter=",", dtype=np.float32, ndmin=2)
    if table.shape[1] != side * side + 1:
        raise UserError(f"{str(path)!r} has {table.shape[1]} columns; expected {side * side} pixels and a label")
    pixels, labels = table[:, :-1], table[:, -1]
    in_range = (pixels >= 0) & (pixels <= white)  # false for NaN too
    for bad, what in ((~in_range.all(axis=1), "a pixel"), (~np.isin(labels, range(10)), "a label")):
        if bad.any():
            raise UserError(f"{str(path)!r} has {what} that is out of range or not finite in image {bad.argmax()}")
    images = torch.from_numpy(pixels / white).reshape(-1, 1, side, side)
    return images, torch.from_numpy(labels.astype(np.int64))


def read_idx(path: Path) -> Tensor:
    """Read a gzipped IDX file of unsigned bytes, as MNIST and Fashion-MNIST use, into a uint8 tensor of its shape.

    Raises `UserError`, naming the file, when it is truncated, corrupt or not such a file.
    """
    with one_line(f"cannot read {str(path)!r}"), gzip.open(path) as file:
        content = file.read()
    start = 4 + 4 * (content[3] if len(content) > 3 else 0)
    if content[:3] != b"\0\0\x08" or len(content) < start:
        raise UserError(f"{str(path)!r} is not an IDX file of bytes")
    shape = [int(extent) for extent in np.frombuffer(content[4:start], ">u4")]
    there, expected = len(content) - start, math.prod(shape)
    if there != expected:
        raise UserError(f"{str(path)!r} is corrupt: {there} bytes of data where shape {shape} needs {expected}")
    return torch.from_numpy(np.frombuffer(content, np.uint8, offset=start).reshape(shape).copy())


def read_idx_pair(images_path: Path, labels_path: Path, num_classes: int) -> tuple[Tensor, Tensor]:
    """Read an IDX file of grey images and the one of their labels.

    Returns images (N, 1, H, W) uint8 and labels (N,) int64.
    Raises `UserError`, naming the file, when one is broken or the two do not belong together.
    """
    images, labels = read_idx(images_path), read_idx(labels_path)
    if images.ndim != 3 or not images.numel():
        raise UserError(f"{str(images_path)!r} has shape {list(images.shape)}; expected images, heights, widths")
    if labels.shape != images.shape[:1]:
        raise UserError(f"{str(labels_path)!r} has shape {list(labels.shape)}; expected {len(images)} labels")
    if labels.max() >= num_classes:
        raise UserError(f"{str(labels_path)!r} has label {int(labels.max())}; the highest is {num_classes - 1}")
    return images.unsqueeze(1), labels.long()


def download_fashion(root: Path) -> None:
    """Fetch Fashion-MNIST to ``root``, as torchvision keeps it.

    Raises `UserError` where torchvision or the network is missing.
    """
    try:
        from torchvision.datasets import FashionMNIST
    except ImportError as error:
        cure = "install it with 'pip install spectralmoe[vision]'"
        raise UserError(f"downloading 'fashion-mnist' needs torchvision; {cure}") from error
    with one_line(f"cannot download 'fashion-mnist' to {str(root)!r}"):
        FashionMNIST(root, train=True, download=True)
