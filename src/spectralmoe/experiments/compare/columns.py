"""The columns of a comparison: what each one is, and the estimates of each row."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from spectralmoe.experiments.statistics import Estimate, estimate

__all__ = ["COLUMNS", "Column", "Row", "show", "summarise", "summary_json"]


@dataclass(frozen=True, slots=True)
class Column:
    """One measure: its key in the results, its heading, how it is shown and drawn, and what it is."""

    key: str
    title: str
    digits: int
    meaning: str
    scale: float = 1.0
    from_zero: bool = True


COLUMNS = (
    Column("accuracy", "accuracy %", 2, "test accuracy before adaptation", from_zero=False),
    Column("max_vio", "MaxVio", 2, "largest load over mean load minus 1, worst layer; 0 is even"),
    Column("gini", "Gini", 2, "Gini coefficient of the load, worst layer; 0 is even"),
    Column("dead_experts", "dead", 1, "experts with less than a tenth of an even load, all layers"),
    Column("sigma_1", "sigma_1", 2, "largest singular value of the routing matrix, mean over layers"),
    Column("stable_rank", "stable rank", 2, "stable rank of the routing matrix, mean over layers"),
    Column("interference", "interference", 2, "mean accuracy change on the other samples by one correction, points"),
    Column("success", "success %", 1, "share of corrections after which the sample is right, 0 to 1", 100.0),
    Column("parameters", "params k", 1, "trained parameters", 1e-3),
    Column(
        "active_flops",
        "MFLOP/img",
        2,
        "operations of matrix products and convolutions, one image",
        1e-6,
    ),
    Column("seconds_per_epoch", "s/epoch", 2, "training seconds an epoch"),
)


@dataclass(frozen=True, slots=True)
class Row:
    """All seeds of one router at one depth: column key -> estimate."""

    router: str
    depth: int
    values: dict[str, Estimate | None]


def summarise(cells: Sequence[Mapping[str, Any]]) -> list[Row]:
    """One row for each router and depth, in order of first appearance within each depth."""
    groups: dict[tuple[int, str], list[Mapping[str, Any]]] = {}
    for cell in cells:
        groups.setdefault((cell["depth"], cell["router"]), []).append(cell)
    return [
        Row(router, depth, {column.key: estimate([cell[column.key] for cell in group]) for column in COLUMNS})
        for (depth, router), group in sorted(groups.items(), key=lambda item: item[0][0])
    ]


def show(column: Column, value: Estimate | None) -> str:
    """The text of one table field, for instance ``97.10 ±0.35``; a dash where nothing was measured.

    >>> show(COLUMNS[0], estimate([97.0, 97.2]))
    '97.10 ±1.27'
    """
    if value is None:
        return "-"
    half = "" if not value.half else f" ±{value.half * column.scale:.{column.digits}f}"
    return f"{value.mean * column.scale:.{column.digits}f}{half}"


def summary_json(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """The rows as JSON values."""
    return [
        {"router": row.router, "depth": row.depth}
        | {key: None if value is None else asdict(value) for key, value in row.values.items()}
        for row in rows
    ]
