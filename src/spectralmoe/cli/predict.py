"""``spectralmoe predict``: classes of image files."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Allow, DeviceName, Json, Model, load_network, say_notes

if TYPE_CHECKING:
    from spectralmoe.routing import Routing

__all__ = ["predict"]


def predict(
    model: Model,
    files: Annotated[list[Path], typer.Argument(metavar="FILE...", help="Images, or .npy arrays.")],
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """The most likely class of each FILE, its probability, and the expert that each layer leans on.

    Images are read in the size and the colours that the model was trained with; where that changes one, stderr says so.

    Example: spectralmoe predict runs/first/models/sr-moe-depth2-seed0 digit.png
    """
    import torch

    from spectralmoe.data.image_files import conversions, read_image
    from spectralmoe.diagnostics import holds_moe
    from spectralmoe.recorder import record
    from spectralmoe.training.settings import pick_device

    where = pick_device(device)
    network, meta = load_network(model, where, allow)
    images = torch.stack([read_image(file, channels=meta.channels, size=meta.image_size) for file in files])
    if converted := conversions(files, channels=meta.channels, size=meta.image_size):
        say_notes([converted])
    with torch.no_grad(), record(network) if holds_moe(network) else nullcontext(()) as tape:
        probabilities = network(images.to(where)).softmax(-1).cpu()
    experts = {item.name: leaning(item.routing, len(files)) for item in tape}
    predictions: list[dict[str, Any]] = []
    for index, file in enumerate(files):
        label = int(probabilities[index].argmax())
        predictions.append(
            {
                "file": str(file),
                "class": meta.classes[label],
                "label": label,
                "probability": float(probabilities[index, label]),
                "experts": {name: int(chosen[index]) for name, chosen in experts.items()},
            }
        )
    if json:
        print_json(predictions)
        return
    for row in predictions:
        chosen = ", ".join(f"{name}: {expert}" for name, expert in row["experts"].items())
        experts_used = f"; experts {chosen}" if chosen else ""
        typer.echo(f"{row['file']}: {row['class']} ({row['probability']:.1%}{experts_used})")


def leaning(routing: Routing, images: int) -> list[int]:
    """The expert with the largest sum of weights over the tokens of each image; -1 for an image without experts."""
    import torch

    total = routing.gates().view(images, -1, routing.num_experts).sum(1)
    return torch.where(total.sum(-1) > 0, total.argmax(-1), -1).tolist()
