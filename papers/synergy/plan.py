"""What the card runs: both synergistic losses beside a balance loss, and terms that could explain what they bring."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from matching import match_row, with_entropy

from spectralmoe import record
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.diagnostics.paths import joint_counts, mutual_information
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
    small_text,
)
from spectralmoe.experiments.cards.contest import measure_cell, tune_row
from spectralmoe.experiments.cards.plan import Identity, Share
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.regularizers import activation_overlap, path_coupling
from spectralmoe.training.settings.run import TrainSettings

BALANCE = {"load_balance": 1e-2}
OVERLAP, COUPLING = {"activation_overlap": 0.1}, {"path_coupling": 1e-2}  # the paper: 2e-3 and 1e-3
TERMS: Mapping[str, Mapping[str, Any]] = {
    "lb": BALANCE,
    "lb + sp": {**BALANCE, **OVERLAP},
    "lb + cp": {**BALANCE, **COUPLING},
    "lb + sp + cp": {**BALANCE, **OVERLAP, **COUPLING},
    "lb + z": {**BALANCE, "router_z": 1e-3},
}
MATCHED = "lb + entropy"
ROWS = {row: {"scorer": "linear", "terms": terms} for row, terms in {**TERMS, MATCHED: BALANCE}.items()}
PAIRS = (
    *((row, "lb") for row in ROWS if row != "lb"),
    ("lb + cp", MATCHED),
    ("lb + sp + cp", "lb + cp"),
    ("lb + sp + cp", MATCHED),
)
INPUTS = 64


@torch.no_grad()
def look(trained: Trained) -> dict[str, float | None]:
    """What the losses are about, on test windows, mean over layers or pairs of layers."""
    with evaluation_mode(trained.network), record(trained.network, keep="hidden") as tape:
        trained.network(trained.task.inputs("test")[:INPUTS])
    paths = [mutual_information(joint_counts(a.routing, b.routing)).value for a, b in pairwise(tape)]
    return {
        "hidden_overlap": float(torch.stack([activation_overlap(item) for item in tape]).mean()),
        "mass": -float(path_coupling(tape)),
        "path_information": mean_of([value for value in paths if value is not None]),
    }


def measure(cell: Identity, desk: Desk, progress: Share, *, contest: Contest) -> dict[str, Any]:
    """One cell; that of the control has the entropy term with the weight that was matched."""
    if cell["row"] == MATCHED:
        matched = desk.tuned["matching"][MATCHED]
        contest = replace(contest, rows={MATCHED: with_entropy(ROWS[MATCHED], matched["weight"])})
        desk = Desk(desk.work, {contest.tuned: {MATCHED: matched}})
    return measure_cell(cell, desk, progress, contest=contest)


def card(contest: Contest, seeds: int, weights: Sequence[float]) -> Card:
    """One form of the card.

    Args:
        weights: of the entropy term, tried to match the entropy of the row with the coupling loss.
    """
    tuning = Tuning(contest.tuned, list(TERMS), partial(tune_row, contest=contest))
    match = partial(match_row, contest=contest, like="lb + cp", base="lb", weights=weights)
    cells = replace(contest.cells(seeds), measure=partial(measure, contest=contest))
    settings = {**contest.settings, "weights": list(weights)}
    return Card(
        "Synergistic losses", ABOUT, settings, [tuning, Tuning("matching", [MATCHED], match), cells], sections, figures
    )


ABOUT = """
Written by `spectralmoe card papers/synergy`: mean and 95% interval over seeds; the test part chose nothing. All rows
have a linear gate and two of eight experts a token. Hidden cos²: squared cosine of the hidden activations of two
experts that serve one token; of independent random ones it is 1/H = 0.016. Mass: product of the probabilities that the
chosen experts have in two neighbouring layers. Path information: normalised mutual information of a token's first
expert in one layer and in the next. The entropy term of the control has the weight that gives the routing entropy of
lb + cp on the budget of tuning. Differences are paired: the same seed, so the same start and the same order of text, on
the same processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across processors,
means over seeds are.
"""

BITS = Column("bits_per_byte", "bits/byte", 4, "of held-out text", better="lower")
OWN = (
    Column("hidden_overlap", "hidden cos²", 4, "of the hidden activations of a token's two experts", better="lower"),
    Column("mass", "mass", 3, "of the chosen experts of neighbouring layers"),
    Column("path_information", "path information", 3, "of the experts of neighbouring layers"),
)
COLUMNS = (BITS, *OWN, *ROUTING_COLUMNS)
BY_KEY = {column.key: column for column in COLUMNS}
DRAWN = ("bits_per_byte", "hidden_overlap", "entropy", "path_information", "max_vio")
COMPARED = (*DRAWN, "mass", "output_centred")


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table by row, and the differences."""
    compared = [BY_KEY[key] for key in COMPARED]
    return [Section("## Losses", stored["results"], COLUMNS, pairs=PAIRS, differences=compared)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the balance loss alone."""
    return {"losses": difference_panels(stored["results"], [BY_KEY[key] for key in DRAWN], "lb")}


def text(windows: int, epochs: int) -> TrainSettings:
    """The small run on text, with every window read so often."""
    run = small_text(windows)
    return run.model_copy(update={"optimization": run.optimization.model_copy(update={"epochs": epochs})})


FULL = card(Contest(text(3_000, 2), ROWS, tries=3, tune_size=1_200, more=look), seeds=5, weights=(0.003, 0.01, 0.03))
QUICK = card(Contest(text(64, 1), ROWS, tries=1, more=look), seeds=1, weights=(0.01,))
