"""``spectralmoe adapt --image`` and ``--apply``: one correction with its receipt, and a saved one applied."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from spectralmoe.adaptation import Receipt, Update, apply_update, draw_receipt, make_receipt, receipt_lines
from spectralmoe.cli.adapt_setup import Task, Wishes, find_label, output_folder, prepare
from spectralmoe.cli.console import print_json, watching
from spectralmoe.errors import UserError
from spectralmoe.files import to_json, write_text
from spectralmoe.training.data import read_image
from spectralmoe.training.images import probe
from spectralmoe.training.network import ModelMeta

__all__ = ["apply_patch", "correct_image"]

PATCH, RECEIPT, PICTURE = "update.safetensors", "receipt.json", "receipt.svg"


def correct_image(wishes: Wishes, file: Path, label: str, out: Path) -> bool:
    """Correct one image; writes the receipt and, if it was kept, its picture, the patch and the corrected model.

    Returns:
        Whether the correction was kept.

    Raises:
        UserError: a label that the model does not know, an image of another size, a folder that cannot be written.
    """
    with output_folder(out, wishes.model), watching(quiet=wishes.json) as watch:
        watch("reading model and data", 0.0)
        task = prepare(wishes)
        y, x = find_label(label, task.meta), read_sample(file, task.meta)
        test, missing = _test_part(task)
        watch("correcting", 0.2)
        update = task.rule.correct(task.network, x, torch.tensor([y]), task.guard)
        watch("measuring what else moved", 0.7)
        classes = task.meta.classes
        receipt = make_receipt(task.network, x, y, update, guard=task.guard, test=test, classes=classes)
        about: dict[str, Any] = {"model": str(wishes.model), "image": str(file), "settings": task.settings}
        _write(task, out, x, update, receipt, about)
    if wishes.json:
        print_json({**about, **receipt.to_json()})
        return receipt.success
    lines = [*receipt_lines(receipt), *([f"test: none, {missing}"] if missing else [])]
    files = "receipt.json" if not receipt.success else f"model, {PATCH}, {RECEIPT}, {PICTURE}"
    files = files if receipt.written or not receipt.success else f"model (unchanged), {RECEIPT}, {PICTURE}"
    typer.echo("\n".join([task.said, *lines, f"written to {out}: {files}"]))
    return receipt.success


def read_sample(file: Path, meta: ModelMeta) -> Tensor:
    """The image (1, C, H, W) in ``file``.

    Raises:
        UserError: unreadable, or of another size than the model's.
    """
    _, found = probe(file)
    if found != meta.image_size:
        (height, width), (h, w) = meta.image_size, found
        raise UserError(
            f"{file} has an image of {h} x {w} pixels (height x width), but the model wants {height} x {width}; "
            "resize it first"
        )
    return read_image(file, channels=meta.channels, size=meta.image_size)[None]


def _test_part(task: Task) -> tuple[tuple[Tensor, Tensor] | None, str]:
    """Held-out samples; none, and why, where the model's own data cannot be had and no others were asked for."""
    try:
        test = task.data(task.wishes.data).test
    except UserError as error:
        if task.wishes.data is not None:
            raise
        return None, str(error)
    return (test.images, test.labels), ""


def _write(task: Task, out: Path, x: Tensor, update: Update, receipt: Receipt, about: dict[str, Any]) -> None:
    """The model last: a folder that holds one holds everything."""
    text = to_json({**about, **receipt.to_json()})
    if not receipt.success:
        write_text(out / RECEIPT, text)
        return
    picture = draw_receipt(receipt, x, None if task.guard is None else task.guard.samples)
    if update.touched:
        update.save(out / PATCH)
    write_text(out / PICTURE, picture)
    write_text(out / RECEIPT, text)
    task.save(out)


def apply_patch(wishes: Wishes, file: Path, out: Path) -> None:
    """Apply a saved update to the model and save the result.

    Raises:
        UserError: a patch for another model, or options that have no say here.
    """
    names = ("guard", "guard_size", "budget", "max_flips", "method", "layers", "lr", "max_steps", "carry", "data")
    if given := wishes.given(*names):
        raise UserError(f"--apply writes a finished update: {given[0]} has no say in it")
    with output_folder(out, wishes.model):
        task = prepare(wishes)
        update = apply_update(task.network, file)
        task.save(out)
    experts = ", ".join(f"expert {expert} of {layer}" for layer, expert in update.touched.items())
    if wishes.json:
        print_json(
            {"model": str(wishes.model), "update": str(file), "touched": update.touched, "change": update.change}
        )
        return
    typer.echo(f"applied {file}: {experts}, changed by {update.change:.3g} (Euclidean norm); model saved to {out}")
