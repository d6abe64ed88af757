"""The rows of the card: gates at four prices, chance at five shares, and the gate that is told the answer."""

from __future__ import annotations

from typing import Any

__all__ = ["CHANCE", "CONTENT", "PRICES", "ROWS", "SHARES", "SPECTRUM", "TOLD"]

PRICES = (0.0, 0.03, 0.06, 0.1)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SELECTOR = {"type": "noisy_topk", "noise_std": 0.5}
BALANCE = 0.3  # with the noise it keeps both experts learning: without, every gate ends at the light one


def gate(scorer: str, price: float) -> dict[str, Any]:
    """A learned gate, one expert a record, with the Switch loss and a price on the heavy expert."""
    terms = {"load_balance": BALANCE, **({"expected_cost": price} if price else {})}
    return {"scorer": scorer, "selector": SELECTOR, "terms": terms}


SPECTRUM = {f"spectrum, price {price:g}": gate("spectrum", price) for price in PRICES}
CONTENT = {f"content, price {price:g}": gate("gates:ContentScorer", price) for price in PRICES}
CHANCE = {f"chance {share:.0%}": {"scorer": {"type": "gates:ChanceScorer", "share": share}} for share in SHARES}
TOLD = "told the number"
FIXED = {"scorer": "gates:EvenScorer", "selector": {"type": "topk", "score": "sigmoid"}}
ROWS: dict[str, dict[str, Any]] = {**CHANCE, **SPECTRUM, **CONTENT, TOLD: FIXED}
"""Row -> what ``find_preset`` reads; the choice of the told gate is replayed, so its scorer says nothing."""
