"""What the verbs do with a saved image network: classes of files, wrong images as files, patches for ``inspect``."""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.data.image_data import Split
from spectralmoe.data.image_files import conversions, read_image
from spectralmoe.diagnostics import holds_moe
from spectralmoe.draw.png import png
from spectralmoe.errors import UserError
from spectralmoe.files import make_folder, write_whole
from spectralmoe.instruments.samples import Place
from spectralmoe.recorder import record
from spectralmoe.routing import Routing
from spectralmoe.training.network import ModelMeta
from spectralmoe.training.tasks.shown import Predictions, Shown

__all__ = ["classify", "patch", "write_wrong"]

_LONGEST = 20


def classify(network: nn.Module, meta: ModelMeta, files: Sequence[Path]) -> Predictions:
    """The most likely class of each file, its probability, and the expert with the largest weight in each layer.

    Raises:
        UserError: a file that is missing or no image.
    """
    device = next(network.parameters()).device
    images = torch.stack([read_image(file, channels=meta.channels, size=meta.image_size) for file in files])
    with torch.no_grad(), record(network) if holds_moe(network) else nullcontext(()) as tape:
        probabilities = network(images.to(device)).softmax(-1).cpu()
    experts = {item.name: _leaning(item.routing, len(files)) for item in tape}
    classes = []
    for index, file in enumerate(files):
        label = int(probabilities[index].argmax())
        probability, name = float(probabilities[index, label]), meta.classes[label]
        chosen = {layer: int(of_image[index]) for layer, of_image in experts.items()}
        used = "; experts " + ", ".join(f"{layer}: {expert}" for layer, expert in chosen.items()) if chosen else ""
        values = {"file": str(file), "class": name, "label": label, "probability": probability, "experts": chosen}
        classes.append(Shown(values, f"{file}: {name} ({probability:.1%}{used})"))
    converted = conversions(files, channels=meta.channels, size=meta.image_size)
    return Predictions(classes, [converted] if converted else [])


def write_wrong(folder: Path, test: Split, predictions: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Write each wrong test image as a PNG file that says number, label and prediction; returns one entry for each.

    Raises:
        UserError: the folder holds something already, or cannot be written.
    """
    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(
            f"--wrong {folder} is not empty; name a new folder, so that old images do not mix with new ones"
        )
    mistakes = []
    for index in (predictions != test.labels).nonzero().flatten().tolist():
        label, prediction = int(test.labels[index]), int(predictions[index])
        file = f"test-{index}_label-{_in_name(classes, label)}_predicted-{_in_name(classes, prediction)}.png"
        write_whole(folder / file, partial(Path.write_bytes, data=png(test.images[index])))
        names = {"label": classes[label], "prediction": classes[prediction]}
        mistakes.append({"sample": f"test:{index}", **names, "file": file})
    return mistakes


def patch(split: Split, classes: Sequence[str], index: int, place: Place) -> dict[str, Any]:
    """The part of an image that a token stands for: a square patch where the tokens make a square grid, else all."""
    image, label = split.images[index], classes[int(split.labels[index])]
    grid = round(place.length**0.5)
    if place.length > 1 and grid**2 == place.length:
        height, width = (side // grid for side in image.shape[-2:])
        row, column = divmod(place.position, grid)
        image = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
    data = base64.b64encode(png(image)).decode()
    return {"image": f"data:image/png;base64,{data}", "text": label}


def _leaning(routing: Routing, images: int) -> list[int]:
    """The expert with the largest sum of weights over the tokens of each image; -1 for an image without experts."""
    total = routing.gates().view(images, -1, routing.num_experts).sum(1)
    return torch.where(total.sum(-1) > 0, total.argmax(-1), -1).tolist()


def _in_name(classes: Sequence[str], label: int) -> str:
    """A class in the name of a file: letters, digits, "-" and "_", at most 20; its number where nothing is left."""
    return re.sub(r"[^\w-]+", "_", classes[label]).strip("_")[:_LONGEST] or str(label)
