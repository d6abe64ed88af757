"""A receipt of a one-expert update as the page shows it."""

from __future__ import annotations

import math
from typing import Any

from spectralmoe.adaptation import receipt_lines
from spectralmoe.adaptation.receipt import Answer, Flip, Receipt
from spectralmoe.diagnostics import Change
from spectralmoe.report.documents import ReceiptFile

__all__ = ["receipt_panel"]

FLIPS = 100


def receipt_panel(file: ReceiptFile) -> dict[str, Any]:
    """Verdict, sentences, and tables of the predictions and of the samples that changed."""
    receipt = file.receipt
    first, *lines = receipt_lines(receipt)
    moved = [
        (name, _moved(part.flipped, part.interference))
        for name, part in (("reference", receipt.reference), ("test", receipt.test))
        if part is not None
    ]
    flips = [
        (name, *_flip(receipt, flip))
        for name, part in (("reference", receipt.reference), ("test", receipt.test))
        if part is not None
        for flip in part.flipped
    ]
    kept = receipt.success
    return {
        "title": file.title,
        "model": file.model,
        "state": "kept" if kept else "refused",
        "kept": kept,
        "verdict": "" if kept else "Refused.",
        "first": first,
        "lines": lines,
        "label": receipt.name(receipt.label),
        "answers": [("before", _answer(receipt, receipt.before)), ("after", _answer(receipt, receipt.after))],
        "moved": moved,
        "flips": flips[:FLIPS],
        "all_flips": len(flips),
        "picture": file.picture,
    }


def _answer(receipt: Receipt, answer: Answer) -> tuple[str, ...]:
    return receipt.name(answer.prediction), f"{answer.probability:.1%}", f"{answer.right:.1%}"


def _moved(flipped: tuple[Flip, ...], change: Change) -> tuple[str, ...]:
    interval = "no data" if math.isnan(change.mean) else f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return f"{change.samples:,}", f"{len(flipped):,}", f"{change.gained:,}", f"{change.lost:,}", interval


def _flip(receipt: Receipt, flip: Flip) -> tuple[str, ...]:
    kind = "better" if flip.after == flip.label else "worse" if flip.before == flip.label else "wrong either way"
    after = "" if flip.after is None else receipt.name(flip.after)
    return str(flip.index), receipt.name(flip.label), receipt.name(flip.before), after, kind
