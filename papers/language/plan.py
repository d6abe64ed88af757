"""What the card runs: part (a), routers from scratch in a small language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

from rows import BASELINES, ROWS
from scratch import Sizes, run_cell, tune_row

from spectralmoe.draw.panels import Intervals, Mark, Panel
from spectralmoe.experiments.cards import Card, Cells, Check, Section, Step, Tuning
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import difference

FULL_SIZES = Sizes(
    data="text:stdlib+pydoc+fortunes",
    vocab=2048,
    length=128,
    windows=6_000,
    tune_windows=1_500,
    batch=16,
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
DOMAINS = ("stdlib", "pydoc", "fortunes")


def steps(sizes: Sizes) -> list[Step]:
    """Tune every row, then train and measure it seed by seed."""
    wanted = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in ROWS]
    return [
        Tuning("tuning", ROWS, partial(tune_row, sizes=sizes)),
        Cells("results", wanted, partial(run_cell, sizes=sizes)),
    ]


def card(sizes: Sizes, checked: tuple[str, ...] = ()) -> Card:
    """One form of the card.

    Args:
        checked: rows that ``--check`` runs again under all seeds.
    """
    settings = {key: value for key, value in asdict(sizes).items() if key != "seeds"}
    again = [{"row": row, "seed": seed} for row in checked for seed in range(sizes.seeds)]
    check = Check(Cells("results", again, partial(run_cell, sizes=sizes)), ("row",), CHECKED) if checked else None
    return Card("Language models", ABOUT, settings, steps(sizes), sections, figures, check)


ABOUT = """
Written by `spectralmoe card papers/language`: mean and 95% interval over seeds. Bits per byte: negative log-likelihood
of held-out text over its bytes. Domain information: normalised mutual information of a token's expert and its domain,
mean over layers. Differences are paired: the same seed, so the same start and the same order of text, on the same
processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across processors, means over
seeds are.
"""

BITS = Column("bits_per_byte", "bits/byte", 4, "of held-out text", better="lower")
BY_DOMAIN = tuple(
    Column(f"bits_per_byte_{domain}", f"bits/byte {domain}", 4, f"of held-out {domain}", better="lower")
    for domain in DOMAINS
)
ROUTING = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1", better="lower"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load", better="lower"),
    Column("min_load_share", "smallest load share", 3, "smallest load of any expert"),
    Column("entropy", "entropy", 2, "of a token's scores"),
    Column("output_overlap", "output cos²", 3, "likeness of two experts' outputs", better="lower"),
    Column("noise_flips", "flips", 3, "share of tokens whose choice changes under noise", better="lower"),
    Column("domain_information", "domain information", 3, "what the expert tells of the domain"),
)
COLUMNS = (BITS, *BY_DOMAIN, *ROUTING)
DIFFERENCES = (BITS, *BY_DOMAIN, ROUTING[0], ROUTING[4], ROUTING[5], ROUTING[6])
CHECKED = ("bits_per_byte", "max_vio", "output_overlap", "noise_flips")


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Part (a): a table by row, and the differences."""
    return [Section("## From scratch", stored["results"], COLUMNS, pairs=BASELINES, differences=DIFFERENCES)]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Bits per byte of each row less those of the linear gate, in all and by domain."""
    panels: list[Intervals] = []
    for column in (BITS, *BY_DOMAIN):
        marks = []
        for row in ROWS:
            value = difference(stored["results"], column.key, row, "linear") if row != "linear" else None
            if value is not None:
                half = value.half or 0.0
                marks.append(Mark(row, row, value.mean, value.mean - half, value.mean + half))
        panels.append(Intervals(f"{column.title}, less linear", marks, better="lower", guides=(0.0,)))
    return {"scratch": [panel for panel in panels if panel.marks]}


FULL = card(FULL_SIZES, checked=("linear", "sr-moe"))
QUICK = card(QUICK_SIZES)
