"""RESULTS.md and the figures: the columns of each part, what is compared with what, and the panels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pruned
import upcycled
from rows import BASELINES, ROWS

from spectralmoe.draw.panels import Intervals, Lines, Mark, Panel, Point
from spectralmoe.experiments.cards import Section
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import difference, select
from spectralmoe.experiments.statistics import estimate

__all__ = ["ABOUT", "CHECKED", "figures", "sections"]

DOMAINS = ("stdlib", "pydoc", "fortunes")
METHODS = ("copy", "drop", "noise")

ABOUT = """
Written by `spectralmoe card papers/language`: mean and 95% interval over seeds. Bits per byte: negative log-likelihood
of held-out text over its bytes. Domain information: normalised mutual information of a token's expert and its domain,
mean over layers. Differences are paired: the same seed, so the same start and the same order of text, on the same
processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across processors, means over
seeds are.

Upcycled, pruned: the first 28 layers of SmolLM2-135M stay as they are. "Start": bits per byte of validation text before
training. "Cost": bits per byte after pruning less those before it, under the same seed; nothing is trained after it.
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


LATE = (
    BITS,
    *BY_DOMAIN,
    Column("validation_before", "start", 4, "bits per byte of validation text before training"),
    *(column for column in ROUTING if column.key in ("max_vio", "dead_experts", "min_load_share")),
    ROUTING[-1],
)
LATE_DIFFERENCES = (BITS, *BY_DOMAIN, ROUTING[0], ROUTING[-1])
COST = Column("cost", "cost", 4, "bits per byte after pruning less before", better="lower")
PRUNINGS = tuple((by, "random") for by in pruned.SALIENCIES if by != "random")


def late_pairs() -> list[tuple[str, str]]:
    """Finetuning itself; experts against none; methods; routers within a method; and what may explain a gain."""
    mixtures = [f"{method}+linear" for method in METHODS]
    routers = [(f"{method}+{router}", f"{method}+linear") for method in METHODS for router in ("sr-moe", "emoe")]
    return [
        (upcycled.DENSE, upcycled.UNTRAINED),
        *((row, upcycled.DENSE) for row in mixtures),
        *((row, "copy+linear") for row in mixtures[1:]),
        *routers,
        (upcycled.CONTROL, "drop+linear"),
        ("drop+sr-moe", upcycled.CONTROL),
    ]


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """Part by part a table by row, and the differences."""
    made = [Section("## From scratch", stored["results"], COLUMNS, pairs=BASELINES, differences=DIFFERENCES)]
    if stored.get("upcycled"):
        made.append(
            Section("## Upcycled", stored["upcycled"], LATE, pairs=late_pairs(), differences=LATE_DIFFERENCES),
        )
    if stored.get("pruned"):
        made.append(
            Section(
                "## Pruned",
                pruned.as_rows(stored["pruned"]),
                (COST, BITS, *BY_DOMAIN),
                {"row": "saliency", "keep": "experts left"},
                sort=("keep",),
                pairs=PRUNINGS,
                within="keep",
                differences=(COST, *BY_DOMAIN),
            )
        )
    return made


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Bits per byte of each row less those of a baseline, in all and by domain; what pruning costs by size."""
    scratch = {row: "linear" for row in ROWS if row != "linear"}
    late = dict.fromkeys([cell["row"] for cell in stored.get("upcycled", ())], upcycled.DENSE)
    made: dict[str, list[Panel]] = {
        "scratch": less(stored["results"], scratch),
        "upcycled": less(stored.get("upcycled", ()), {row: base for row, base in late.items() if row != base}),
        "pruned": costs(pruned.as_rows(stored.get("pruned", ()))),
    }
    return {name: panels for name, panels in made.items() if panels}


def less(cells: Sequence[Mapping[str, Any]], baselines: Mapping[str, str]) -> list[Panel]:
    """Bits per byte of rows less those of their baseline, a panel in all and for each domain."""
    panels: list[Panel] = []
    for column in (BITS, *BY_DOMAIN):
        marks = []
        for row, baseline in baselines.items():
            value = difference(cells, column.key, row, baseline)
            if value is not None:
                half = value.half or 0.0
                marks.append(Mark(row, row, value.mean, value.mean - half, value.mean + half))
        if marks:
            (baseline,) = set(baselines.values())
            panels.append(Intervals(f"{column.title}, less {baseline}", marks, better="lower", guides=(0.0,)))
    return panels


def costs(cells: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Bits per byte that pruning costs against the experts that are left, a line for each saliency."""
    series: dict[str, list[Point]] = {}
    for by in dict.fromkeys(cell["row"] for cell in cells):
        for keep in sorted({cell["keep"] for cell in cells}):
            value = estimate([cell["cost"] for cell in select(cells, row=by, keep=keep)])
            if value is not None:
                series.setdefault(by, []).append(Point(keep, value.mean, value.half))
    return [Lines("bits/byte that pruning costs", series, "experts left", "lower", guides=(0.0,))] if series else []
