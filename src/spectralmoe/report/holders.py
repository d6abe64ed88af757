"""The panel of what each expert adds to a token: for each text the experts, those with the largest gain first."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectralmoe.report.measures import figure
from spectralmoe.report.schema import Holders, Inspection, Layer

__all__ = ["holders_panel"]

SHOWN, BEFORE = 24, 400


def holders_panel(body: Inspection) -> dict[str, Any] | None:
    """The tables of one inspection; None where no token was asked about."""
    texts = [_text(held, body.layers) for held in body.holders]
    return {"title": body.title, "texts": texts} if texts else None


def _text(held: Holders, named: Sequence[Layer]) -> dict[str, Any]:
    layers = {row.layer: row.gain for row in held.layers}
    known = [(row, row.gain or 0.0) for row in held.experts]
    ordered = sorted(known, key=lambda pair: -pair[1])
    largest = max((abs(gain) for _, gain in ordered), default=0.0) or 1.0
    rows = [
        {
            "label": named[row.layer].label,
            "name": named[row.layer].name,
            "expert": "shared" if row.expert is None else str(row.expert),
            "weight": figure(row.weight),
            "gain": gain,
            "shown": f"{'+' if gain > 0 else ''}{figure(row.gain)}",
            "share": f"{100 * abs(gain) / largest:.0f}",
            "layer_gain": figure(layers.get(row.layer)),
        }
        for row, gain in ordered
    ]
    return {
        "before": "".join(held.pieces[:-1])[-BEFORE:].lstrip(),
        "last": held.pieces[-1],
        "log_prob": figure(held.log_prob),
        "rows": rows[:SHOWN],
        "more": max(0, len(rows) - SHOWN),
    }
