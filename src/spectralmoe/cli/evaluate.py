"""``spectralmoe evaluate``: accuracy and expert load of a saved model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.console import print_json, print_table
from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, load_network, open_data

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|folder:PATH", help="Data set; by default the model's own.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    json: Json = False,
) -> None:
    """Test accuracy of MODEL, and how evenly its experts are used in each layer.

    Example: spectralmoe evaluate runs/first/models/sr-moe-depth2-seed0
    """
    from spectralmoe.diagnostics import dead_experts, gini, max_vio, min_share
    from spectralmoe.diagnostics import evaluate as run_evaluation
    from spectralmoe.training.settings import pick_device

    network, meta = load_network(Path(model), pick_device(device), allow)
    images = open_data(data, meta, data_dir, download)
    found = run_evaluation(network, images.test.images, images.test.labels)
    measures = {"max_vio": max_vio, "gini": gini, "min_load_share": min_share, "dead_experts": dead_experts}
    layers = {
        name: {key: float(measure(load)) for key, measure in measures.items()} for name, load in found.loads.items()
    }
    if json:
        print_json({"data": images.name, "images": len(images.test), "accuracy": found.accuracy, "layers": layers})
        return
    typer.echo(f"{found.accuracy:.2f}% of {len(images.test)} test images of {images.name} are right")
    rows = [[name, *(f"{value:.3g}" for value in values.values())] for name, values in layers.items()]
    if rows:
        print_table("load of the experts", ["layer", "MaxVio", "Gini", "smallest share", "dead"], rows)
