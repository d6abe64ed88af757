"""What the verbs do with a saved restoration network: restored files, and a picture of what several networks make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor, nn

from spectralmoe.data.degradations import KINDS, Pairs
from spectralmoe.data.image_files import probe, read_image
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.draw.images import write_images
from spectralmoe.draw.png import png
from spectralmoe.errors import UserError
from spectralmoe.files import make_folder, write_whole
from spectralmoe.layers import moe_layers
from spectralmoe.models import RestorationMoE
from spectralmoe.moe import MoE
from spectralmoe.training.settings import Settings, parse
from spectralmoe.training.tasks.shown import Predictions, Shown

__all__ = ["RestoreMeta", "draw_restored", "read_restore_meta", "restore_files"]


class RestoreMeta(Settings):
    """What is saved beside a restoration network.

    Attributes:
        results: measured after training.
        settings: of the run that trained it.
    """

    data: str
    router: str
    results: dict[str, Any] = Field(default_factory=dict)
    settings: dict[str, Any] = Field(default_factory=dict)


def read_restore_meta(network: nn.Module, values: Any, folder: Path) -> RestoreMeta:
    """What was saved beside a restoration network.

    Raises:
        UserError: another network; values that are missing.
    """
    if not isinstance(network, RestorationMoE):
        raise UserError(f"{folder} holds a {type(network).__name__}, and its meta is that of a restoration network")
    return parse(RestoreMeta, values, f"{folder / 'config.json'}: meta")


def restore_files(network: nn.Module, files: Sequence[Path], *, out: Path | None = None) -> Predictions:
    """Restore image files and write each as ``NAME-restored.png`` into the folder ``out``, by default beside the file.

    Images keep their size and colours; each colour is restored by itself.

    Raises:
        UserError: a file that is missing or no image; two that would be written to one place; a place that cannot be
            written; a network that reads the severity, which is not known of a file.
    """
    for layer in moe_layers(network).values():
        if isinstance(layer, MoE) and "severity" in layer.reads:
            raise UserError("predict: the network's layers read the severity, which is not known of a file")
    places = [(file.parent if out is None else out) / f"{file.stem}-restored.png" for file in files]
    for place in places:
        if places.count(place) > 1:
            raise UserError(f"two of the images would be written to {place}; restore them one after the other")
    images = []
    for file in files:
        channels, size = probe(file)
        images.append(read_image(file, channels=channels, size=size))
    if out is not None:
        make_folder(out)
    device, results = next(network.parameters()).device, []
    for file, place, image in zip(files, places, images, strict=True):
        with torch.no_grad(), evaluation_mode(network):
            restored = network(image[None].to(device))[0]
        write_whole(place, partial(Path.write_bytes, data=png(restored)))
        results.append(Shown({"file": str(file), "restored": str(place)}, f"{file}: restored as {place}"))
    return Predictions(results)


def draw_restored(stem: Path, pairs: Pairs, made: Mapping[str, Tensor]) -> list[Path]:
    """One row for each pair: the input, what each network makes of it, the truth. Returns the paths.

    Raises:
        UserError: as ``write_images``.
    """
    columns = {"input": pairs.images, **made, "truth": pairs.truths}
    rows = [KINDS[kind] for kind in pairs.kinds.tolist()]
    return write_images(stem, rows, {name: images[:, 0].tolist() for name, images in columns.items()})
