"""What the card runs: the gap between training and test accuracy of small mixtures, beside what a bound says of it."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from networks import (
    ROWS,
    Budget,
    accuracy_under_noise,
    effective_experts,
    make_network,
    pixels,
    share_right,
    train_network,
    with_noise,
)

from spectralmoe.data.image_data import load_data
from spectralmoe.diagnostics import empirical_rademacher, generalization_bound, natarajan_linear
from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Desk, Section, Step, Tuning, try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import estimate
from spectralmoe.training.tasks.base import Metric

RATES = (1e-3, 3e-3, 1e-2, 3e-2)
ACCURACY = Metric("accuracy", "accuracy", "under label noise", "higher", unit="%")
TUNED = {"n": 500, "experts": 16, "k": 2}


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card.

    Attributes:
        sizes: N, training samples.
        ks: K at E = 16.  experts: E at K = 1.
    """

    budget: Budget
    sizes: Sequence[int]
    ks: Sequence[int]
    experts: Sequence[int]
    seeds: int

    def places(self, row: str) -> list[dict[str, Any]]:
        """E and K of the cells of a row: for a dense network E says how many parameters it has."""
        pairs = [(16, k) for k in self.ks] + [(e, 1) for e in self.experts]
        pairs = [(e, 1) for e, _ in pairs] if row == "dense" else pairs
        return [{"row": row, "experts": e, "k": k} for e, k in dict.fromkeys(pairs)]


def gap(cell: Mapping[str, Any], lr: float, budget: Budget, part: str, share: Any = None) -> dict[str, float]:
    """Accuracies of a network on the wrong and right labels that it learned, and on ``part``; and the bound's terms."""
    torch.set_num_threads(1)
    data, seed = load_data("digits"), cell["seed"]
    classes, n = data.num_classes, cell["n"]
    chosen = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(seed))[:n]
    x, split = pixels(data.train, data)[chosen], getattr(data, part)
    labels = with_noise(data.train.labels[chosen], classes, budget.wrong, seed)
    torch.manual_seed(seed)
    network = make_network(cell["row"], cell["experts"], cell["k"], budget, x.shape[1], classes)
    train_network(network, x, labels, budget, lr)
    seen, held = share_right(network, x, labels), share_right(network, pixels(split, data), split.labels)
    expected = accuracy_under_noise(held, classes, budget.wrong)
    routes = cell["row"] != "dense"
    terms = generalization_bound(
        n,
        cell["experts"] if routes else 1,
        cell["k"] if routes else 1,
        natarajan=natarajan_linear(x.shape[1], cell["experts"]) if cell["row"] == "learned" else 0,
        rademacher=empirical_rademacher(x / x.norm(dim=1).mean(), 1.0, seed=seed),
    )
    return {
        "train": 100 * seen,
        part: 100 * expected,
        "clean": 100 * held,
        "gap": 100 * (seen - expected),
        "effective": effective_experts(network, x),
        "bound": terms["bound"],
        "samples_an_expert": n * cell["k"] / cell["experts"] if routes else n,
    }


def tune(row: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a row by validation accuracy, on one size, under seed 0."""

    def train_with(setting: Mapping[str, Any]) -> tuple[float, None]:
        found = gap({"row": row, "seed": 0, **TUNED}, setting["lr"], sizes.budget, "validation")
        return found["validation"], None

    tried = try_settings([{"lr": lr} for lr in RATES], train_with, progress, ACCURACY)
    return {row: {**tried.setting, "tries": tried.tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, float]:
    """One network: its gap, the bound, and how many experts it uses."""
    return gap(cell, desk.tuned["tuning"][cell["row"]]["lr"], sizes.budget, "test", progress)


def ranks(values: Sequence[float]) -> list[float]:
    """The place of each value, equal ones at the mean of theirs.

    >>> ranks([3.0, 1.0, 3.0])
    [1.5, 0.0, 1.5]
    """
    ordered = sorted(values)
    return [ordered.index(v) + (ordered.count(v) - 1) / 2 for v in values]


def spearman(one: Sequence[float], two: Sequence[float]) -> float | None:
    """Correlation of the ranks; None where all values of one are equal.

    >>> spearman([1, 2, 3], [2, 4, 8]), spearman([1, 2, 3], [5, 5, 5])
    (1.0, None)
    """
    if len(set(one)) < 2 or len(set(two)) < 2:
        return None
    return statistics.correlation(ranks(one), ranks(two))


def correlations(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """For every seed how the gaps of a row are ordered: by the bound, and by the samples that an expert sees.

    In all, and the mean over N of what is left at one N.
    """
    found = []
    for name, rows in {"learned": ("learned",), "frozen": ("frozen",), "both": ("learned", "frozen")}.items():
        for seed in dict.fromkeys(cell["seed"] for cell in cells):
            mine = [cell for cell in cells if cell["seed"] == seed and cell["row"] in rows]
            if not mine:
                continue
            values: dict[str, Any] = {"row": name, "seed": seed, "cpu": mine[0]["cpu"]}
            for key in ("bound", "samples_an_expert"):
                values[key] = spearman([c["gap"] for c in mine], [c[key] for c in mine])
                groups = [[c for c in mine if c["n"] == n] for n in dict.fromkeys(c["n"] for c in mine)]
                each = [spearman([c["gap"] for c in group], [c[key] for c in group]) for group in groups]
                kept = [value for value in each if value is not None]
                values[f"{key}_at_one_n"] = statistics.fmean(kept) if kept else None
            found.append(values)
    return found


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [
        {"n": n, **place, "seed": seed}
        for seed in range(sizes.seeds)
        for n in sizes.sizes
        for row in ROWS
        for place in sizes.places(row)
    ]
    again = [cell for cell in wanted if cell["n"] == max(sizes.sizes) and (cell["experts"], cell["k"]) == (16, 1)]
    steps: list[Step] = [
        Tuning("tuning", ROWS, partial(tune, sizes=sizes)),
        Cells("results", wanted, partial(measure, sizes=sizes)),
    ]
    check = Check(Cells("results", again, partial(measure, sizes=sizes)), ("row", "n"), ("gap",))
    return Card("A generalization bound", ABOUT, {"budget": asdict(sizes.budget)}, steps, sections, figures, check)


ABOUT = """
Written by `spectralmoe card papers/bound`: mean and 95% interval over seeds, which draw samples, wrong labels and
start. Gap: accuracy on the labels that were learned, a fifth of them wrong, minus the expected accuracy on test labels
with the same noise, points. Effective: exp of the entropy of the load. Bound: with probability .95, for linear experts
of norm 1 on samples of mean norm 1; an order, no estimate. Dense: as many parameters as the experts of that E have.
Differences are paired by seed: the same samples and labels.
"""
COLUMNS = (
    Column("gap", "gap", 1, "training minus test accuracy", better="lower"),
    Column("train", "train %", 1, "accuracy on the labels learned"),
    Column("test", "test %", 1, "expected accuracy under the same noise", better="higher"),
    Column("clean", "clean test %", 1, "accuracy on right labels", better="higher"),
    Column("effective", "effective experts", 1, "exp of the entropy of the load"),
    Column("samples_an_expert", "samples an expert", 0, "N K / E"),
    Column("bound", "bound", 2, "of the gap, as a share"),
)
ORDERS = (
    Column("bound", "with the bound", 2, "Spearman of gap and bound, all N"),
    Column("samples_an_expert", "with N K / E", 2, "Spearman of gap and samples an expert sees, all N"),
    Column("bound_at_one_n", "with the bound, N fixed", 2, "mean over N"),
    Column("samples_an_expert_at_one_n", "with N K / E, N fixed", 2, "mean over N"),
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """For each N the cells, named by what tells them apart, then how the gaps are ordered."""
    cells = [cell for cell in stored["results"] if DIVERGED not in cell]
    named = [{**cell, "row": f"{cell['row']} E={cell['experts']} K={cell['k']}"} for cell in cells]
    found = [
        Section(
            f"## N = {n}",
            [cell for cell in named if cell["n"] == n],
            COLUMNS,
            pairs=PAIRS,
            differences=COLUMNS[:4],
        )
        for n in dict.fromkeys(cell["n"] for cell in cells)
    ]
    return [*found, Section("## Spearman's rank correlation of the gap", correlations(cells), ORDERS)]


PAIRS = [
    ("learned E=16 K=16", "learned E=16 K=1"),
    ("learned E=64 K=1", "learned E=4 K=1"),
    ("frozen E=16 K=16", "frozen E=16 K=1"),
    ("frozen E=16 K=1", "learned E=16 K=1"),
    ("frozen E=16 K=16", "learned E=16 K=16"),
    ("learned E=16 K=1", "dense E=16 K=1"),
]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """The gap against K and against E, at each N."""
    cells = [cell for cell in stored["results"] if DIVERGED not in cell]
    panels: list[Panel] = []
    for n in dict.fromkeys(cell["n"] for cell in cells):
        for axis, fixed, rows in (("k", {"experts": 16}, ROWS[:2]), ("experts", {"k": 1}, ROWS)):
            series = {row: _line(select(cells, n=n, row=row, **fixed), axis) for row in rows}
            title = f"gap at N = {n}, " + ("E = 16" if axis == "k" else "K = 1")
            panels.append(Lines(title, series, "K" if axis == "k" else "E", better="lower", log_x=True))
    return {"gap": panels}


def _line(cells: Sequence[Mapping[str, Any]], axis: str) -> list[Point]:
    """The mean gap at each value of ``axis``, with its interval."""
    points = []
    for value in sorted({cell[axis] for cell in cells}):
        found = estimate([cell["gap"] for cell in select(cells, **{axis: value})])
        points += [] if found is None else [Point(value, found.mean, found.half)]
    return points


FULL = card(Sizes(Budget(), sizes=(200, 500, 1000), ks=(1, 2, 4, 8, 16), experts=(4, 16, 64), seeds=5))
QUICK = card(Sizes(Budget(steps=20), sizes=(100, 200), ks=(1, 16), experts=(4, 16), seeds=1))
