"""``spectralmoe inspect`` on a network of this library: its own test images, their classes as labels."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from spectralmoe.adaptation.receipt_picture import png
from spectralmoe.cli.options import load_network, open_data
from spectralmoe.data.image_data import Split
from spectralmoe.diagnostics import evaluation_mode, watch
from spectralmoe.diagnostics.watch import Watched
from spectralmoe.instruments import Inspector, inspection_document
from spectralmoe.instruments.samples import Place

__all__ = ["inspect_images"]

_BATCH = 64


def inspect_images(
    folder: Path,
    device: torch.device,
    *,
    data: str | None,
    data_dir: Path | None,
    download: bool,
    tokens: int,
    allow: Sequence[str] | None,
    seed: int,
) -> dict[str, Any]:
    """The inspection document of a saved network, from the test part of a data set.

    Raises:
        UserError: the model cannot be read or has no MoE layer; the data do not fit it.
    """
    network, meta = load_network(folder, device, allow)
    images = open_data(data, meta, data_dir, download)
    order = torch.randperm(len(images.test), generator=torch.Generator().manual_seed(seed))
    used = 0
    with watch(network) as seen, evaluation_mode(network), torch.no_grad():
        inspector = Inspector(seen.layers, labels=images.classes, seed=seed)
        for chosen in order.split(_BATCH):
            if inspector.tokens >= tokens:
                break
            network(images.test.images[chosen].to(device))
            inspector.add(seen.drain(), images.test.labels[chosen].to(device))
            used += len(chosen)
        layers = inspector.layers(_Patches(images.test, order, images.classes))
    model = {
        "name": folder.name,
        "source": str(folder),
        "library": "spectralmoe",
        "class": type(network).__name__,
        "mode": "run",
        "dtype": str(next(network.parameters()).dtype).removeprefix("torch."),
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
    }
    source = f"{used} test images of {images.name}"
    facts = {"source": source, "tokens": inspector.tokens, "sequences": used, "tokenizer": None, "notes": []}
    return inspection_document(folder.name, model, facts, layers, inspector.paths())


class _Patches:
    """The part of an image that a token stands for: a square patch where the tokens make a square grid, else all."""

    def __init__(self, split: Split, order: Tensor, classes: Sequence[str]) -> None:
        self.split, self.order, self.classes = split, order, classes

    def __call__(self, layer: Watched, place: Place) -> dict[str, Any]:
        index = int(self.order[place.sequence])
        image, label = self.split.images[index], self.classes[int(self.split.labels[index])]
        grid = round(place.length**0.5)
        if place.length > 1 and grid**2 == place.length:
            height, width = (side // grid for side in image.shape[-2:])
            row, column = divmod(place.position, grid)
            image = image[:, row * height : (row + 1) * height, column * width : (column + 1) * width]
        data = base64.b64encode(png(image)).decode()
        return {"image": f"data:image/png;base64,{data}", "text": label}
