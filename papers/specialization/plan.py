"""What the card runs: the losses of Guo et al. beside a balance loss, alone and together, and what noise alone does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectralmoe import record
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import (
    ROUTING_COLUMNS,
    Card,
    Contest,
    Desk,
    Section,
    Trained,
    Tuning,
    difference_panels,
    small_images,
)
from spectralmoe.experiments.cards.contest import measure_cell, tune_row
from spectralmoe.experiments.cards.plan import Identity, Share
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.regularizers import output_overlap, score_variance
from spectralmoe.tape import Record

BALANCE = {"load_balance": 1e-2}
OVERLAP, VARIANCE = {"output_overlap": 0.1}, {"score_variance": 0.5}  # each starts as large as the balance loss
COSINE = {"output_overlap": {"weight": 0.3, "form": "cosine"}}
TERMS: Mapping[str, Mapping[str, Any]] = {
    "aux": BALANCE,
    "aux + o": {**BALANCE, **OVERLAP},
    "aux + v": {**BALANCE, **VARIANCE},
    "aux + o + v": {**BALANCE, **OVERLAP, **VARIANCE},
    "aux + cosine + v": {**BALANCE, **COSINE, **VARIANCE},
}
FLOOR, LARGER = "aux, lr x1.1", 1.1
ROWS = {row: {"scorer": "linear", "terms": terms} for row, terms in {**TERMS, FLOOR: BALANCE}.items()}
PAIRS = (
    *((row, "aux") for row in ROWS if row != "aux"),
    ("aux + cosine + v", "aux + o + v"),
    ("aux + o + v", FLOOR),
)
INPUTS = 48


@torch.no_grad()
def look(trained: Trained) -> dict[str, float]:
    """What the losses are about, mean over layers, of the outputs of the chosen experts on test images."""
    with evaluation_mode(trained.network), record(trained.network, keep="output") as tape:
        trained.network(trained.task.inputs("test")[:INPUTS])
    measured: dict[str, list[Tensor]] = {
        "chosen_overlap": [pair_cosine(item) for item in tape],
        "output_norm": [item.output.norm(dim=1).mean() for item in tape],
        "foreign_neighbours": [foreign_neighbours(item) for item in tape],
        "score_variance": [-score_variance(item) for item in tape],
    }
    return {key: float(torch.stack(values).mean()) for key, values in measured.items()}


def pair_cosine(item: Record) -> Tensor:
    """Mean squared cosine of the outputs of two experts that serve one token."""
    k = item.routing.indices.shape[1]
    return output_overlap(item, form="cosine") / (k * (k - 1))


def foreign_neighbours(item: Record) -> Tensor:
    """Share of outputs whose nearest other output is one of another expert."""
    expert = item.routing.indices.flatten()[item.order]
    distances = torch.cdist(item.output, item.output).fill_diagonal_(torch.inf)
    return (expert[distances.argmin(1)] != expert).float().mean()


def measure(cell: Identity, desk: Desk, progress: Share, *, contest: Contest) -> dict[str, Any]:
    """One cell; that of the noise floor has the settings of its row without the losses, at a larger learning rate."""
    if cell["row"] == FLOOR:
        setting = desk.tuned[contest.tuned]["aux"]["setting"]
        larger = {FLOOR: {"setting": {**setting, "lr": LARGER * setting["lr"]}}}
        desk = Desk(desk.work, {contest.tuned: larger})
    return measure_cell(cell, desk, progress, contest=contest)


def card(contest: Contest, seeds: int) -> Card:
    """One form of the card."""
    tuning = Tuning(contest.tuned, list(TERMS), partial(tune_row, contest=contest))
    cells = replace(contest.cells(seeds), measure=partial(measure, contest=contest))
    return Card("Expert specialization", ABOUT, contest.settings, [tuning, cells], sections, figures)


ABOUT = """
Written by `spectralmoe card papers/specialization`: mean and 95% interval over seeds; the test part chose nothing. All
rows have a linear gate and two of eight experts a token. Chosen cos²: squared cosine of the outputs of two experts that
serve one token; output cos²: of any two experts, on the same tokens. Foreign neighbours: outputs whose nearest other
output is one of another expert. Variance: of an expert's scores over tokens. Differences are paired: the same seed, so
the same start and the same order of images, on the same processor; "separated" where their 95% interval leaves out 0.
Single cells are not stable across processors, means over seeds are.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
OWN = (
    Column("chosen_overlap", "chosen cos²", 3, "of the outputs of a token's two experts", better="lower"),
    Column("output_norm", "norm of outputs", 2, "mean length of an expert's output"),
    Column("foreign_neighbours", "foreign neighbours %", 1, "outputs nearest to another expert's", 100.0, "lower"),
    Column("score_variance", "variance", 4, "of an expert's scores over tokens", better="higher"),
)
COLUMNS = (ACCURACY, *OWN, *ROUTING_COLUMNS)
BY_KEY = {column.key: column for column in COLUMNS}
DRAWN = ("accuracy", "chosen_overlap", "output_norm", "max_vio")
COMPARED = (*DRAWN, "output_centred", "foreign_neighbours", "score_variance")


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table by row, and the differences."""
    compared = [BY_KEY[key] for key in COMPARED]
    return [Section("## Losses", stored["results"], COLUMNS, pairs=PAIRS, differences=compared)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the balance loss alone."""
    return {"losses": difference_panels(stored["results"], [BY_KEY[key] for key in DRAWN], "aux")}


FULL = card(Contest(small_images(), ROWS, tries=3, tune_epochs=2, more=look), seeds=5)
QUICK = card(Contest(small_images(128, 1), ROWS, tries=1, more=look), seeds=1)
