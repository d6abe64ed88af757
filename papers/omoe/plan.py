"""What the card runs: finetuning with an optimizer that keeps experts apart, and with what else could do so."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from finetune import ROWS, Sizes, run_cell, tune_row

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import ROUTING_COLUMNS, Card, Cells, Section, Step, Tuning, difference_panels
from spectralmoe.experiments.compare.columns import Column

FULL_SIZES = Sizes(images=4_000, epochs=3, phase=20, seeds=5)
QUICK_SIZES = replace(FULL_SIZES, images=500, epochs=1, phase=3, seeds=1, rates=(1.0,))

METHODS = ("adamw", "omoe", "omoe-update", "omoe-short")
"""The rows that are no controls."""

PAIRS = (
    ("omoe", "adamw"),
    ("omoe", "omoe-random"),
    ("omoe-update", "adamw"),
    ("omoe-update", "omoe-update-random"),
    ("omoe-short", "adamw"),
    ("omoe-short", "adamw-short"),
)
"""Each form against AdamW, and against what shares its length of steps or its spectra but not its directions."""


def steps(sizes: Sizes) -> list[Step]:
    """Tune the methods; then finetune all rows at one learning rate, and the methods at the rate that each prefers."""
    wanted = [
        {"row": row, "rate": rate, "seed": seed}
        for rate, rows in (("equal", ROWS), ("tuned", METHODS))
        for seed in range(sizes.seeds)
        for row in rows
    ]
    return [
        Tuning("tuning", METHODS, partial(tune_row, sizes=sizes)),
        Cells("results", wanted, partial(run_cell, sizes=sizes)),
    ]


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    settings = {**asdict(sizes), "rates": list(sizes.rates)}
    del settings["seeds"]  # more of them change no cell
    return Card("OMoE", ABOUT, settings, steps(sizes), sections, figures)


ABOUT = """
Written by `spectralmoe card papers/omoe`: mean and 95% interval over seeds; the test part chose nothing. A ViT learns
five classes of Fashion-MNIST, its MLPs become eight equal experts each, and all ten classes are learned with AdamW and
what the row puts around it. Equal rate: one learning rate for all rows, so that likenesses compare. Tuned rate: of
three the one that the validation part prefers in a row. Differences are paired: the same seed, so the same start and
the same order of images, on the same processor; "separated" where their 95% interval leaves out 0. Single cells are not
stable across processors, means over seeds are.
"""

SCORES = (
    Column("accuracy", "accuracy %", 2, "of the test part", better="higher"),
    Column("old_accuracy", "old classes %", 2, "accuracy on those that the start knew", better="higher"),
)
LIKENESS = tuple(column for column in ROUTING_COLUMNS if column.key in ("output_centred", "output_overlap"))
WEIGHTS = (
    Column("apart", "apart", 3, "distance of the experts' first matrices to their mean, over their norm"),
    Column("moved", "moved", 3, "distance of these matrices to the start, over the norm of the start"),
)
LOADS = tuple(column for column in ROUTING_COLUMNS if column.key in ("max_vio", "noise_flips"))


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table and differences at each of the two rates."""
    columns, differences = (*SCORES, *LIKENESS, *WEIGHTS, *LOADS), (*SCORES, *LIKENESS, *WEIGHTS)
    return [
        Section("## Equal learning rate", _at(stored, "equal"), columns, pairs=PAIRS, differences=differences),
        Section(
            "## Tuned learning rate",
            _at(stored, "tuned"),
            columns,
            pairs=[pair for pair in PAIRS if {*pair} <= {*METHODS}],
            differences=differences,
        ),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less AdamW at each of the rates."""
    shown = (SCORES[0], LIKENESS[1], WEIGHTS[0])
    return {rate: list(difference_panels(_at(stored, rate), shown, "adamw")) for rate in ("equal", "tuned")}


def _at(stored: Mapping[str, Any], rate: str) -> list[Any]:
    return [cell for cell in stored["results"] if cell["rate"] == rate]


FULL = card(FULL_SIZES)
QUICK = card(QUICK_SIZES)
