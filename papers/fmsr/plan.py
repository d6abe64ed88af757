"""What the card runs: gates that read an average, a spectrum, both, or random features, before four equal experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from measure import measure

from spectralmoe.data.degradations import DEGRADATIONS, KINDS
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Contest, Section, difference_panels, small_restoration
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.training.settings.run import TrainSettings

MIXERS = {"type": "heterogeneous", "modules": [{"type": "frequency_mixer", "channels": "= dim"}] * 4}
BALANCE = {"terms": {"load_balance": 1e-2}}
SPECTRUM = {"type": "spectrum", "statistics": False}
ROWS: dict[str, dict[str, Any]] = {
    "one expert": {"preset": "dense"},
    "average": {"scorer": "linear", **BALANCE},
    "spectrum": {"scorer": SPECTRUM, **BALANCE},
    "both": {"scorer": {**SPECTRUM, "token": True}, **BALANCE},
    "random filters": {"scorer": {**SPECTRUM, "type": "gates:RandomFilterScorer"}, **BALANCE},
    "average, frequency mixers": {"scorer": "linear", "experts": MIXERS, **BALANCE},
}
"""No choice; gates that read pooled features, twelve numbers of the spectrum, or both; the control, twelve numbers of
filters that never learn; and the paper's frequency branch as the expert."""

PAIRS = (
    ("average", "one expert"),
    ("spectrum", "average"),
    ("both", "average"),
    ("both", "spectrum"),
    ("random filters", "average"),
    ("spectrum", "random filters"),
    ("average, frequency mixers", "average"),
)


def run_of(train_size: int, epochs: int) -> TrainSettings:
    """A network with one place for experts; each image goes to one of them."""
    return small_restoration(train_size, epochs, unit="sample")


def card(contest: Contest, seeds: int) -> Card:
    """One form of the card."""
    return Card("FMSR", ABOUT, contest.settings, [contest.tuning(), contest.cells(seeds)], sections, figures)


ABOUT = """
Written by `spectralmoe card papers/fmsr`: mean and 95% interval over seeds; the test part chose nothing. PSNR in dB on
test photographs, of each kind of damage and as the mean over kinds. Probe: how many test images with one kind of damage
a linear probe, fitted to training images, tells from what the gate reads, mean over kinds and by kind. Told: share
of what is open about the kind that the expert tells. Differences are paired: the same seed, so
the same start and the same order of images, on the same processor; "separated" where their 95% interval leaves out 0.
Single cells are not stable across processors, means over seeds are.
"""

PSNR = tuple(
    Column(key, title, 2, "peak signal-to-noise ratio", better="higher", unit="dB")
    for key, title in (("psnr", "PSNR"), *((f"psnr_{kind}", kind) for kind in KINDS))
)
PROBE = tuple(
    Column(key, title, 1, "images whose damage a linear probe tells", 100.0, "higher", "%")
    for key, title in (("probe", "probe %"), *((f"probe_{kind}", f"{kind} %") for kind in DEGRADATIONS))
)
TOLD = Column("told", "told %", 1, "share of what is open about the kind that the expert tells", 100.0, "higher", "%")
LOAD = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1", better="lower"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load", better="lower"),
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Scores, and what gates read, by row, with the differences."""
    cells = stored["results"]
    return [
        Section("## Restored images", cells, PSNR, pairs=PAIRS),
        Section("## Gates", cells, (TOLD, *PROBE, *LOAD), pairs=PAIRS, differences=(TOLD, *PROBE)),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the gate on pooled features."""
    return {"gates": difference_panels(stored["results"], [PSNR[0], TOLD, PROBE[0]], "average")}


FULL = card(Contest(run_of(2_000, 5), ROWS, tries=2, tune_epochs=2, more=measure), seeds=5)
QUICK = card(Contest(run_of(100, 1), ROWS, tries=1, more=measure), seeds=1)
