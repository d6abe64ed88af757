"""What the card runs: L2R's gate, its parts taken away one by one, and the gates that it is to be better than."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.diagnostics.stability import changed_between
from spectralmoe.diagnostics.watch import watch
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import (
    ROUTING_COLUMNS,
    Card,
    Contest,
    Section,
    Trained,
    difference_panels,
    small_images,
)
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.layers import moe_layers
from spectralmoe.scorers import LinearScorer, SaturatedScorer, Scorer

RANK = 16
GAIN, CONSTANT_GAIN, GAIN_OF_FOUR = 5.25, 4.0, 9.0  # logits of all rows start with a variance of about 1
SELECTOR = {"type": "balanced", "score": "softmax", "normalize": False, "rate": 1e-2}
SCORERS: Mapping[str, Mapping[str, Any]] = {
    "linear": {"type": "linear"},
    "two layers": {"type": "gates:TwoLayerScorer", "rank": RANK},
    "low rank": {"type": "gates:LowRankScorer", "rank": RANK},
    "cosine": {"type": "cosine", "proj_dim": RANK, "temperature": 0.25},
    "l2r": {"type": "saturated", "rank": RANK, "gain": GAIN},
    "l2r, phi constant": {"type": "gates:ConstantScorer", "rank": RANK, "gain": CONSTANT_GAIN},
    "l2r, 4 anchors": {"type": "saturated", "rank": RANK, "anchors": 4, "gain": GAIN_OF_FOUR},
}
ROWS = {name: {"scorer": scorer, "selector": SELECTOR} for name, scorer in SCORERS.items()}
PAIRS = (
    ("l2r", "linear"),
    ("l2r", "two layers"),
    ("l2r", "low rank"),
    ("l2r", "cosine"),
    ("l2r", "l2r, phi constant"),
    ("l2r, 4 anchors", "l2r"),
    ("l2r, 4 anchors", "linear"),
)
SCALE, SATURATED, INPUTS = 1.5, 0.99, 64


@torch.no_grad()
def look(trained: Trained) -> dict[str, float | None]:
    """What L2R is about, mean over layers: choices under x -> 1.5 x, crowded anchors, saturated tokens."""
    scorers = {name: layer.router.scorer for name, layer in moe_layers(trained.network).items()}
    measured: dict[str, list[float]] = {"scale_flips": [], "crowding": [], "saturated": []}
    with watch(trained.network) as seen:
        run_over(trained.network, trained.task.inputs("test")[:INPUTS])
        calls = seen.drain()
    for call in calls:
        scorer = scorers[call.layer.name]
        flips = changed_between(call.layer.route(call.tokens), call.layer.route(SCALE * call.tokens))
        measured["scale_flips"].append(flips.value)
        measured["crowding"].append(crowding(anchors_of(scorer)))
        if type(scorer) is SaturatedScorer:
            norm = F.linear(call.tokens.float(), scorer.projection).norm(dim=-1)
            measured["saturated"].append(float((norm.tanh() > SATURATED).float().mean()))
    return {key: mean_of(values) if values else None for key, values in measured.items()}


def anchors_of(scorer: Scorer) -> Tensor:
    """The vectors (E, A, R) that queries are compared with; rows of a linear gate have A = 1 and R = D."""
    keys = scorer.weight if isinstance(scorer, LinearScorer) else scorer.keys
    return keys if keys.dim() == 3 else keys[:, None]


def crowding(anchors: Tensor) -> float:
    """The largest |cos| of two anchors (E, A, R) of different experts."""
    experts, each, _ = anchors.shape
    unit = F.normalize(anchors.flatten(0, 1), dim=-1)
    owner = torch.arange(experts).repeat_interleave(each)
    return float((unit @ unit.T).abs().masked_fill(owner[:, None] == owner, 0).max())


def card(contest: Contest, seeds: int) -> Card:
    """One form of the card."""
    return Card("L2R", ABOUT, contest.settings, [contest.tuning(), contest.cells(seeds)], sections, figures)


ABOUT = """
Written by `spectralmoe card papers/l2r`: mean and 95% interval over seeds; the test part chose nothing. All rows have
the loss-free selection bias and one expert a token, and start with logits of variance about 1. Flips: tokens whose
choice changes under noise of 5% of their norm, and under x -> 1.5 x. Crowding: largest |cos| of two anchors of
different experts, mean over layers (of rows in 64 dimensions for the linear gate, of keys in 16 for the others).
Saturated: tokens with tanh |q| above 0.99. Differences are paired: the same seed, so the same start and the same order
of images, on the same processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across
processors, means over seeds are.
"""

OWN = (
    Column(
        "scale_flips", "flips under scale %", 1, "tokens whose choice changes under x -> 1.5 x", 100.0, better="lower"
    ),
    Column("crowding", "crowding", 2, "largest |cos| of two anchors of different experts", better="lower"),
    Column("saturated", "saturated %", 0, "tokens with tanh of their query's norm above 0.99", 100.0),
)
ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
COLUMNS = (ACCURACY, *ROUTING_COLUMNS, *OWN)
BY_KEY = {column.key: column for column in COLUMNS}
DRAWN = ("accuracy", "noise_flips", "scale_flips", "max_vio")
COMPARED = (*DRAWN, "crowding", "output_centred", "entropy")


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table by row, and the differences."""
    compared = [BY_KEY[key] for key in COMPARED]
    return [Section("## Gates", stored["results"], COLUMNS, pairs=PAIRS, differences=compared)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the linear gate."""
    return {"gates": difference_panels(stored["results"], [BY_KEY[key] for key in DRAWN], "linear")}


FULL = card(Contest(small_images(3_000, 6, experts=16, k=1), ROWS, tries=3, tune_epochs=3, more=look), seeds=5)
QUICK = card(Contest(small_images(128, 1, experts=16, k=1), ROWS, tries=1, more=look), seeds=1)
