"""``spectralmoe evaluate``: accuracy and expert load of a saved model."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.console import print_json, print_table
from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, load_network, open_data
from spectralmoe.errors import UserError
from spectralmoe.files import make_folder, write_whole

if TYPE_CHECKING:
    from torch import Tensor

    from spectralmoe.data.image_data import Split

__all__ = ["evaluate"]

_LONGEST = 20


def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|folder:PATH", help="Data set; by default the model's own.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    wrong: Annotated[
        Path | None, typer.Option(metavar="DIR", help="Write the test images that the model gets wrong to this folder.")
    ] = None,
    json: Json = False,
) -> None:
    """Test accuracy of MODEL, and how evenly its experts are used in each layer.

    Examples: spectralmoe evaluate runs/first/models/sr-moe-depth2-seed0

    spectralmoe evaluate runs/first/models/sr-moe-depth2-seed0 --wrong runs/wrong
    """
    from spectralmoe.diagnostics import dead_experts, gini, max_vio, min_share
    from spectralmoe.diagnostics import evaluate as run_evaluation
    from spectralmoe.training.settings import pick_device

    network, meta = load_network(Path(model), pick_device(device), allow)
    images = open_data(data, meta, data_dir, download)
    evaluation = run_evaluation(network, images.test.images, images.test.labels)
    measures = {"max_vio": max_vio, "gini": gini, "min_load_share": min_share, "dead_experts": dead_experts}
    layers = {
        name: {key: float(measure(load)) for key, measure in measures.items()}
        for name, load in evaluation.loads.items()
    }
    mistakes = [] if wrong is None else _write_wrong(wrong, images.test, evaluation.predictions, meta.classes)
    if json:
        result = {"data": images.name, "images": len(images.test), "accuracy": evaluation.accuracy, "layers": layers}
        print_json(result if wrong is None else {**result, "wrong": mistakes})
        return
    typer.echo(f"{evaluation.accuracy:.2f}% of {len(images.test)} test images of {images.name} are right")
    rows = [[name, *(f"{value:.3g}" for value in values.values())] for name, values in layers.items()]
    if rows:
        print_table("load of the experts", ["layer", "MaxVio", "Gini", "smallest share", "dead"], rows)
    if wrong is not None and mistakes:
        typer.echo(f"{len(mistakes)} wrong test images written to {wrong}, the first as {mistakes[0]['file']}")
        if layers:
            asked = [*(["--data", data] if data else []), *(["--data-dir", str(data_dir)] if data_dir else [])]
            asked += [word for name in allow or () for word in ("--allow", name)]
            words = ["--sample", mistakes[0]["sample"], "--guard", images.name, *asked, "--out", "runs/corrected"]
            typer.echo(f"correct it: {shlex.join(['spectralmoe', 'adapt', 'correct', str(model), *words])}")


def _write_wrong(folder: Path, test: Split, predictions: Tensor, classes: Sequence[str]) -> list[dict[str, Any]]:
    """Write each wrong test image as a PNG file that says number, label and prediction; returns one entry for each.

    Raises:
        UserError: the folder holds something already, or cannot be written.
    """
    from spectralmoe.adaptation.receipt_picture import png

    make_folder(folder)
    if any(folder.iterdir()):
        raise UserError(
            f"--wrong {folder} is not empty; name a new folder, so that old images do not mix with new ones"
        )
    mistakes = []
    for index in (predictions != test.labels).nonzero().flatten().tolist():
        label, prediction = int(test.labels[index]), int(predictions[index])
        file = f"test-{index}_label-{_in_name(classes, label)}_predicted-{_in_name(classes, prediction)}.png"
        write_whole(folder / file, partial(_write_bytes, png(test.images[index])))
        names = {"label": classes[label], "prediction": classes[prediction]}
        mistakes.append({"sample": f"test:{index}", **names, "file": file})
    return mistakes


def _write_bytes(content: bytes, path: Path) -> None:
    path.write_bytes(content)


def _in_name(classes: Sequence[str], label: int) -> str:
    """A class in the name of a file: letters, digits, "-" and "_", at most 20; its number where nothing is left."""
    return re.sub(r"[^\w-]+", "_", classes[label]).strip("_")[:_LONGEST] or str(label)
