"""The columns of a comparison: what each one is, and the estimates of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from spectralmoe.errors import one_of
from spectralmoe.experiments.evidence import Cells, difference, show
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.experiments.statistics import Estimate, estimate
from spectralmoe.training.tasks import Metric, Task
from spectralmoe.training.tasks.classification import CLASSIFICATION

__all__ = ["COLUMNS", "Column", "Row", "chosen_columns", "columns_of", "show_value", "summarise", "summary_json"]


@dataclass(frozen=True, slots=True)
class Column:
    """One measure: its key in the results, its heading, how it is shown and drawn, and what it is.

    Attributes:
        better: which way is better; "" where neither is.
        unit: what figures write behind the title, where the title does not hold it.
    """

    key: str
    title: str
    digits: int
    meaning: str
    scale: float = 1.0
    better: Literal["higher", "lower", ""] = ""
    unit: str = ""


_ROUTING = (
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1, worst layer; 0 is even", better="lower"),
    Column("gini", "Gini", 2, "Gini coefficient of the load, worst layer; 0 is even", better="lower"),
    Column(
        "dead_experts",
        "dead",
        1,
        "experts with less than a tenth of an even load, all layers",
        better="lower",
        unit="experts",
    ),
    Column("sigma_1", "sigma_1", 2, "largest singular value of the routing matrix, mean over layers"),
    Column("stable_rank", "stable rank", 2, "stable rank of the routing matrix, mean over layers"),
)

_CORRECTIONS = (
    Column(
        "interference",
        "interference",
        2,
        "mean accuracy change on the other samples by one correction, points",
        better="higher",
        unit="points",
    ),
    Column(
        "success",
        "success %",
        1,
        "share of corrections after which the sample is right, 0 to 1",
        100.0,
        better="higher",
    ),
)

_CHOICES = (
    Column("entropy", "entropy", 2, "entropy of the scores of a token, over log E, mean over tokens and layers"),
    Column(
        "output_overlap",
        "output cos²",
        3,
        "squared cosine of two experts' outputs for one token, mean over pairs, tokens and layers",
        better="lower",
    ),
    Column(
        "noise_flips",
        "flips %",
        1,
        "share of tokens whose choice changes under noise of 5% of their norm, mean over layers, 0 to 1",
        100.0,
        better="lower",
    ),
)

_COST = (
    Column("parameters", "params k", 1, "trained parameters", 1e-3),
    Column(
        "active_flops",
        "MFLOP/sample",
        2,
        "operations of matrix products and convolutions, one sample",
        1e-6,
        better="lower",
    ),
    Column("seconds_per_epoch", "s/epoch", 2, "training seconds an epoch", better="lower"),
)


def columns_of(task: Task) -> tuple[Column, ...]:
    """The metrics of the task, then what every comparison measures; corrections where the task is to classify, else a
    look at the routers' choices.
    """
    if task.labelled("test") is not None:
        return (*map(_column, task.metrics), *_ROUTING, *_CORRECTIONS, *_COST)
    active = Column("active_parameters", "active k", 1, "parameters that a token meets", 1e-3, better="lower")
    speed = Column(
        "per_second",
        f"{task.unit}s/s",
        0,
        f"{task.unit}s trained on a second, one network among others",
        better="higher",
    )
    metrics = [_column(metric, "on the test part") for metric in task.metrics]
    return (*metrics, *_ROUTING, *_CHOICES, _COST[0], active, *_COST[1:], speed)


def _column(metric: Metric, where: str = "on the test part before corrections") -> Column:
    meaning = f"{metric.meaning}, {where}"
    return Column(metric.key, metric.heading, metric.digits, meaning, better=metric.better)


COLUMNS = (*map(_column, CLASSIFICATION), *_ROUTING, *_CORRECTIONS, *_COST)
"""The columns of a comparison of classifiers."""


@dataclass(frozen=True, slots=True)
class Row:
    """All seeds of one router at one depth.

    Attributes:
        values: column key -> estimate.
        differences: the same of the paired differences to the baseline; empty for the baseline itself.
        seeds: those that were measured.  diverged: those whose training diverged.
    """

    router: str
    depth: int
    values: dict[str, Estimate | None]
    differences: dict[str, Estimate | None] = field(default_factory=dict)
    seeds: tuple[int, ...] = ()
    diverged: tuple[int, ...] = ()


def summarise(cells: Cells, columns: Sequence[Column] = COLUMNS, baseline: str | None = None) -> list[Row]:
    """One row for each router and depth, in order of first appearance within each depth.

    Args:
        baseline: the router that the others are compared with, seed by seed; by default the first.

    Raises:
        UserError: no row has the name of ``baseline``.
    """
    routers = list(dict.fromkeys(cell["router"] for cell in cells))
    if baseline is not None and routers and baseline not in routers:
        raise one_of("baseline", baseline, routers)
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["depth"], cell["router"]), []).append(cell)
    named = [{**cell, "row": cell["router"]} for cell in cells]
    return [
        _row(group, [cell for cell in named if cell["depth"] == depth], columns, baseline or routers[0])
        for (depth, _), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def _row(group: Cells, same_depth: Cells, columns: Sequence[Column], baseline: str) -> Row:
    router, depth = group[0]["router"], group[0]["depth"]
    values = {column.key: estimate([cell.get(column.key) for cell in group]) for column in columns}
    differences = (
        {} if router == baseline else {c.key: difference(same_depth, c.key, router, baseline) for c in columns}
    )
    seeds = tuple(cell["seed"] for cell in group if DIVERGED not in cell)
    return Row(router, depth, values, differences, seeds, tuple(c["seed"] for c in group if DIVERGED in c))


def chosen_columns(names: Sequence[str], columns: Sequence[Column] = COLUMNS) -> tuple[Column, ...]:
    """The columns with these keys, in this order; all of them where none is named.

    Raises:
        UserError: an unknown key.

    >>> [column.title for column in chosen_columns(["gini", "accuracy"])]
    ['Gini', 'accuracy %']
    """
    known = {column.key: column for column in columns}
    for name in names:
        if name not in known:
            raise one_of("column", name, list(known))
    return tuple(known[name] for name in names) if names else tuple(columns)


def show_value(column: Column, value: Estimate | None) -> str:
    """The text of one table field, for instance ``97.10 ±0.35``; a dash where nothing was measured.

    >>> show_value(COLUMNS[0], estimate([97.0, 97.2]))
    '97.10 ±1.27'
    """
    return show(value, column.digits, column.scale)


def summary_json(rows: Sequence[Row], baseline: str | None = None) -> list[dict[str, Any]]:
    """The rows as JSON values; a row that is compared with a baseline names it among its differences."""
    name = baseline or (rows[0].router if rows else None)
    return [
        {"router": row.router, "depth": row.depth, "seeds": list(row.seeds), "diverged": list(row.diverged)}
        | _estimates(row.values)
        | ({"differences": {"baseline": name, **_estimates(row.differences)}} if row.differences else {})
        for row in rows
    ]


def _estimates(values: Mapping[str, Estimate | None]) -> dict[str, Any]:
    return {key: None if value is None else asdict(value) for key, value in values.items()}
