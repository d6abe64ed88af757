"""The rows: gates, and what stands in the place of a missing view."""

from __future__ import annotations

from typing import Any

__all__ = ["GATES", "GATE_PAIRS", "PLACEHOLDERS", "PLACEHOLDER_PAIRS", "ROWS"]

_FEED_FORWARD = {"type": "feed_forward", "activation": "gelu", "bias": True}
_CONFIDENT = {"type": "confident", "experts": _FEED_FORWARD}


def _unweighted(router_grad: str) -> dict[str, Any]:
    return {"type": "unweighted", "selector": "topk", "router_grad": router_grad}


ROWS: dict[str, dict[str, Any]] = {
    "softmax": {"scorer": "linear"},
    "softmax + Switch": {"scorer": "linear", "terms": {"load_balance": 1e-2}},
    "softmax + Balanced": {
        "scorer": "linear",
        "selector": {"type": "balanced", "score": "softmax", "normalize": False, "rate": 1e-2},
    },
    "no gate": {"scorer": "linear", "selector": _unweighted("none")},
    "confidence": {"scorer": "linear", "selector": _unweighted("none"), "experts": _CONFIDENT},
    "confidence, router learns": {
        "scorer": "linear",
        "selector": _unweighted("confidence"),
        "experts": _CONFIDENT,
    },
}
"""The baseline; with the Switch loss and with the loss-free bias, the controls; the router that is left as it was drawn
and weighs nothing, the method less its confidence; the method; the method with a router that learns."""

GATES = tuple(ROWS)
GATE_PAIRS = (
    ("confidence", "softmax"),
    ("confidence", "softmax + Switch"),
    ("confidence", "softmax + Balanced"),
    ("confidence", "no gate"),
    ("confidence, router learns", "confidence"),
    ("confidence, router learns", "softmax + Balanced"),
)

PLACEHOLDERS: dict[str, dict[str, Any]] = {
    "zeros": {"placeholder": "zeros", "keep": 0},
    "noise": {"placeholder": "noise", "keep": 0},
    "stage 1": {"placeholder": "pool", "keep": 0},
    "stages 1 + 2": {"placeholder": "pool", "keep": 1},
    "stages 1 + 2, T = 2": {"placeholder": "pool", "keep": 2},
    "noise, stage 2": {"placeholder": "noise", "keep": 1},
}
"""Settings of [views]: the mean of a view, noise in its place (the control), the mean of ten samples, and the second
stage behind it, which fills from one view that is there, from two, or behind noise (its control)."""

PLACEHOLDER_PAIRS = (
    ("stage 1", "zeros"),
    ("stage 1", "noise"),
    ("stages 1 + 2", "stage 1"),
    ("stages 1 + 2", "zeros"),
    ("stages 1 + 2", "noise"),
    ("stages 1 + 2", "noise, stage 2"),
    ("stages 1 + 2, T = 2", "stages 1 + 2"),
)
