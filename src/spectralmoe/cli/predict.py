"""``spectralmoe predict``: classes of image files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import torch
import typer

from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Allow, DeviceName, Json, Model, load_network
from spectralmoe.tape import record
from spectralmoe.training.data import read_image
from spectralmoe.training.settings import pick_device

__all__ = ["predict"]


def predict(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, or .npy arrays.")],
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """The most likely class of each FILE, its probability, and the expert that each layer leans on.

    Example: spectralmoe predict runs/first/models/sr-moe-depth2-seed0 digit.png
    """
    where = pick_device(device)
    network, meta = load_network(model, where, allow)
    height, width = meta.image_size
    images = torch.stack([read_image(file, channels=meta.channels, size=(height, width)) for file in files])
    with torch.no_grad(), record(network) as tape:
        probabilities = network(images.to(where)).softmax(-1).cpu()
    experts = {item.name: item.routing.top_expert().cpu() for item in tape}
    found: list[dict[str, Any]] = []
    for index, file in enumerate(files):
        label = int(probabilities[index].argmax())
        found.append(
            {
                "file": str(file),
                "class": meta.classes[label],
                "label": label,
                "probability": float(probabilities[index, label]),
                "experts": {name: int(chosen[index]) for name, chosen in experts.items()},
            }
        )
    if json:
        print_json(found)
        return
    for row in found:
        chosen = ", ".join(f"{name}: {expert}" for name, expert in row["experts"].items())
        typer.echo(f"{row['file']}: {row['class']} ({row['probability']:.1%}; experts {chosen})")
