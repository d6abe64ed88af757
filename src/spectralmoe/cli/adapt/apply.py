"""``spectralmoe adapt apply``: a saved correction, on the model that it was made for."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from spectralmoe.cli.adapt.options import ModelOptions
from spectralmoe.cli.console import print_json
from spectralmoe.cli.options import Out

__all__ = ["apply"]


def apply(
    options: ModelOptions,
    update: Annotated[Path, typer.Argument(metavar="UPDATE", help="The file update.safetensors of a correction.")],
    out: Out,
) -> None:
    """Apply a saved correction to MODEL and save the result to --out.

    Example: spectralmoe adapt apply MODEL runs/corrected/update.safetensors --out runs/applied
    """
    from spectralmoe.adaptation import apply_update
    from spectralmoe.cli.adapt.setup import adaptable_network, output_folder, save_like

    with output_folder(out, options.model):
        network, _ = adaptable_network(options)
        applied = apply_update(network, update)
        save_like(options.model, network, out)
    if options.json:
        about = {"model": str(options.model), "update": str(update)}
        print_json({**about, "touched": applied.touched, "change": applied.change})
        return
    experts = ", ".join(f"expert {expert} of {layer}" for layer, expert in applied.touched.items())
    typer.echo(f"applied {update}: {experts}, changed by {applied.change:.3g} (Euclidean norm); model saved to {out}")
