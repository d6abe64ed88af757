"""``spectralmoe adapt --sample``, ``--image`` and ``--apply``: one correction with its receipt, or a saved one."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import typer
from torch import Tensor

from spectralmoe.adaptation import Receipt, Update, apply_update, draw_receipt, make_receipt, receipt_lines
from spectralmoe.cli.adapt_setup import Task, Wishes, find_label, output_folder, prepare
from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.cli.options import say_notes
from spectralmoe.data.image_files import conversions, read_image
from spectralmoe.errors import UserError
from spectralmoe.files import to_json, write_text

__all__ = ["apply_patch", "correct"]

PATCH, RECEIPT, PICTURE = "update.safetensors", "receipt.json", "receipt.svg"
PARTS = {"train": "train", "validation": "validation", "val": "validation", "test": "test"}


@dataclass(frozen=True, slots=True)
class _Sample:
    """What is corrected: an image (1, C, H, W), its class, where it comes from, and how it was converted ("": not)."""

    image: Tensor
    label: int
    about: dict[str, Any]
    converted: str = ""


def correct(wishes: Wishes, source: Path | str | None, label: str | None, out: Path) -> bool:
    """Correct one image; writes the receipt and, if it was kept, its picture, the patch and the corrected model.

    Args:
        source: an image file, or a sample of the data such as "test:43".
        label: its class; None: as the data say.

    Returns:
        Whether the correction was kept.

    Raises:
        UserError: a sample that there is not, a label that the model does not know, a folder that cannot be written.
    """
    with output_folder(out, wishes.model), show_progress(quiet=wishes.json) as progress:
        progress("reading model and data", 0.0)
        task = prepare(wishes)
        sample = _from_file(source, label, task) if isinstance(source, Path) else _from_data(str(source), label, task)
        x, y = sample.image, sample.label
        test, missing = _test_part(task)
        progress("correcting", 0.2)
        update = task.rule.correct(task.network, x, torch.tensor([y]), task.guard)
        progress("measuring what else moved", 0.7)
        classes = task.meta.classes
        receipt = make_receipt(task.network, x, y, update, guard=task.guard, test=test, classes=classes)
        about: dict[str, Any] = {"model": str(wishes.model), **sample.about, "settings": task.settings}
        _write(task, out, x, update, receipt, about)
    if sample.converted:
        say_notes([sample.converted])
    if wishes.json:
        print_json({**about, **receipt.to_json()})
        return receipt.success
    lines = [*receipt_lines(receipt), *([f"test: none, {missing}"] if missing else [])]
    files = "receipt.json" if not receipt.success else f"model, {PATCH}, {RECEIPT}, {PICTURE}"
    files = files if receipt.written or not receipt.success else f"model (unchanged), {RECEIPT}, {PICTURE}"
    typer.echo("\n".join([task.said, *lines, f"written to {out}: {files}"]))
    return receipt.success


def _from_file(file: Path, label: str | None, task: Task) -> _Sample:
    """The image in ``file``, read as ``predict`` reads it."""
    meta, y = task.meta, find_label(label or "", task.meta)
    image = read_image(file, channels=meta.channels, size=meta.image_size)[None]
    converted = conversions([file], channels=meta.channels, size=meta.image_size)
    return _Sample(image, y, {"image": str(file), "sample": None, "converted": converted or None}, converted)


def _from_data(text: str, label: str | None, task: Task) -> _Sample:
    """Sample N of a part of the data: ``text`` is PART:N."""
    name, _, number = text.partition(":")
    if name not in PARTS or not number.isdecimal():
        raise UserError(f"--sample {text!r} is not a part and a number such as test:43; parts: train, validation, test")
    data, part = task.data(task.wishes.data), PARTS[name]
    split, index = getattr(data, part), int(number)
    if index >= len(split):
        raise UserError(f"--sample {text}: the {part} part of {data.name} has the samples 0 to {len(split) - 1}")
    y = int(split.labels[index]) if label is None else find_label(label, task.meta)
    about = {"data": data.name, "part": part, "number": index}
    return _Sample(split.images[index : index + 1], y, {"image": None, "sample": about, "converted": None})


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
