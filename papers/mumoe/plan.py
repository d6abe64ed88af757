"""What the card runs: multilinear heads with 4 to 256 experts, and how much each expert is one class's own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, cast

import torch
from heads import (
    ROWS,
    Budget,
    class_changes,
    features,
    information,
    make_head,
    polysemanticity,
    train_body,
    train_head,
)

from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Desk, Section, Step, Tuning, try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import estimate
from spectralmoe.experts import MultilinearExperts
from spectralmoe.moe import MoE
from spectralmoe.training.tasks.base import Metric

RATES = (1e-3, 3e-3, 1e-2)
TUNED = 16
ACCURACY = Metric("accuracy", "accuracy", "of the validation part", "higher", unit="%")


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card.

    Attributes:
        experts: E.
        train: training images.
        measured: test images.
    """

    budget: Budget
    experts: Sequence[int]
    train: int
    measured: int
    seeds: int


def trained(cell: Mapping[str, Any], lr: float, sizes: Sizes) -> tuple[torch.nn.Module, torch.nn.Module, ImageData]:
    """The head of a cell, the body under it, and the data."""
    torch.set_num_threads(1)
    data, seed = load_data("mnist5k").subset(sizes.train), cell["seed"]
    body = train_body(data, sizes.budget, seed)
    torch.manual_seed(seed)
    head = make_head(cell["row"], cell["experts"], sizes.budget, data.num_classes)
    x = features(body, data.train, data)
    train_head(head, x, data.train.labels, sizes.budget, sizes.budget.steps, lr, seed)
    return head.eval(), body, data


@torch.no_grad()
def accuracy(head: torch.nn.Module, x: torch.Tensor, labels: torch.Tensor) -> float:
    """Percent of samples whose class is right."""
    return 100 * float((head(x).argmax(-1) == labels).float().mean())


def tune(row: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a row by validation accuracy, at E = 16 under seed 0."""

    def train_with(setting: Mapping[str, Any]) -> tuple[float, None]:
        head, body, data = trained({"row": row, "experts": TUNED, "seed": 0}, setting["lr"], sizes)
        return accuracy(head, features(body, data.validation, data), data.validation.labels), None

    tried = try_settings([{"lr": lr} for lr in RATES], train_with, progress, ACCURACY)
    return {row: {**tried.setting, "tries": tried.tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """One head on the test part."""
    head, body, data = trained(cell, desk.tuned["tuning"][cell["row"]]["lr"], sizes)
    x, labels = features(body, data.test, data)[: sizes.measured], data.test.labels[: sizes.measured]
    values: dict[str, Any] = {
        "accuracy": accuracy(head, x, labels),
        "parameters": sum(p.numel() for p in head.parameters()),
    }
    if not isinstance(head, MoE):
        return values
    return values | specialization(head, x, labels, data.num_classes, cell["seed"])


@torch.no_grad()
def specialization(head: MoE, x: torch.Tensor, labels: torch.Tensor, classes: int, seed: int) -> dict[str, float]:
    """What experts are for, under the gates as they are, and dealt out to other samples ("null")."""
    values, bank = {}, cast(MultilinearExperts, head.experts)
    gates = head.router(x).gates()
    dealt = gates[torch.randperm(len(x), generator=torch.Generator().manual_seed(seed))]
    for name, each in (("", gates), ("_null", dealt)):
        changes = class_changes(bank, x, each, labels, classes)
        values[f"polysemanticity{name}"] = polysemanticity(changes)
        values[f"information{name}"] = information(each, labels, classes)
    values["excess"] = values["polysemanticity"] - values["polysemanticity_null"]
    values["zero"] = float((gates == 0).float().mean())
    return values | {"effective": float(torch.special.entr(gates.mean(0)).sum().exp())}


def by_row(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Cells under the name of row and E; the null of each as a row of its own."""
    found = []
    for cell in cells:
        if DIVERGED in cell:
            continue
        name = cell["row"] if cell["row"] == "dense" else f"{cell['row']} E={cell['experts']}"
        found.append({**cell, "row": name})
        if "excess" in cell:
            null = {key: cell[f"{key}_null"] for key in ("polysemanticity", "information")}
            found.append({"row": f"{name}, gates permuted", "seed": cell["seed"], "cpu": cell["cpu"], **null})
    return found


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [
        {"row": row, "experts": experts, "seed": seed}
        for seed in range(sizes.seeds)
        for row in ROWS
        for experts in (sizes.experts if row != "dense" else sizes.experts[:1])
    ]
    again = [cell for cell in wanted if cell["experts"] == sizes.experts[-1]]
    steps: list[Step] = [
        Tuning("tuning", ROWS, partial(tune, sizes=sizes)),
        Cells("results", wanted, partial(measure, sizes=sizes)),
    ]
    check = Check(Cells("results", again, partial(measure, sizes=sizes)), ("row", "experts"), ("polysemanticity",))
    settings = {"budget": asdict(sizes.budget), "train": sizes.train, "measured": sizes.measured}
    return Card("Multilinear experts", ABOUT, settings, steps, partial(sections, sizes=sizes), figures, check)


ABOUT = """
Written by `spectralmoe card papers/mumoe`: mean and 95% interval over seeds, which draw body, start and batches; the
test part chose nothing. Heads of 24,000 parameters on 64 fixed features of digits. Polysemanticity: how far an expert
is from mattering to one class alone, by the fall of the true class's log-probability when its gate is set to 0; 0 for
one class, 1.17 for ten alike; mean over experts, weighted by how much they matter. Gates permuted: the same head, each
sample with the gates of another: what sparse gates give by themselves. Excess: polysemanticity less that. Information:
of expert about class, as a share of the class's entropy. Differences are paired: the same seed, so the same body.
"""
COLUMNS = (
    Column("accuracy", "accuracy %", 2, "of the test part", better="higher"),
    Column("polysemanticity", "polysemanticity", 3, "0: one class an expert", better="lower"),
    Column("excess", "excess over the null", 3, "less that with permuted gates", better="lower"),
    Column("information", "information %", 1, "of expert about class", 100.0, "higher"),
    Column("zero", "zero gates %", 1, "of all gates", 100.0),
    Column("effective", "effective experts", 1, "exp of the entropy of the mean gate"),
    Column("parameters", "parameters", 0, "of the head, gate included"),
)
METHODS = ROWS[:-1]


def sections(stored: Mapping[str, Any], *, sizes: Sizes) -> list[Section]:
    """A table by row and E; each E against the null, the largest against the smallest, and against other rows."""
    least, most = sizes.experts[0], sizes.experts[-1]
    pairs = [
        *((f"entmax E={e}", f"entmax E={e}, gates permuted") for e in sizes.experts),
        *((f"softmax E={e}", f"softmax E={e}, gates permuted") for e in sizes.experts),
        *((f"{row} E={most}", f"{row} E={least}") for row in METHODS),
        *((f"entmax E={most}", f"{row} E={most}") for row in METHODS if row != "entmax"),
        *((f"entmax E={e}", "dense") for e in sizes.experts),
    ]
    return [Section("## Heads", by_row(stored["results"]), COLUMNS, pairs=pairs, differences=COLUMNS[:4])]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """What grows with E: polysemanticity with its null, excess, accuracy."""
    cells = [cell for cell in stored["results"] if DIVERGED not in cell]
    null = {f"{row}, permuted": _line(select(cells, row=row), "polysemanticity_null") for row in METHODS[:2]}
    panels: list[Panel] = []
    for key, title, better, more in (
        ("polysemanticity", "polysemanticity", "lower", null),
        ("excess", "excess over permuted gates", "lower", {}),
        ("accuracy", "accuracy %", "higher", {}),
    ):
        series = {row: _line(select(cells, row=row), key) for row in METHODS}
        panels.append(Lines(title, {**series, **more}, "E", better=better, log_x=True))  # type: ignore[arg-type]
    return {"heads": panels}


def _line(cells: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """The mean of a measure at each E, with its interval."""
    points = []
    for experts in sorted({cell["experts"] for cell in cells}):
        found = estimate([cell[key] for cell in select(cells, experts=experts)])
        points += [] if found is None else [Point(experts, found.mean, found.half)]
    return points


FULL = card(Sizes(Budget(), experts=(4, 16, 64, 256), train=2_500, measured=2_000, seeds=5))
QUICK = card(Sizes(Budget(body_steps=20, steps=20), experts=(4, 256), train=300, measured=200, seeds=1))
