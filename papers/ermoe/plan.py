"""What the card runs: routers in front of one bank in eigen-form, on images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measure import about_bases

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import (
    ROUTING_COLUMNS,
    Card,
    Contest,
    Section,
    difference_panels,
    small_images,
)
from spectralmoe.experiments.compare.columns import Column

EIGEN = {"type": "eigen", "rank": "= max(1, dim // num_experts)"}
RANDOM = {"type": "variants:RandomBases", "rank": "= max(1, dim // num_experts)"}

ROWS: dict[str, Any] = {
    "linear": {"scorer": "linear", "selector": {"type": "topk", "normalize": True}, "experts": EIGEN},
    "linear+balanced": {"preset": "linear+balanced", "normalize": True, "experts": EIGEN},
    "linear+threshold": {"scorer": "linear", "selector": {"type": "threshold", "score": "sigmoid"}, "experts": EIGEN},
    "context": "ermoe-context",
    "context, random": {"preset": "ermoe-context", "scorer": {**RANDOM, "score": "context"}},
    "context, free": {"preset": "ermoe-context", "experts": {**EIGEN, "type": "variants:FreeExperts"}},
    "context+load_balance": {"preset": "ermoe-context", "terms": {"load_balance": 1e-2}},
    "energy": "ermoe",
    "energy, random": {"preset": "ermoe", "scorer": {**RANDOM, "score": "energy"}},
}
"""The same bank behind every router. "random": in bases that no expert has; "free": experts that leave their form."""

PAIRS = (
    ("linear+balanced", "linear"),
    ("linear+threshold", "linear"),
    ("context", "linear"),
    ("context", "linear+balanced"),
    ("context", "linear+threshold"),
    ("context", "context, random"),
    ("context", "context, free"),
    ("context+load_balance", "context"),
    ("energy", "linear"),
    ("energy", "energy, random"),
    ("energy", "context"),
)
"""What is compared seed by seed: with the linear gate, with the control, and each with one thing left out or added."""

ABOUT = """
Written by `spectralmoe card papers/ermoe`: mean and 95% interval over seeds; the test part chose nothing. Differences
are paired: the same seed, so the same start and the same order of images, on the same processor; "separated" where
their 95% interval leaves out 0. Eligible: pairs of a token and an expert that reach the threshold. Likeness of bases:
mean of ||V_i'V_j||² / R over pairs of experts, R/D = 0.125 for random ones. Flips: tokens whose experts change under
noise of 5% of their norm, what the attention gave being held. Single cells are not stable across processors, means over
seeds are.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
OWN = (
    Column("flips", "flips %", 1, "tokens whose experts change under noise of 5%", 100.0, better="lower"),
    Column("experts_used", "experts a token", 2, "slots that hold an expert"),
    Column("eligible", "eligible %", 1, "pairs of token and expert that reach the threshold", 100.0),
    Column("basis_overlap", "likeness of bases", 3, "mean squared projection of one expert's basis on another's"),
    Column("off_manifold", "off manifold", 3, "largest entry of V'V - 1"),
)
COLUMNS = (ACCURACY, *(column for column in ROUTING_COLUMNS if column.key != "noise_flips"), *OWN)
DIFFERENCES = (ACCURACY, *COLUMNS[1:4], OWN[0], OWN[3])
DRAWN = ("accuracy", "max_vio", "flips")


def card(contest: Contest, seeds: int) -> Card:
    """One form of the card."""
    steps = [contest.tuning(), contest.cells(seeds)]
    return Card("ERMoE", ABOUT, contest.settings, steps, sections, figures)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """One table, and the differences."""
    return [Section("## Images", stored["results"], COLUMNS, pairs=PAIRS, differences=DIFFERENCES)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the linear gate."""
    columns = [column for column in COLUMNS if column.key in DRAWN]
    return {"differences": difference_panels(stored["results"], columns, "linear")}


FULL = card(
    Contest(small_images(4_000, 3), ROWS, tries=3, tune_size=2_000, tune_epochs=2, more=about_bases),
    seeds=5,
)
QUICK = card(Contest(small_images(128, 1), ROWS, tries=1, more=about_bases), seeds=1)
