"""``spectralmoe adapt correct``: one correction with its receipt."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.adapt.options import AdaptOptions
from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.cli.options import Out, say_notes
from spectralmoe.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from spectralmoe.adaptation import Receipt, Update
    from spectralmoe.cli.adapt.setup import Prepared

__all__ = ["correct"]

UPDATE, RECEIPT, PICTURE = "update.safetensors", "receipt.json", "receipt.svg"


def correct(
    options: AdaptOptions,
    out: Out,
    sample: Annotated[
        str | None, typer.Option(metavar="PART:N", help="Correct this sample of the data, such as test:43.")
    ] = None,
    image: Annotated[Path | None, typer.Option(metavar="F", help="Correct this image; with --label.")] = None,
    label: Annotated[
        str | None,
        typer.Option(metavar="CLASS", help="The right class, by name or number; of --sample by default the data's."),
    ] = None,
) -> None:
    """Correct one image by one expert a layer; writes the receipt and, if it was kept, picture, update and model.

    Examples: spectralmoe adapt correct MODEL --sample test:43 --guard mnist5k --out runs/corrected

    spectralmoe adapt correct MODEL --image seven.png --label 7 --guard mnist5k --out runs/corrected

    A correction that is refused ends with exit code 1. 'spectralmoe evaluate MODEL --wrong DIR' shows which samples are
    wrong.
    """
    import torch

    from spectralmoe.adaptation import make_receipt, receipt_lines
    from spectralmoe.cli.adapt.sample import read_place, sample_in_file, sample_of_data
    from spectralmoe.cli.adapt.setup import output_folder, prepare

    if (sample is None) == (image is None):
        raise UserError("name what to correct: --sample PART:N of the data, or --image F with --label, one of them")
    if image is not None and label is None:
        raise UserError("--image has no class of its own: give --label with it")
    if sample is not None:
        read_place(sample)  # before a model and its data are read
    with output_folder(out, options.model), show_progress(quiet=options.json) as progress:
        progress("reading model and data", 0.0)
        prepared = prepare(options)
        if image is None:
            wrong = sample_of_data(str(sample), label, prepared.data(), prepared.meta)
        else:
            wrong = sample_in_file(image, str(label), prepared.meta)
        test, missing = _test_part(prepared)
        progress("correcting", 0.2)
        network, guard = prepared.network, prepared.guard
        update = prepared.rule.correct(network, wrong.image, torch.tensor([wrong.label]), guard)
        progress("measuring what else moved", 0.7)
        classes = prepared.meta.classes
        receipt = make_receipt(network, wrong.image, wrong.label, update, guard=guard, test=test, classes=classes)
        about = {"model": str(options.model), **wrong.about, "settings": prepared.settings}
        _write(prepared, out, wrong.image, update, receipt, about)
    if wrong.converted:
        say_notes([wrong.converted])
    if options.json:
        print_json({**about, **receipt.to_json()})
    else:
        lines = [*receipt_lines(receipt), *([f"test: none, {missing}"] if missing else [])]
        typer.echo("\n".join([prepared.chosen, *lines, f"written to {out}: {_files(receipt)}"]))
    if not receipt.success:
        raise typer.Exit(1)


def _test_part(prepared: Prepared) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """Held-out samples; none, with the reason, if the model's own data are not available and no others are named."""
    try:
        test = prepared.data().test
    except UserError as error:
        if prepared.options.data is not None:
            raise
        return None, str(error)
    return (test.images, test.labels), ""


def _write(prepared: Prepared, out: Path, x: Tensor, update: Update, receipt: Receipt, about: dict[str, Any]) -> None:
    """Write the model last, so that a folder with a model is complete."""
    from spectralmoe.adaptation import draw_receipt
    from spectralmoe.cli.adapt.setup import save_like
    from spectralmoe.files import write_text
    from spectralmoe.json_files import to_json

    text = to_json({**about, **receipt.to_json()})
    if not receipt.success:
        write_text(out / RECEIPT, text)
        return
    picture = draw_receipt(receipt, x, None if prepared.guard is None else prepared.guard.samples)
    if update.touched:
        update.save(out / UPDATE)
    write_text(out / PICTURE, picture)
    write_text(out / RECEIPT, text)
    save_like(prepared.options.model, prepared.network, out)


def _files(receipt: Receipt) -> str:
    """The files that ``_write`` wrote."""
    if not receipt.success:
        return RECEIPT
    return f"model, {UPDATE}, {RECEIPT}, {PICTURE}" if receipt.written else f"model (unchanged), {RECEIPT}, {PICTURE}"
