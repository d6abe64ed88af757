"""``spectralmoe predict``: classes of image files, how a text goes on, or restored images."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Allow, DeviceName, Json, Model, load_saved, say_notes
from spectralmoe.errors import UserError

__all__ = ["predict"]


def predict(
    model: Model,
    inputs: Annotated[
        list[str],
        typer.Argument(metavar="INPUT...", help="Images, or .npy arrays; of a language model text, files or -."),
    ],
    tokens: Annotated[
        int | None, typer.Option("--tokens", min=1, help="How many tokens a language model writes.", show_default="100")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option("--temperature", min=0, help="Of its draws; 0: always the likeliest token.", show_default="0.8"),
    ] = None,
    seed: Annotated[
        int | None, typer.Option("--seed", min=0, max=2**31 - 1, help="Random seed of its draws.", show_default="0")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Folder for restored images; by default each is written beside its file."),
    ] = None,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Print the most likely class of each image, its probability, and the expert with the largest weight in each layer;
    let a language model go on with each text; or restore each image and write it as NAME-restored.png.

    To classify images, they are read in the size and the colours that the model was trained with; a line on stderr says
    which ones that changes. Restored images keep size and colours.

    Example: spectralmoe predict runs/first/models/sr-moe-depth2-seed0 digit.png

    spectralmoe predict runs/language "The with statement" --tokens 200

    spectralmoe predict runs/restore photo.jpg --out runs/restored
    """
    from spectralmoe.training.settings import pick_device

    task, network, meta = load_saved(model, pick_device(device), allow)
    asked = {"tokens": tokens, "temperature": temperature, "seed": seed, "out": out}
    options = {name: value for name, value in asked.items() if value is not None}
    for name in options:
        if name not in task.options:
            whose = "networks that restore images" if name == "out" else "language models"
            raise UserError(f"--{name} is for {whose}, and {model} {task.does}; leave it out")
    results, notes = task.predict(network, meta, inputs, **options)
    say_notes(notes)
    if json:
        print_json([result.values for result in results])
        return
    for result in results:
        typer.echo(result.text)
