"""Experts on several devices: how much the busiest one would do under the load of an inspection, layer by layer."""

from __future__ import annotations

from math import gcd
from typing import Any

from spectralmoe.errors import UserError
from spectralmoe.parallel import compare_plans, describe_plan, scaled_load
from spectralmoe.report.schema import Inspection, Layer

__all__ = ["PLANS", "TOKENS", "devices_panel", "layer_plans"]

PLANS = {
    "native": ("expert parallel", "each device computes its own experts"),
    "replicas": ("replicas", "each device also holds a copy of one of the experts that are busiest in this very load"),
    "least_loaded": ("least loaded", "tokens that a device cannot take go to the least loaded, with copies of experts"),
}
"""Plan -> its heading, and what it is."""

TOKENS = 8192
"""Tokens on each device in a step, as prefill and training have them."""

_DEVICES = 8


def layer_plans(body: Inspection, devices: int, *, tokens: int = TOKENS, **options: Any) -> list[dict[str, Any]]:
    """For each layer its names and, where it has a load, what each plan does with a step's slots in these shares.

    Args:
        options: those of ``compare_plans``.

    Raises:
        UserError: ``devices`` does not divide the experts of a layer; no layer has a load; options that are wrong.
    """
    rows = [_row(layer, devices, tokens, options) for layer in body.layers]
    if not any(row["plans"] for row in rows):
        raise UserError(f"{body.title} has no load: its model was not run; inspect it without --router-only")
    return rows


def _row(layer: Layer, devices: int, tokens: int, options: dict[str, Any]) -> dict[str, Any]:
    counts = layer.load.counts if layer.load else []
    names = {"name": layer.name, "layer": layer.layer, "stack": layer.stack, "experts": layer.experts}
    if not any(counts):
        return {**names, "slots": 0, "plans": None}
    slots = tokens * devices * max(layer.top_k or 1, 1)
    try:
        plans = compare_plans(scaled_load(counts, slots), devices, **options)
    except UserError as error:
        raise UserError(f"layer {layer.label}: {error}") from error
    return {**names, "slots": slots, "plans": {name: describe_plan(plan) for name, plan in plans.items()}}


def devices_panel(body: Inspection) -> dict[str, Any] | None:
    """The table of one inspection, on as many devices up to eight as divide its experts; None where there is none."""
    loaded = [layer for layer in body.layers if layer.load and any(layer.load.counts)]
    shared = gcd(*(layer.experts for layer in loaded))
    devices = max((d for d in range(2, _DEVICES + 1) if shared % d == 0), default=0)
    if not loaded or not devices:
        return None
    rows = layer_plans(body.model_copy(update={"layers": loaded}), devices)
    labels = [layer.label for layer in loaded]
    return {
        "title": body.title,
        "devices": devices,
        "tokens": f"{TOKENS:,}",
        "plans": list(PLANS.items()),
        "rows": [{**row, "label": label} for row, label in zip(rows, labels, strict=True)],
    }
