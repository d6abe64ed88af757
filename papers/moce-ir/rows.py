"""The rows: equal and unequal experts, and what the loss is told of their costs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from spectralmoe.experts import HeterogeneousExperts, PatchMixer

__all__ = ["COSTS", "PAIRS", "ROWS", "SIDE", "WIDTH", "costs_of"]

WIDTH, SIDE = 32, 8
"""The maps that experts get: D channels, side."""

UNEQUAL = ((4, 1), (8, 2), (16, 4), (32, 8))
EQUAL = ((17, 4),) * 4  # with as many parameters together
"""Rank and window of each expert."""

GATE = {"type": "spectrum", "statistics": False, "token": True}
"""Reads the maps' mean and the frequencies of the image, as the paper's gate reads a frequency embedding."""

SEVERITIES = 4


def costs_of(experts: Sequence[tuple[int, int]]) -> list[float]:
    """Operations of each expert on one map."""
    costs: list[float] = (
        HeterogeneousExperts([PatchMixer(WIDTH, *each) for each in experts]).costs((WIDTH, SIDE, SIDE)).tolist()
    )
    return costs


COSTS = costs_of(UNEQUAL)
PERMUTED = [*COSTS[-1:], *COSTS[:-1]]
"""Each expert is said to cost what the one before it costs, the cheapest as much as the dearest."""


def _row(experts: Sequence[tuple[int, int]], costs: Sequence[float], **gate: Any) -> dict[str, Any]:
    modules = [{"type": "patch_mixer", "rank": rank, "window": window} for rank, window in experts]
    return {
        "scorer": GATE,
        "selector": "noisy_topk",
        "experts": {"type": "heterogeneous", "modules": modules},
        "terms": {"complexity_balance": {"weight": 1e-2, "costs": list(costs)}},
        **gate,
    }


EVEN = [1.0] * len(COSTS)
ROWS: dict[str, dict[str, Any]] = {
    "one expert": {"preset": "dense", "experts": _row(EQUAL[:1], EVEN)["experts"]},
    "equal": _row(EQUAL, EVEN),
    "unequal": _row(UNEQUAL, EVEN),
    "unequal, costs": _row(UNEQUAL, COSTS),
    "unequal, permuted costs": _row(UNEQUAL, PERMUTED),
    "unequal, told": _row(UNEQUAL, COSTS, scorer={"type": "context", "key": "severity", "width": SEVERITIES}),
}
"""No choice; the usual balance over equal and over unequal experts; the method; the control; a gate that is told the
damage."""

PAIRS = (
    ("equal", "one expert"),
    ("unequal", "equal"),
    ("unequal, costs", "equal"),
    ("unequal, costs", "unequal"),
    ("unequal, costs", "unequal, permuted costs"),
    ("unequal, told", "unequal, costs"),
)
