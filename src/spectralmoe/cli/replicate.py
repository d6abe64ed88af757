"""``spectralmoe replicate``: busy experts get copies; quantising other experts to few bits saves their memory."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.completion import one_among
from spectralmoe.cli.console import print_json, print_table, say, show_progress
from spectralmoe.cli.options import Allow, DataDir, DeviceName, Download, Json, Model, Out, Seed, load_saved, say_notes

if TYPE_CHECKING:
    from spectralmoe.compression import LayerReport

__all__ = ["replicate"]

_BATCH = 256


def replicate(
    model: Model,
    out: Out,
    bits: Annotated[int, typer.Option("--bits", metavar="2..32", help="Bits of an integer.")] = 8,
    copies: Annotated[int, typer.Option("--copies", metavar="N", help="Copies added to each layer.")] = 1,
    quantize: Annotated[
        int, typer.Option("--quantize", metavar="N", help="How many experts without copies are quantised.")
    ] = 1,
    importance: Annotated[
        str,
        typer.Option(
            metavar="removal|wanda|reap|frequency|random",
            help="What an expert is worth: removal runs the validation part once for each.",
            autocompletion=one_among("removal", "wanda", "reap", "frequency", "random"),
        ),
    ] = "removal",
    keep_original: Annotated[
        bool, typer.Option("--keep-original", help="Quantise copies alone; the busiest expert stays as it is.")
    ] = False,
    samples: Annotated[
        int, typer.Option("--samples", min=1, help="Validation samples that say which experts are busy.")
    ] = 1000,
    data: Annotated[
        str | None, typer.Option(metavar="NAME|folder:PATH|hf:NAME|text:NAME", help="By default the model's own data.")
    ] = None,
    data_dir: DataDir = None,
    download: Download = False,
    allow: Allow = None,
    device: DeviceName = "auto",
    seed: Seed = 0,
    json: Json = False,
) -> None:
    """Give the busiest expert of each layer a copy, turn it and the least important experts into integers of few bits,
    and write the model to --out.

    The values are rounded to what the integers stand for and keep their type; the bytes that the integers would take
    are printed. For models of Hugging Face: spectralmoe.hf.replicate_and_quantize_experts.

    Example: spectralmoe replicate runs/language --bits 4 --quantize 3 --out runs/replicated
    """
    from spectralmoe.compression import replicate_and_quantize
    from spectralmoe.hf.stock_folder import make_new_folder
    from spectralmoe.saving import read_config, save
    from spectralmoe.training.settings import pick_device

    place = pick_device(device)
    kind, network, meta = load_saved(Path(model), place, allow)
    task = kind.reopen(meta, data, data_dir, download)
    say_notes(task.notes)
    make_new_folder(out)  # before a long run, not after it
    metric = task.metric

    def score(one: Any) -> float:
        return metric.rank(task.score(one, "validation")[metric.key])

    with show_progress(quiet=json) as progress:
        progress("choosing experts", 0.1)
        report = replicate_and_quantize(
            network,
            task.inputs("validation")[:samples].to(place).split(_BATCH),
            importance=importance,
            bits=bits,
            copies=copies,
            quantize=quantize,
            keep_original=keep_original,
            score=score if importance == "removal" else None,
            seed=seed,
        )
        progress("measuring", 0.7)
        before, after = (task.score(one, "test") for one in (network, report.model))
        progress("writing", 0.95)
        save(report.model, out, meta={**read_config(model)["meta"], "results": after})
    result = {
        "model": str(model),
        "out": str(out),
        "bits": bits,
        "layers": {name: _as_json(layer) for name, layer in report.layers.items()},
        "bytes": {"before": report.bytes_before, "after": report.bytes_after},
        "test": {"before": before, "after": after},
    }
    if json:
        print_json(result)
        return
    _show(result)
    typer.echo(
        f"{metric.title} on the test part: {metric.show(before[metric.key])}, {metric.show(after[metric.key])} now"
    )
    say(f"written: {shlex.quote(str(out))}; look at it: spectralmoe evaluate {shlex.quote(str(out))}", indent="  ")


def _as_json(layer: LayerReport) -> dict[str, Any]:
    """The result for one layer, as JSON values."""
    return {
        "load": layer.counts.tolist(),
        "importance": None if layer.importance is None else layer.importance.tolist(),
        "replicated": list(layer.replicated),
        "quantised": list(layer.quantised),
        "places": list(layer.places),
        "imbalance": {"before": layer.imbalance_before, "after": layer.imbalance_after},
        "bytes": {"before": layer.bytes_before, "after": layer.bytes_after},
    }


def _show(result: Mapping[str, Any]) -> None:
    """A table of what was copied and quantised, and what that leaves of imbalance and bytes."""
    rows = [
        [
            name,
            *(", ".join(map(str, layer[key])) or "none" for key in ("replicated", "quantised")),
            " -> ".join(f"{value:.2f}" for value in layer["imbalance"].values()),
            " -> ".join(f"{value:,}" for value in layer["bytes"].values()),
        ]
        for name, layer in result["layers"].items()
    ]
    headings = ["layer", "copied", "quantised", "imbalance", "bytes of experts"]
    print_table(f"integers of {result['bits']} bits", headings, rows)
