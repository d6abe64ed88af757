"""What the card runs: routers from scratch in a small language model; in a pretrained one; and experts pruned there."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import Any

import pruned
import upcycled
from late import MISSING, LateSizes
from rows import ROWS
from scratch import Sizes, run_cell, tune_row
from tables import ABOUT, CHECKED, METHODS, figures, sections

from spectralmoe.experiments.cards import Card, Cells, Check, Step, Tuning

FULL_SIZES = Sizes(
    data="text:stdlib+pydoc+fortunes",
    vocab=2048,
    length=128,
    windows=4_000,
    tune_windows=4_000,
    batch=4,
    measured=128,
    seeds=3,
)

QUICK_SIZES = Sizes(
    data="text:pydoc+stdlib",
    vocab=512,
    length=64,
    windows=128,
    tune_windows=64,
    batch=16,
    measured=16,
    seeds=1,
)

FULL_LATE = LateSizes(
    model="smollm2",
    data="stdlib+pydoc+fortunes",
    layers=2,
    experts=8,
    k=2,
    keep=(6, 4, 2),
    length=128,
    batch=4,
    excerpt=1_500,
    train=18_000,
    validation=5_000,
    test=10_000,
    tune=1.0,
    calibration=32,
    methods=METHODS,
    seeds=3,
)

QUICK_LATE = LateSizes(
    model="smollm2",
    data="pydoc+stdlib",
    layers=2,
    experts=4,
    k=2,
    keep=(3,),
    length=32,
    batch=4,
    excerpt=500,
    train=1_000,
    validation=300,
    test=300,
    tune=0.5,
    calibration=4,
    methods=("drop",),
    seeds=1,
)


def steps(sizes: Sizes, late: LateSizes | None) -> list[Step]:
    """Part by part: tune every row, then train and measure it seed by seed; prune the models of one row."""
    wanted = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in ROWS]
    scratch: list[Step] = [
        Tuning("tuning", ROWS, partial(tune_row, sizes=sizes)),
        Cells("results", wanted, partial(run_cell, sizes=sizes)),
    ]
    return scratch if late is None else [*scratch, *late_steps(late)]


def late_steps(late: LateSizes) -> list[Step]:
    """Parts (b) and (c); without cells where the model cannot be had, so that stored ones are shown all the same."""
    rows, seeds = (upcycled.rows_of(late), range(late.seeds)) if late.there else ([], range(0))
    wanted = [{"row": row, "seed": seed} for seed in seeds for row in (*rows, upcycled.UNTRAINED)]
    return [
        Tuning("upcycled_tuning", rows, partial(upcycled.tune_row, sizes=late)),
        Cells("upcycled", wanted, partial(upcycled.run_cell, sizes=late)),
        Cells("pruned", [{"seed": seed} for seed in seeds], partial(pruned.run_cell, sizes=late)),
    ]


def card(sizes: Sizes, late: LateSizes | None = None, checked: tuple[str, ...] = ()) -> Card:
    """One form of the card.

    Args:
        late: sizes of parts (b) and (c); None: without them.
        checked: rows that ``--check`` runs again under all seeds.
    """
    settings: dict[str, Any] = {key: value for key, value in asdict(sizes).items() if key != "seeds"}
    again = [{"row": row, "seed": seed} for row in checked for seed in range(sizes.seeds)]
    check = Check(Cells("results", again, partial(run_cell, sizes=sizes)), ("row",), CHECKED) if checked else None
    added, notes = [], []
    if late is not None:
        settings["late"], added = late.settings, ["late"]
        notes = [] if late.there else [MISSING]
    parts = steps(sizes, late)
    return Card("Language models", ABOUT, settings, parts, sections, figures, check, added=added, notes=notes)


FULL = card(FULL_SIZES, FULL_LATE, checked=("linear", "sr-moe"))
QUICK = card(QUICK_SIZES, QUICK_LATE)
