"""The measures of an inspection as text: headings, meanings, tables, and the figures on top of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.diagnostics.table import GROUPS, VALUES
from spectralmoe.report.schema import Inspection, Layer
from spectralmoe.report.schema_parts import Group, Quantity

__all__ = ["Cell", "Column", "Tile", "amount", "columns", "compare", "coverage", "figure", "tiles"]


@dataclass(frozen=True, slots=True)
class Column:
    """One measure of the layer table; ``unit`` is that of its data where all layers agree."""

    group: str
    key: str
    title: str
    meaning: str
    unit: str


@dataclass(frozen=True, slots=True)
class Cell:
    """A value as text with the data behind it; ``sort`` is None where there is no data."""

    text: str
    note: str
    full: str
    sort: float | None


@dataclass(frozen=True, slots=True)
class Tile:
    """A figure on top of the page and the amount of data behind it."""

    title: str
    value: str
    note: str


def amount(number: float) -> str:
    """A count in a short form.

    >>> amount(999), amount(8192), amount(1_600_000)
    ('999', '8.2k', '1.6M')
    """
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:.3g}{letter}" if abs(number) < 1e3 * size else f"{number / size:.0f}{letter}"
    return f"{number:g}"


def figure(value: float | None) -> str:
    """Three significant digits, without an exponent where that reads well.

    >>> figure(0.012345), figure(12.0), figure(1234567.0), figure(None)
    ('0.0123', '12', '1.23M', 'no data')
    """
    if value is None or not math.isfinite(value):
        return "no data"
    if abs(value) >= 1e4:
        return amount(float(f"{value:.3g}"))
    return f"{value:.3g}" if abs(value) < 999.5 else f"{value:.0f}"


def group_of(layer: Layer, group: str) -> dict[str, Quantity]:
    """The measures of one group of a layer; none where it was not measured."""
    block: Group | None = getattr(layer, group)
    return block.measures if block else {}


def columns(layers: Iterable[Layer]) -> list[Column]:
    """Every measure that some layer has: those of the table in its order, then the others."""
    units: dict[str, set[str]] = {}
    for layer in layers:
        for group in GROUPS:
            for key, value in group_of(layer, group).items():
                units.setdefault(f"{group}.{key}", set()).add(value.unit)
    order = [*[name for name in VALUES if name in units], *[name for name in units if name not in VALUES]]
    order.sort(key=lambda name: GROUPS.index(name.partition(".")[0]))
    return [_column(name, units[name]) for name in order]


def _column(name: str, units: set[str]) -> Column:
    group, _, key = name.partition(".")
    value = VALUES.get(name)
    title, meaning = (value.title, value.meaning) if value else (key.replace("_", " "), "")
    return Column(group, key, title, meaning, units.pop() if len(units) == 1 else "")


def cell(layer: Layer, column: Column) -> Cell:
    """One field of the layer table."""
    value = group_of(layer, column.group).get(column.key)
    if value is None:
        return Cell("–", "", "not measured", None)
    data = f"{value.data:,} {value.unit}"
    if value.value is None:
        return Cell("no data", amount(value.data), f"no data: {data}, it takes {value.needs:,}", None)
    note = amount(value.data) + ("" if column.unit else f" {value.unit}")
    return Cell(figure(value.value), note, f"{value.value:.6g} from {data}", value.value)


def known(inspection: Inspection, group: str, key: str) -> list[Quantity]:
    """The values that exist, one a layer."""
    quantities = [group_of(layer, group).get(key) for layer in inspection.layers]
    return [value for value in quantities if value is not None and value.value is not None]


def tiles(inspection: Inspection) -> list[Tile]:
    """The headline figures; each says what it rests on."""
    layers, count = inspection.layers, len(inspection.layers)
    experts = sorted({layer.experts for layer in layers})
    chosen = sorted({layer.top_k for layer in layers if layer.top_k is not None})
    spread = f"{experts[0]} to {experts[-1]}" if len(experts) > 1 else f"{experts[0]}"
    shown = [
        Tile("MoE layers", f"{count}", inspection.model.kind or inspection.model.name),
        Tile("experts a layer", spread, f"{', '.join(map(str, chosen))} a token" if chosen else "any number a token"),
    ]
    data, tokens = inspection.data, inspection.data.tokens if inspection.data else 0
    note = f"{data.sequences:,} sequences" if data and data.sequences else "the model was not run" if not tokens else ""
    shown.append(Tile("tokens", amount(tokens) if tokens else "none", note))
    vio, dead = known(inspection, "load", "max_vio"), known(inspection, "load", "dead")
    judged = [
        layer.experts for layer in layers if (value := group_of(layer, "load").get("dead")) and value.value is not None
    ]
    shown += [
        Tile("MaxVio, mean", figure(_mean(vio)), _basis(vio, count)),
        Tile("MaxVio, worst", figure(max((float(v.value or 0) for v in vio), default=None)), _basis(vio, count)),
        Tile(
            "dead experts",
            f"{sum(int(v.value or 0) for v in dead)} of {sum(judged)}" if dead else "no data",
            _basis(dead, count),
        ),
    ]
    entropy = known(inspection, "entropy", "tokens")
    return [*shown, Tile("entropy of tokens", figure(_mean(entropy)), _basis(entropy, count))]


def coverage(inspection: Inspection) -> list[tuple[Column, int, int, str]]:
    """Each measure with the number of layers that have a value, of those without data, and why they have none."""
    rows = []
    for column in columns(inspection.layers):
        quantities = [group_of(layer, column.group).get(column.key) for layer in inspection.layers]
        with_value = sum(value is not None and value.value is not None for value in quantities)
        lacking = [value for value in quantities if value is not None and value.value is None]
        why = (
            f"{min(v.data for v in lacking):,} of {max(v.needs for v in lacking):,} {lacking[0].unit}"
            if lacking
            else ""
        )
        rows.append((column, with_value, len(lacking), why))
    return rows


def compare(inspections: Sequence[Inspection]) -> list[tuple[Column, list[tuple[Cell, Cell]]]]:
    """Each measure as its mean over the layers of every run, with the difference from the first run."""
    rows = []
    for column in columns(layer for inspection in inspections for layer in inspection.layers):
        row, base = [], None
        for index, inspection in enumerate(inspections):
            values = known(inspection, column.group, column.key)
            mean, basis = _mean(values), _basis(values, len(inspection.layers))
            base = mean if index == 0 else base
            change = None if mean is None or base is None else mean - base
            text = "" if index == 0 else "no data" if change is None else "0" if change == 0 else f"{change:+.3g}"
            row.append((Cell(figure(mean), basis, basis, mean), Cell(text, "", text, change if index else None)))
        rows.append((column, row))
    return rows


def _mean(values: Sequence[Quantity]) -> float | None:
    return mean_of([float(v.value or 0) for v in values])


def _basis(values: Sequence[Quantity], layers: int) -> str:
    if not values:
        return f"0 of {layers} layers"
    return f"{len(values)} of {layers} layers, {amount(sum(v.data for v in values))} {values[0].unit}"
