"""``spectralmoe evaluate``: how good a saved model is, and how evenly its experts are used."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.completion import complete_data
from spectralmoe.cli.console import print_json, print_table
from spectralmoe.cli.options import ANY_DATA, Allow, DataDir, DeviceName, Download, Json, Model, load_saved, say_notes

__all__ = ["evaluate"]


def evaluate(
    model: Model,
    data: Annotated[
        str | None,
        typer.Option(
            metavar=ANY_DATA,
            help="Data of the model's kind; by default its own.",
            autocompletion=complete_data,
        ),
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
    """Print how good MODEL is on the test part: accuracy, bits per byte of a language model, operations spent on
    signals, or PSNR and SSIM of restored photos; and how evenly the experts of each layer are used.

    Examples: spectralmoe evaluate runs/first/models/sr-moe-depth2-seed0

    spectralmoe evaluate runs/first/models/sr-moe-depth2-seed0 --wrong runs/wrong

    spectralmoe evaluate runs/language --data text:book.txt
    """
    from spectralmoe.diagnostics import dead_experts, gini, max_vio, min_share
    from spectralmoe.diagnostics.evaluation import Counted
    from spectralmoe.training.settings import pick_device

    kind, network, meta = load_saved(Path(model), pick_device(device), allow)
    task = kind.reopen(meta, data, data_dir, download)
    say_notes(task.notes)
    mistakes = [] if wrong is None else task.write_wrong(network, wrong)
    counted = Counted(network)
    summary = task.summary(task.score(counted, "test"))
    measures = {"max_vio": max_vio, "gini": gini, "min_load_share": min_share, "dead_experts": dead_experts}
    layers = {
        name: {key: float(measure(load)) for key, measure in measures.items()} for name, load in counted.loads.items()
    }
    if json:
        result = {"data": task.name, **summary.values, "layers": layers}
        print_json(result if wrong is None else {**result, "wrong": mistakes})
        return
    typer.echo(summary.text)
    rows = [[name, *(f"{value:.3g}" for value in values.values())] for name, values in layers.items()]
    if rows:
        print_table("load of the experts", ["layer", "MaxVio", "Gini", "smallest share", "dead"], rows)
    if wrong is not None and mistakes:
        typer.echo(f"{len(mistakes)} wrong test images written to {wrong}, the first as {mistakes[0]['file']}")
        if layers:
            asked = [*(["--data", data] if data else []), *(["--data-dir", str(data_dir)] if data_dir else [])]
            asked += [word for name in allow or () for word in ("--allow", name)]
            words = ["--sample", mistakes[0]["sample"], "--guard", task.name, *asked, "--out", "runs/corrected"]
            typer.echo(f"correct it: {shlex.join(['spectralmoe', 'adapt', 'correct', str(model), *words])}")
