"""``spectralmoe train``: one network from a TOML file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json, watching
from spectralmoe.cli.options import DataDir, DeviceName, Download, Json, Out, see_own_modules
from spectralmoe.diagnostics import evaluate
from spectralmoe.files import write_json
from spectralmoe.saving import save
from spectralmoe.training.data import load_data
from spectralmoe.training.loop import train as run_training
from spectralmoe.training.network import CHECKPOINT, build_network, model_meta
from spectralmoe.training.routers import find_preset
from spectralmoe.training.run_folder import run_folder
from spectralmoe.training.settings import TrainSettings, parse, pick_device, read_toml

__all__ = ["train"]


def train(
    config: Annotated[Path, typer.Option(metavar="F.toml", help="Settings of the run.")],
    out: Out,
    seed: Annotated[int | None, typer.Option(min=0, help="Random seed; the file's by default.")] = None,
    data_dir: DataDir = None,
    download: Download = False,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Train one network and save it to --out.

    Example: spectralmoe train --config examples/train.toml --out runs/sr-moe

    A run that was stopped goes on when it is started again with the same file and --out.
    """
    settings = parse(TrainSettings, read_toml(config), str(config))
    if seed is not None:
        settings = settings.model_copy(update={"optimization": settings.optimization.model_copy(update={"seed": seed})})
    see_own_modules([settings.router])
    preset, where = find_preset(settings.router), pick_device(device)
    data = load_data(settings.data, data_dir=data_dir, download=download)
    if settings.hold_out is not None:
        data = data.without(settings.hold_out)
    if settings.train_size is not None:
        data = data.subset(settings.train_size)
    network = build_network(data, settings.network, settings.router, settings.depth, settings.optimization.seed)
    network.to(where)
    claim = {**settings.model_dump(mode="json"), "images": data.fingerprint}
    with run_folder(out, claim, (CHECKPOINT, "model.safetensors", "config.json", "history.json")):
        with watching(quiet=json) as watch:
            history = run_training(
                network,
                data,
                settings.optimization,
                terms=preset.terms,
                checkpoint=out / CHECKPOINT,
                progress=lambda share: watch(f"training {settings.router}", share),
            )
        save(network, out, meta=model_meta(data, settings.router, settings.hold_out))
        accuracy = evaluate(network, data.test.images, data.test.labels).accuracy
        write_json(out / "history.json", {"epochs": history.epochs, "test_accuracy": accuracy})
    if json:
        print_json({"model": str(out), "validation_accuracy": history.validation_accuracy, "test_accuracy": accuracy})
    else:
        typer.echo(f"validation {history.validation_accuracy:.2f}%, test {accuracy:.2f}%; model saved to {out}")
