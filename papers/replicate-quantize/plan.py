"""What the card runs: networks with a busy expert, whose experts are copied and quantised in several ways."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rows import BATCHES, BITS, ROWS, made, measured
from torch import nn

from spectralmoe.diagnostics import max_vio
from spectralmoe.diagnostics.evaluation import Counted, run_over
from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Desk, Section, Step, Tuning, small_images, train_row
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks import Task

WEIGHTS, WANTED = (1e-3, 3e-3, 1e-2), 3.0
"""Weights of the balance term that are tried, and the load imbalance that one of them is to come near."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card.

    Attributes:
        run: data, network and budget.
        calibrated: validation images that say which experts are busy and which matter.
        tested: test images.
        seeds: networks.
    """

    run: TrainSettings
    calibrated: int
    tested: int
    seeds: int


def trained(sizes: Sizes, weight: float, seed: int, share: Any = None) -> tuple[nn.Module, Task]:
    """A network whose one expert a patch weighs its score, so that the router learns, and its task."""
    torch.set_num_threads(1)
    selector = {"type": "topk", "normalize": False}
    row = {"scorer": "linear", "selector": selector, "terms": {"load_balance": weight}}
    network, task, _ = train_row(sizes.run, row, Tuned(), seed, share)
    return network.eval(), task


def tune(row: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The weight whose load imbalance on validation images, mean over layers, comes nearest to the wanted one."""
    tries = []
    for number, weight in enumerate(WEIGHTS):
        progress(number / len(WEIGHTS))
        network, task = trained(sizes, weight, 0)
        counted = Counted(network)
        score = task.score(counted, "validation")
        loads = list(counted.loads.values())
        tries.append({"weight": weight, "imbalance": 1 + sum(map(max_vio, loads)) / len(loads), **score})
    best = min(tries, key=lambda tried: abs(tried["imbalance"] - WANTED))
    return {row: {"weight": best["weight"], "tries": tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, float]:
    """What every row makes of one network, with every number of bits: "row/bits/measure" -> value."""
    network, task = trained(sizes, desk.tuned["tuning"]["network"]["weight"], cell["seed"], progress)
    seen, labels = (each[: sizes.calibrated] for each in task.labelled("validation"))
    images, truth = (each[: sizes.tested] for each in task.labelled("test"))
    before, values = run_over(network, images).argmax(-1), {}
    raw = measured(network, images, truth, before)
    for bits in BITS:
        for row, options in ROWS.items():
            found, report = raw, made(network, options, bits, (seen, labels), cell["seed"])
            if report is not None:
                found = measured(report.model, images, truth, before) | {
                    "bytes": report.bytes_after / report.bytes_before
                }
            values |= {f"{row}/{bits}/{key}": value for key, value in found.items()}
    return values


def by_row(cells: Any) -> list[dict[str, Any]]:
    """The cells of networks, taken apart into one a row and number of bits."""
    return [
        {
            **{key: cell[key] for key in ("seed", "cpu")},
            "row": row,
            "bits": bits,
            **{
                key.removeprefix(f"{row}/{bits}/"): value
                for key, value in cell.items()
                if key.startswith(f"{row}/{bits}/")
            },
        }
        for cell in cells
        if DIVERGED not in cell
        for row in ROWS
        for bits in BITS
    ]


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [{"network": "network", "seed": seed} for seed in range(sizes.seeds)]
    cells = Cells("results", wanted, partial(measure, sizes=sizes))
    steps: list[Step] = [Tuning("tuning", ("network",), partial(tune, sizes=sizes)), cells]
    settings = {"run": sizes.run.model_dump(mode="json"), "calibrated": sizes.calibrated, "tested": sizes.tested}
    check = Check(cells, ("network",), [f"{row}/{BITS[0]}/accuracy" for row in ("raw", "R&Q")])
    return Card("Replicate-and-Quantize", ABOUT, settings, steps, sections, figures, check)


ABOUT = """
Written by `spectralmoe card papers/replicate-quantize`: mean and 95% interval over seeds. The rows of one seed share a
network, so their differences are those of copies and integers alone; "separated" where the 95% interval of a difference
leaves out 0. Imbalance: largest load of a place of the bank over the mean load of the places, mean over layers; of the
whole test part, and inside batches of so many images. Bytes: of the routed experts, float32 before. Three experts
without copies are quantised, but for the row "quantise all".
"""
ACCURACY = Column("accuracy", "accuracy %", 2, "of the test part", better="higher")
LOSS = Column("nll", "cross-entropy", 4, "of the test part", better="lower")
CHANGED = Column("changed", "changed %", 2, "test images with another class than from raw", 100.0, better="lower")
WHOLE = Column("imbalance", "imbalance", 2, "of the whole test part", better="lower")
BATCHED = [
    Column(f"imbalance_{size}", f"of {size}", 2, f"imbalance inside batches of {size} images", better="lower")
    for size in BATCHES
]
BYTES = Column("bytes", "bytes %", 1, "of the experts, those before are 100", 100.0, better="lower")
COLUMNS = (ACCURACY, LOSS, CHANGED, WHOLE, *BATCHED, BYTES)
PAIRS = [
    *((row, "raw") for row in ROWS if row != "raw"),
    ("R&Q", "replicate, quantise random"),
    ("R&Q, wanda", "replicate, quantise random"),
    ("R&Q, original full", "random, original full"),
    ("R&Q, original full", "R&Q"),
    ("R&Q", "R&Q, wanda"),
    ("R&Q", "R&Q, least used"),
    ("R&Q", "replicate, quantise all"),
]


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """A table for each number of bits."""
    rows = by_row(stored["results"])
    return [Section(f"## {bits} bits", select(rows, bits=bits), COLUMNS, pairs=PAIRS) for bits in BITS]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Cross-entropy against bits, and imbalance against the size of a batch."""
    rows = by_row(stored["results"])
    loss = {row: [_point(select(rows, row=row, bits=bits), "nll", bits) for bits in sorted(BITS)] for row in ROWS}
    imbalance = {
        row: [_point(select(rows, row=row, bits=max(BITS)), f"imbalance_{size}", size) for size in BATCHES]
        for row in ("raw", "R&Q")
    }
    return {
        "bits": [
            Lines("cross-entropy", loss, "bits", better="lower"),
            Lines("imbalance", imbalance, "images of a batch", better="lower", log_x=True),
        ]
    }


def _point(cells: Any, key: str, x: float) -> Point:
    """The mean with its interval."""
    found = estimate([cell[key] for cell in cells])
    assert found is not None
    return Point(x, found.mean, found.half)


FULL = card(Sizes(small_images(5_000, 5, k=1), calibrated=1_000, tested=3_000, seeds=5))
_TINY: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
_QUICK = small_images(300, 2, k=1, bottleneck=32).model_copy(update={"data": "digits"})
QUICK = card(
    Sizes(
        _QUICK.model_copy(update={"backbone": _QUICK.backbone.model_copy(update={"arguments": _TINY})}),
        calibrated=100,
        tested=200,
        seeds=1,
    )
)
