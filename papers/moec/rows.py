"""The rows: one cosine gate, and what MoEC adds to it."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from spectralmoe import Record
from spectralmoe.regularizers import cluster_variance

__all__ = ["PAIRS", "ROWS", "SIBLINGS", "scaled_variance"]

SIBLINGS = 4
"""Experts of a group."""

RHO = 30.0
"""Weight of the variance beside the balance loss, before tuning; the paper's, 1, is of sums over tokens."""


def scaled_variance(record: Record, *, groups: int) -> Tensor:
    """E V: in the paper's loss the factor E stands before balance and variance alike."""
    return record.routing.num_experts * cluster_variance(record, groups=groups)


_GROUPS = f"= num_experts // {SIBLINGS}"
_BALANCE = {"load_balance": 1e-2}
_VARIANCE = {"type": "rows:scaled_variance", "weight": 1e-2 * RHO, "groups": _GROUPS}


def _row(groups: int | str | None, terms: dict[str, Any]) -> dict[str, Any]:
    """The gate of MoEC, with half of each of ``groups`` left out in training, drawn anew every ten steps."""
    row: dict[str, Any] = {"scorer": {"type": "cosine", "proj_dim": 32}, "terms": terms}
    if groups is not None:
        row["selector"] = {"type": "cluster_dropout", "selector": "topk", "groups": groups, "interval": 10}
    return row


ROWS: dict[str, dict[str, Any]] = {
    "balance": _row(None, _BALANCE),
    "+ variance": _row(None, {**_BALANCE, "variance": _VARIANCE}),
    "+ cluster dropout": _row(_GROUPS, _BALANCE),
    "+ uniform dropout": _row(1, _BALANCE),
    "MoEC": _row(_GROUPS, {**_BALANCE, "variance": _VARIANCE}),
}
"""The baseline, each half of the method, the control (as many experts left out, of all of them), the method."""

PAIRS = (
    ("+ variance", "balance"),
    ("+ cluster dropout", "balance"),
    ("+ uniform dropout", "balance"),
    ("MoEC", "balance"),
    ("+ cluster dropout", "+ uniform dropout"),
    ("MoEC", "+ uniform dropout"),
)
