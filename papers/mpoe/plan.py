"""What the card runs: experts that share their central cores, and what as few numbers can do without sharing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from typing import Any

from upcycle import ROWS, Sizes, run_cell, tune_row

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import ROUTING_COLUMNS, Card, Cells, Section, Step, Tuning, difference_panels
from spectralmoe.experiments.compare.columns import Column

FULL_SIZES = Sizes(windows=4_000, tune_windows=1_500, seeds=5)
QUICK_SIZES = replace(FULL_SIZES, windows=128, tune_windows=64, seeds=1, rates=(3e-3,))

PAIRS = (
    ("mpoe", "switch"),
    ("mpoe", "switch, cut"),
    ("mpoe", "dense"),
    ("mpoe + mask", "switch"),
    ("mpoe + mask", "switch, cut"),
    ("mpoe + mask", "mpoe"),
    ("mpoe + mask", "mpoe + slow"),
    ("mpoe + slow", "mpoe"),
    ("switch", "dense"),
)
"""The method against the experts that it replaces, against the control, and its mask against none and a fixed one."""


def steps(sizes: Sizes) -> list[Step]:
    """Tune every row, then measure each under each seed."""
    wanted = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in ROWS]
    return [
        Tuning("tuning", list(ROWS), partial(tune_row, sizes=sizes)),
        Cells("results", wanted, partial(run_cell, sizes=sizes)),
    ]


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    settings = {**asdict(sizes), "rates": list(sizes.rates)}
    del settings["seeds"]  # more of them change no cell
    return Card("MPOE", ABOUT, settings, steps(sizes), sections, figures)


ABOUT = """
Written by `spectralmoe card papers/mpoe`: mean and 95% interval over seeds; the test part chose nothing. A dense
decoder reads a text once, each of its networks becomes eight equal experts, two a token, and all of it reads the text
again in another order. Before: bits of the test part at that moment. Moved: how far cores are from where they started,
over their norm there, mean over matrices. Differences are paired: the same seed, so the same start and the same order
of text, on the same processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across
processors, means over seeds are.
"""

BITS = Column("bits_per_byte", "bits/byte", 3, "of the test part", better="lower")
OWN = (
    Column("bits_before", "before", 3, "bits per byte of the test part before the second look", better="lower"),
    Column("expert_parameters", "numbers in experts", 0, "of all layers", better="lower"),
    Column("moved_central", "central moved", 2, "way of the central cores over their norm"),
    Column("moved_own", "own moved", 2, "way of the experts' own cores over their norm"),
)
COLUMNS = (BITS, *OWN, *ROUTING_COLUMNS)
BY_KEY = {column.key: column for column in COLUMNS}
DRAWN = ("bits_per_byte", "output_centred", "max_vio")
COMPARED = (*DRAWN, "moved_central", "moved_own", "entropy")


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table by row, and the differences."""
    compared = [BY_KEY[key] for key in COMPARED]
    return [Section("## Experts", stored["results"], COLUMNS, pairs=PAIRS, differences=compared)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the experts that share nothing."""
    return {"experts": difference_panels(stored["results"], [BY_KEY[key] for key in DRAWN], "switch")}


FULL = card(FULL_SIZES)
QUICK = card(QUICK_SIZES)
