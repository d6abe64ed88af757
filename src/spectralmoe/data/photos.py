"""Photographs to restore: those that installed packages ship, and folders of a user's own; split by photograph."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from spectralmoe.data.image_files import is_image_name, named, probe, read_image
from spectralmoe.data.sources import files_below
from spectralmoe.digests import sha256_of
from spectralmoe.errors import UserError, one_of

__all__ = ["PHOTO_PARTS", "Photo", "PhotoData", "PhotoPart", "load_photos", "patches_of"]

PhotoPart = Literal["train", "validation", "test"]
PHOTO_PARTS: tuple[PhotoPart, ...] = ("train", "validation", "test")

_SKIMAGE, _SKLEARN, _MATPLOTLIB = "skimage/data", "sklearn/datasets/images", "matplotlib/mpl-data/sample_data"
_PACKAGED: dict[PhotoPart, dict[str, str]] = {
    "train": {
        "astronaut.png": _SKIMAGE,
        "brick.png": _SKIMAGE,
        "camera.png": _SKIMAGE,
        "coins.png": _SKIMAGE,
        "grass.png": _SKIMAGE,
        "gravel.png": _SKIMAGE,
        "hubble_deep_field.jpg": _SKIMAGE,
        "ihc.png": _SKIMAGE,
        "moon.png": _SKIMAGE,
        "motorcycle_left.png": _SKIMAGE,  # not the right one, which shows the same
        "page.png": _SKIMAGE,
        "retina.jpg": _SKIMAGE,
        "rocket.jpg": _SKIMAGE,
        "text.png": _SKIMAGE,
    },
    "validation": {"coffee.png": _SKIMAGE, "flower.jpg": _SKLEARN},
    "test": {"chelsea.png": _SKIMAGE, "china.jpg": _SKLEARN, "grace_hopper.jpg": _MATPLOTLIB},
}
"""Part -> file -> where it lies among the installed packages."""

_FEWEST = 3
_PLAIN = 0.05  # a patch whose standard deviation is no higher shows nothing


class Photo(NamedTuple):
    """A grey photograph (1, H, W) with values in [0, 1], and its name."""

    name: str
    pixels: Tensor


@dataclass(frozen=True, slots=True)
class PhotoData:
    """Photographs in three parts; none is in two of them.

    Attributes:
        name: "photos", or "folder:" and the path, whatever the current folder is then.
        notes: how they were read, a line each.
    """

    name: str
    parts: Mapping[PhotoPart, Sequence[Photo]]
    notes: tuple[str, ...] = ()


def load_photos(name: str) -> PhotoData:
    """Grey photographs by name: "photos", or "folder:PATH".

    ``photos`` are 19 real photographs that scikit-image, scikit-learn and matplotlib ship, read where they are
    installed; training has 14, validation coffee and flower, test chelsea, china and grace_hopper. Of a folder all
    images below it are read, each content once. In the order of the SHA-256 of their contents, the last fifth is for
    testing, the tenth before it for validation, at least one photograph each; so a photograph's part does not follow
    from its name.

    Raises:
        UserError: another name; a package that is not installed; fewer than 3 photographs; a file that is no image.
    """
    kind, _, path = name.partition(":")
    if kind == "folder" and path:
        return _folder(Path(path).expanduser())
    if name != "photos":
        raise one_of("photographs", name, ["photos", "folder:PATH"])
    return PhotoData(
        name, {part: [_read(_packaged(*each)) for each in files.items()] for part, files in _PACKAGED.items()}
    )


def patches_of(photos: Sequence[Photo], side: int) -> Tensor:
    """Square patches (N, 1, side, side) that lie beside each other in the photographs, in a fixed random order.

    Photographs that are smaller than a patch give none. Patches whose standard deviation is at most 0.05 are left out,
    since they show nothing.
    """
    large = [photo.pixels for photo in photos if min(photo.pixels.shape[1:]) >= side]
    cut = [pixels.unfold(1, side, side).unfold(2, side, side).flatten(0, 2) for pixels in large]
    patches = torch.cat(cut) if cut else torch.empty(0, side, side)
    patches = patches[patches.flatten(1).std(1) > _PLAIN]
    return patches[torch.randperm(len(patches), generator=torch.Generator().manual_seed(0)), None].contiguous()


def _packaged(file: str, folder: str) -> Path:
    package, _, inside = folder.partition("/")
    spec = find_spec(package)
    for root in (spec and spec.submodule_search_locations) or ():
        path = Path(root, inside, file)
        if path.is_file():
            return path
    raise UserError(
        f"data 'restore:photos' need {folder}/{file} among the installed packages; install them with "
        "'pip install spectralmoe[restore]', or name images of your own with restore:folder:PATH"
    )


def _folder(root: Path) -> PhotoData:
    if not root.is_dir():
        raise UserError(f"folder {str(root)!r} {'is not a folder' if root.exists() else 'does not exist'}")
    files = [path for path in files_below(root) if is_image_name(path)]
    found = {sha256_of(path): path for path in reversed(files)}
    paths = [found[digest] for digest in sorted(found)]
    if len(paths) < _FEWEST:
        raise UserError(f"folder {str(root)!r} has {len(paths)} different images; at least {_FEWEST} fill all parts")
    test, validation = max(1, len(paths) // 5), max(1, len(paths) // 10)
    bounds = len(paths) - test - validation, len(paths) - test
    cuts: dict[PhotoPart, list[Path]] = {
        "train": paths[: bounds[0]],
        "validation": paths[bounds[0] : bounds[1]],
        "test": paths[bounds[1] :],
    }
    notes = [f"{root}: {len(paths)} photographs, for testing {named([path.name for path in cuts['test']])}"]
    if colour := [path.name for path in paths if probe(path)[0] == 3]:
        notes.append(f"{root}: read as grey: {named(colour)}")
    parts = {part: [_read(path) for path in chosen] for part, chosen in cuts.items()}
    return PhotoData(f"folder:{root.resolve()}", parts, tuple(notes))


def _read(path: Path) -> Photo:
    return Photo(path.stem, read_image(path, channels=1, size=probe(path)[1]))
