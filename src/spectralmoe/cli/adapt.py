"""``spectralmoe adapt``: correct single samples by one expert a layer, and count what else that moves."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

from spectralmoe.adaptation import Rule, correct_sample, one_shot_trials
from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, Seed, load_network, open_data
from spectralmoe.diagnostics import evaluate
from spectralmoe.errors import UserError, one_of
from spectralmoe.saving import read_config, save
from spectralmoe.training.data import read_image
from spectralmoe.training.settings import pick_device

__all__ = ["adapt"]


def adapt(
    model: Model,
    image: Annotated[Path | None, typer.Option(help="Correct this image; needs --label and --out.")] = None,
    label: Annotated[int | None, typer.Option(help="The right class number of --image.")] = None,
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Folder for the corrected model.")] = None,
    trials: Annotated[int, typer.Option(min=1, help="Without --image: test samples to correct, one at a time.")] = 50,
    layers: Annotated[str, typer.Option(metavar="all|last", help="In which layers the used expert learns.")] = "all",
    lr: Annotated[float, typer.Option(min=0.0, help="Step size of the gradient steps.")] = 5e-3,
    max_steps: Annotated[int, typer.Option(min=1, help="Give up after so many steps.")] = 100,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|folder:PATH", help="Data set; by default the model's own.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    seed: Seed = 0,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Correct one image and save the model, or measure what such corrections cost.

    Examples: spectralmoe adapt MODEL --trials 50

    spectralmoe adapt MODEL --image seven.png --label 7 --out runs/corrected
    """
    if layers not in ("all", "last"):
        raise one_of("--layers", layers, ["all", "last"])
    if (image is None) != (label is None) or (image is not None and out is None):
        raise UserError("to correct one image give --image, --label and --out together")
    if image is None and out is not None:
        raise UserError("--out holds the corrected model: give --image and --label with it")
    if out is not None and (out / "config.json").exists():
        raise UserError(f"--out {out} holds a model already; name another folder, so that it stays as it is")
    network, meta = load_network(model, pick_device(device), allow)
    test = open_data(data, meta, data_dir, download).test
    rule = Rule("last" if layers == "last" else "all", lr, max_steps)
    before = evaluate(network, test.images, test.labels).accuracy
    if image is not None and label is not None and out is not None:
        height, width = meta.image_size
        pixels = read_image(image, channels=meta.channels, size=(height, width))
        done = correct_sample(network, pixels, label, rule)
        after = evaluate(network, test.images, test.labels).accuracy
        result = {"success": done.success, "steps": done.steps, "touched": done.touched, "change": done.change}
        result |= {"accuracy_before": before, "accuracy_after": after}
        if done.success:
            save(network, out, meta=read_config(model)["meta"])
        text = f"{'corrected' if done.success else 'NOT corrected, nothing saved'} after {done.steps} steps"
        text += f"; experts {done.touched}; test accuracy {before:.2f}% -> {after:.2f}%"
        text += f"; saved to {out}" if done.success else ""
    else:
        found = one_shot_trials(network, test.images, test.labels, trials=trials, rule=rule, seed=seed)
        if not found:
            raise UserError("the model makes no mistake on the test part: there is nothing to correct")
        changes = torch.tensor([trial.interference for trial in found])
        success = sum(trial.correction.success for trial in found) / len(found)
        result = {"trials": len(found), "success": success, "accuracy_before": before}
        result |= {"interference": float(changes.mean()), "interference_worst": float(changes.min())}
        text = f"{len(found)} samples corrected one at a time, {success:.0%} with success: accuracy on all others "
        text += f"{changes.mean():+.3f} points on average, {changes.min():+.2f} at worst (before: {before:.2f}%)"
    print_json(result) if json else typer.echo(text)
