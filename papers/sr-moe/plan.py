"""What the card runs: rows, data sets, depths and seeds of its full and its quick form, and what they become."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

from measure import Sizes, correct, correct_in_a_row, train_network
from rows import ALL_EXPERTS, ALL_PARAMETERS, BASELINES, DECIDING, GUARD, STREAM
from tune import tune_row

from spectralmoe.adaptation import COPIES
from spectralmoe.draw.panels import Lines, Panel, Point
from spectralmoe.experiments.cards import Card, Cells, Check, Section, Step, Tuning
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.evidence import select
from spectralmoe.experiments.statistics import estimate


class Part(NamedTuple):
    """Rows of one data set that are measured alike.

    Attributes:
        ways: how each network is corrected: suffixes of its row's name; "" is gradient steps on one expert a layer.
    """

    dataset: str
    rows: tuple[str, ...]
    depths: tuple[int, ...]
    seeds: int
    ways: tuple[str, ...] = ("",)


DEPTHS, FEW, OTHERS = (2, 4, 8, 16), (2, 8), (4, 16)
ONE_TERM = ("SR-MoE spectral_norm", "SR-MoE stable_rank")
MORE = ("linear+spectral", "prototype", *ONE_TERM)
WIDER = (ALL_EXPERTS, ALL_PARAMETERS)

FULL_PARTS = (
    Part("mnist5k", DECIDING, FEW, 10),
    Part("mnist5k", ("SR-MoE",), FEW, 5, (GUARD,)),
    Part("fashion-mnist", DECIDING, FEW, 5),
    Part("mnist5k", ("linear soft", "linear top-1"), FEW, 5),
    Part("mnist5k", DECIDING, OTHERS, 10),
    Part("fashion-mnist", ("SR-MoE",), FEW, 5, (GUARD,)),
    Part("mnist5k", ("SR-MoE",), FEW, 5, (STREAM,)),
    Part("fashion-mnist", ("SR-MoE",), FEW, 3, (STREAM,)),
    Part("mnist5k", ("SR-MoE",), OTHERS, 5, (GUARD,)),
    Part("mnist5k", ("linear+load_balance",), DEPTHS, 5),
    Part("fashion-mnist", ("linear+load_balance",), FEW, 5),
    Part("fashion-mnist", ("linear", "linear+load_balance", "SR-MoE"), OTHERS, 5),
    Part("fashion-mnist", ("SR-MoE",), OTHERS, 5, (GUARD,)),
    Part("mnist5k", ("SR-MoE",), OTHERS, 5, (STREAM,)),
    Part("fashion-mnist", ("SR-MoE",), OTHERS, 3, (STREAM,)),
    *(Part(data, MORE, FEW, 3) for data in ("mnist5k", "fashion-mnist")),
    *(Part(data, ("linear", "SR-MoE"), FEW, 1, WIDER) for data in ("mnist5k", "fashion-mnist")),
)
FULL_SIZES = Sizes(
    epochs={"fashion-mnist": 1, "mnist5k": 8},
    train_size=None,
    trials=100,
    guard_trials=50,
    stream=100,
    tries=6,
    tune_on="fashion-mnist",
    tune_depth=4,
    tune_size=10_000,
    tune_epochs=2,
    rule_trials=40,
    reference=20_000,
    stream_reference=55_000,
)

QUICK_PARTS = (
    Part("mnist5k", (*DECIDING, "linear soft", "linear top-1", "linear+load_balance", *MORE), (2,), 1),
    Part("mnist5k", ("SR-MoE",), (2,), 1, (GUARD, STREAM)),
    Part("mnist5k", ("linear", "SR-MoE"), (2,), 1, WIDER),
)
QUICK_SIZES = Sizes(
    epochs={"mnist5k": 4},
    train_size=None,
    trials=10,
    guard_trials=10,
    stream=10,
    tries=1,
    tune_on="mnist5k",
    tune_depth=2,
    tune_size=2_000,
    tune_epochs=4,
    rule_trials=10,
    reference=2_500,
    stream_reference=2_500,
)


CHECKED = Part("mnist5k", ("linear", "SR-MoE"), (2,), 10)
"""What ``--check`` runs again."""


def identities(part: Part, ways: Sequence[str] = ("",)) -> list[dict[str, Any]]:
    """The cells of a part, seed by seed, so that a stopped run holds every row alike."""
    return [
        {"row": row + way, "dataset": part.dataset, "depth": depth, "seed": seed}
        for seed in range(part.seeds)
        for depth in part.depths
        for row in part.rows
        for way in ways
    ]


def steps(parts: Sequence[Part], sizes: Sizes) -> list[Step]:
    """Part by part: tune its rows, train its networks, correct them."""
    made: list[Step] = []
    for part in parts:
        ways = [way for way in part.ways if way != STREAM]
        wider = {row: ways_of(row, parts) for row in part.rows}
        made.append(Tuning("tuning", part.rows, partial(tune_row, sizes=sizes, ways=wider)))
        made.append(Cells("curves", identities(part), partial(train_network, sizes=sizes)))
        made.append(Cells("results", identities(part, ways), partial(correct, sizes=sizes)))
        if STREAM in part.ways:
            made.append(Cells("streams", identities(part, [STREAM]), partial(correct_in_a_row, sizes=sizes)))
    return made


def ways_of(row: str, parts: Sequence[Part]) -> list[str]:
    """The ways to correct networks of ``row`` whose step size is tuned, in all parts."""
    ways = dict.fromkeys(way for part in parts if row in part.rows for way in part.ways)
    return [way for way in ways if way not in ("", GUARD, STREAM)]


def card(parts: Sequence[Part], sizes: Sizes, checked: Part | None = None) -> Card:
    """One form of the card."""
    check = None
    if checked is not None:
        again = Cells("results", identities(checked), partial(correct, sizes=sizes))
        keys = ("accuracy", "interference_mean", "min_load_share", "noisy_after", "rotated_after")
        check = Check(again, ("row", "dataset", "depth"), keys)
    return Card("SR-MoE", ABOUT, asdict(sizes), steps(parts, sizes), sections, figures, check)


ABOUT = """
Written by `spectralmoe card papers/sr-moe` from `results.json` and `streams.json`: mean and 95% interval over seeds.
Interference in percentage points of test accuracy, negative is damage. Differences are paired: the same seed, so the
same start and the same order of images, on the same processor; "separated" where their 95% interval leaves out 0.
Single cells are not stable across processors, means over seeds are.

Corrections with the guard are built from noisy copies and copies shifted by one pixel (`shifted 1 px`, so these are no
test of how far they carry; the noise is drawn anew). No correction has seen the other kinds.
"""

ACCURACY = Column("accuracy", "accuracy %", 2, "test accuracy", better="higher")
SHARE = Column("min_load_share", "smallest load share", 3, "smallest load of any expert", better="higher")
COLUMNS = (
    ACCURACY,
    Column("interference_mean", "interference, mean", 3, "mean over the trials that succeeded", better="higher"),
    Column("interference_worst", "worst trial", 2, "least of the same", better="higher"),
    Column("success", "success %", 1, "share of trials that succeeded", 100.0, better="higher"),
    SHARE,
    Column("stable_rank", "stable rank", 2, "of the gate's matrix"),
)
CARRY = tuple(Column(f"{key}_after", f"{kind.text} right %", 0, "", 100.0) for key, kind in COPIES.items())
DIFFERENCES = (
    Column("accuracy", "accuracy", 2, ""),
    Column("interference_mean", "interference", 3, ""),
    SHARE,
)
IN_A_ROW = (
    Column("corrections", "corrections", 0, "how many"),
    Column("success", "success %", 0, "", 100.0),
    Column("cost", "cost", 2, "accuracy on the others at the end, change in points"),
    Column("kept", "kept %", 0, "", 100.0),
)


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """By data set: cells, paired differences, and how far corrections carry; then the corrections in a row."""
    made = []
    rows = {"row": "row", "depth": "depth"}
    for dataset in dict.fromkeys(cell["dataset"] for cell in stored["results"]):
        cells = select(stored["results"], dataset=dataset)
        common: dict[str, Any] = {"rows": rows, "sort": ("depth", "row"), "within": "depth"}
        made.append(Section(f"## {dataset}", cells, COLUMNS, pairs=BASELINES, differences=DIFFERENCES, **common))
        carried = [cell for cell in cells if "rotated_after" in cell]
        heading, guarded = f"### {dataset}: how far corrections carry", (("SR-MoE" + GUARD, "SR-MoE"),)
        made.append(Section(heading, carried, CARRY, pairs=guarded, **common))
    if stored.get("streams"):
        about, columns = {"dataset": "data", "depth": "depth"}, (*IN_A_ROW, *CARRY)
        made.append(Section("## Corrections in a row", stored["streams"], columns, about, ("dataset", "depth")))
    return made


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Interference against depth, load and stable rank through training, and corrections in a row."""
    cells = stored["results"]
    datasets = list(dict.fromkeys(cell["dataset"] for cell in cells))
    return {
        "interference": [panel for name in datasets for panel in _against_depth(select(cells, dataset=name), name)],
        "training": _through_training(stored["curves"]),
        "stream": _streams(stored.get("streams", [])),
    }


def _against_depth(cells: Sequence[Mapping[str, Any]], dataset: str) -> list[Panel]:
    rows = [row for row in (*DECIDING, "SR-MoE" + GUARD) if select(cells, row=row)]
    depths = sorted({cell["depth"] for cell in cells})
    panels: list[Panel] = []
    for key, name, guides in (
        ("interference_mean", "mean", (0.0, -0.32)),
        ("interference_worst", "worst trial", (0.0,)),
    ):
        series: dict[str, list[Point]] = {}
        for row in rows:
            for depth in depths:
                value = estimate([cell.get(key) for cell in select(cells, row=row, depth=depth)])
                if value is not None:
                    series.setdefault(row, []).append(Point(depth, value.mean, value.half))
        panels.append(Lines(f"{dataset}: {name} (points)", series, "depth", "higher", log_x=True, guides=guides))
    return panels


def _through_training(curves: Sequence[Mapping[str, Any]]) -> list[Panel]:
    curves = [curve for curve in curves if "curve" in curve]  # else its training diverged
    dataset = curves[0]["dataset"] if curves else ""
    depth = max((curve["depth"] for curve in curves if curve["depth"] <= 8), default=0)
    chosen = [curve for curve in select(curves, dataset=dataset, depth=depth) if curve["row"] in DECIDING]
    panels: list[Panel] = []
    for key, title in (("min_load_share", "smallest load share"), ("stable_rank", "stable rank of the gate (of 8)")):
        series: dict[str, list[Point]] = {}
        for row in dict.fromkeys(curve["row"] for curve in chosen):
            for points in zip(*(curve["curve"] for curve in select(chosen, row=row)), strict=False):
                mean = sum(point[key] for point in points) / len(points)
                series.setdefault(row, []).append(Point(round(points[0]["done"], 3), mean))
        panels.append(Lines(f"{title}, {dataset}, depth {depth}", series, "share of training done"))
    return panels if chosen else []


def _streams(streams: Sequence[Mapping[str, Any]]) -> list[Panel]:
    panels: list[Panel] = []
    for key, title, guide in (
        ("accuracy_on_others", "accuracy on the others, change in points", -0.5),
        ("kept_so_far", "kept so far", 0.9),
    ):
        series: dict[str, list[Point]] = {}
        for dataset, depth in dict.fromkeys((stream["dataset"], stream["depth"]) for stream in streams):
            chosen = select(streams, dataset=dataset, depth=depth)
            start = sum(s[key][-1] - s["cost"] for s in chosen) / len(chosen) if key == "accuracy_on_others" else 0.0
            series[f"{dataset}, depth {depth}"] = [
                Point(index, sum(values) / len(values) - start)
                for index, values in enumerate(zip(*(s[key] for s in chosen), strict=False), 1)
            ]
        panels.append(Lines(title, series, "corrections", "higher", guides=(guide,)))
    return panels if streams else []


FULL = card(FULL_PARTS, FULL_SIZES, CHECKED)
QUICK = card(QUICK_PARTS, QUICK_SIZES)
