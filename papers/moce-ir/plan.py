"""What the card runs: experts of equal and unequal cost on photographs that are damaged in known ways."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measure import measure
from rows import PAIRS, ROWS

from spectralmoe.data.degradations import KINDS
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Contest, Section, difference_panels, small_restoration
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.training.settings.run import TrainSettings


def run_of(train_size: int, epochs: int) -> TrainSettings:
    """A network with one place for experts; each image goes to one of them."""
    return small_restoration(train_size, epochs, unit="sample")


def card(contest: Contest, seeds: int) -> Card:
    """One form of the card."""
    return Card("MoCE-IR", ABOUT, contest.settings, [contest.tuning(), contest.cells(seeds)], sections, figures)


ABOUT = """
Written by `spectralmoe card papers/moce-ir`: mean and 95% interval over seeds; the test part chose nothing. PSNR in dB
on test photographs, of each kind of damage and as the mean over kinds. Told: share of what is open about the kind that
the expert tells, of images with one kind of damage. Cost: millions of operations of the expert an image. Differences
are paired: the same seed, so the same start and the same order of images, on the same processor; "separated" where
their 95% interval leaves out 0. Single cells are not stable across processors, means over seeds are.
"""

PSNR = tuple(
    Column(key, title, 2, "peak signal-to-noise ratio", better="higher", unit="dB")
    for key, title in (("psnr", "PSNR"), *((f"psnr_{kind}", kind) for kind in KINDS))
)
TOLD = Column("told", "told %", 1, "share of what is open about the kind that the expert tells", 100.0, "higher", "%")
COSTS = tuple(
    Column(key, title, 2, "operations of the expert an image", better="lower", unit="MFLOP")
    for key, title in (("cost", "cost"), *((f"cost_{kind}", f"cost {kind}") for kind in KINDS))
)
LOAD = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1", better="lower"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load", better="lower"),
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Scores and costs by row, with the differences."""
    cells = stored["results"]
    return [
        Section("## Restored images", cells, PSNR, pairs=PAIRS),
        Section("## Experts", cells, (TOLD, *COSTS, *LOAD), pairs=PAIRS, differences=(TOLD, COSTS[0])),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less equal experts."""
    return {"experts": difference_panels(stored["results"], [PSNR[0], TOLD, COSTS[0]], "equal")}


FULL = card(Contest(run_of(2_000, 5), ROWS, tries=2, tune_epochs=2, more=measure), seeds=5)
QUICK = card(Contest(run_of(100, 1), ROWS, tries=1, more=measure), seeds=1)
