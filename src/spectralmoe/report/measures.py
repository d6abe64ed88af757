"""The measures of an inspection as text: headings, meanings, tables, and the figures on top of the page."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean

from spectralmoe.report.schema import Group, Inspection, Layer, Quantity

__all__ = ["GROUPS", "Cell", "Column", "Tile", "amount", "columns", "compare", "coverage", "figure", "tiles"]

GROUPS = ("load", "entropy", "geometry", "similarity", "stability", "association")
TITLES: dict[str, tuple[str, str]] = {
    "load.max_vio": ("MaxVio", "largest load over the mean load, minus 1; 0 is even"),
    "load.gini": ("Gini", "Gini coefficient of the load; 0 is even"),
    "load.min_share": ("least share", "share of the least used expert; 1/E is even"),
    "load.max_share": ("most share", "share of the most used expert; 1/E is even"),
    "load.dead": ("dead", "experts with less than a tenth of an even load"),
    "load.concentration": ("concentration", "how far the K busiest experts take all slots; 0 is even, 1 is all"),
    "load.concentration_sequence": ("concentration / seq.", "the same inside single sequences, mean"),
    "load.max_vio_batch": ("MaxVio / batch", "MaxVio inside single batches, mean"),
    "load.max_vio_sequence": ("MaxVio / seq.", "MaxVio inside single sequences, mean"),
    "load.dropped": ("dropped", "share of slots that a capacity emptied"),
    "entropy.tokens": ("of tokens", "entropy of the scores of a token, over log E, mean; 0 is certain, 1 is undecided"),
    "entropy.mean": ("of the mean", "entropy of the mean scores, over log E; 1 is even use"),
    "geometry.sigma_1": ("sigma 1", "largest singular value of the routing matrix"),
    "geometry.stable_rank": ("stable rank", "squared Frobenius norm over squared sigma 1"),
    "geometry.effective_rank": ("effective rank", "exponential of the entropy of the spectrum"),
    "geometry.row_cosine": ("row cosine", "size of the cosine between the rows of two experts, mean"),
    "geometry.row_spread": ("row spread", "how far the rows are from all being the same, 0 to 1; 0 routes nothing"),
    "geometry.jacobian": ("Jacobian", "spectral norm of the derivative of the scores by the token, mean on the data"),
    "similarity.output_cos2": ("outputs cos²", "squared cosine of two experts' outputs for one token, mean"),
    "similarity.cka": ("CKA", "linear centred kernel alignment of two experts' outputs, mean"),
    "similarity.subspace": ("subspace", "overlap of the leading subspaces of two experts' outputs, mean"),
    "similarity.weight_cosine": ("weights cosine", "cosine of two experts' weights, mean"),
    "stability.noise": ("flips, noise", "share of tokens whose choice changes under input noise"),
    "stability.bf16": ("flips, bf16", "share of tokens whose choice changes when the router runs in bf16"),
    "stability.bf16_sound": ("flips, bf16, sound", "the same of a sound router of this size: what bf16 does alone"),
    "stability.near_tie": (
        "near ties",
        "share of tokens whose best expert left out scores within 1% of the last one chosen",
    ),
    "stability.margin": ("margin", "by what share of the last score chosen the best one left out is lower, mean"),
    "association.mutual_information": ("mutual information", "between label and expert"),
}


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
    """A count in few letters.

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
    found: Group | None = getattr(layer, group)
    return found.measures if found else {}


def columns(layers: Iterable[Layer]) -> list[Column]:
    """Every measure that some layer has, known ones in their own order, then the others."""
    units: dict[str, set[str]] = {}
    for layer in layers:
        for group in GROUPS:
            for key, value in group_of(layer, group).items():
                units.setdefault(f"{group}.{key}", set()).add(value.unit)
    order = [*[name for name in TITLES if name in units], *[name for name in units if name not in TITLES]]
    found = []
    for name in sorted(order, key=lambda name: GROUPS.index(name.partition(".")[0])):
        group, _, key = name.partition(".")
        title, meaning = TITLES.get(name, (key.replace("_", " "), ""))
        found.append(Column(group, key, title, meaning, units[name].pop() if len(units[name]) == 1 else ""))
    return found


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
    found = [group_of(layer, group).get(key) for layer in inspection.layers]
    return [value for value in found if value is not None and value.value is not None]


def tiles(inspection: Inspection) -> list[Tile]:
    """The headline figures; each says what it rests on."""
    layers, count = inspection.layers, len(inspection.layers)
    experts = sorted({layer.experts for layer in layers})
    chosen = sorted({layer.top_k for layer in layers if layer.top_k is not None})
    spread = f"{experts[0]} to {experts[-1]}" if len(experts) > 1 else f"{experts[0]}"
    found = [
        Tile("MoE layers", f"{count}", inspection.model.kind or inspection.model.name),
        Tile("experts a layer", spread, f"{', '.join(map(str, chosen))} a token" if chosen else "any number a token"),
    ]
    data, tokens = inspection.data, inspection.data.tokens if inspection.data else 0
    note = f"{data.sequences:,} sequences" if data and data.sequences else "the model was not run" if not tokens else ""
    found.append(Tile("tokens", amount(tokens) if tokens else "none", note))
    vio, dead = known(inspection, "load", "max_vio"), known(inspection, "load", "dead")
    judged = [
        layer.experts for layer in layers if (value := group_of(layer, "load").get("dead")) and value.value is not None
    ]
    found += [
        Tile("MaxVio, mean", figure(_mean(vio)), _basis(vio, count)),
        Tile("MaxVio, worst", figure(max((float(v.value or 0) for v in vio), default=None)), _basis(vio, count)),
        Tile(
            "dead experts",
            f"{sum(int(v.value or 0) for v in dead)} of {sum(judged)}" if dead else "no data",
            _basis(dead, count),
        ),
    ]
    entropy = known(inspection, "entropy", "tokens")
    return [*found, Tile("entropy of tokens", figure(_mean(entropy)), _basis(entropy, count))]


def coverage(inspection: Inspection) -> list[tuple[Column, int, int, str]]:
    """What was looked at: each measure with the layers that have a value, those without data, and why."""
    found = []
    for column in columns(inspection.layers):
        held = [group_of(layer, column.group).get(column.key) for layer in inspection.layers]
        with_value = sum(value is not None and value.value is not None for value in held)
        lacking = [value for value in held if value is not None and value.value is None]
        why = (
            f"{min(v.data for v in lacking):,} of {max(v.needs for v in lacking):,} {lacking[0].unit}"
            if lacking
            else ""
        )
        found.append((column, with_value, len(lacking), why))
    return found


def compare(inspections: Sequence[Inspection]) -> list[tuple[Column, list[tuple[Cell, Cell]]]]:
    """Each measure as its mean over the layers of every run, with the difference from the first run."""
    found = []
    for column in columns(layer for inspection in inspections for layer in inspection.layers):
        row, base = [], None
        for index, inspection in enumerate(inspections):
            values = known(inspection, column.group, column.key)
            mean, basis = _mean(values), _basis(values, len(inspection.layers))
            base = mean if index == 0 else base
            change = None if mean is None or base is None else mean - base
            text = "" if index == 0 else "no data" if change is None else "0" if change == 0 else f"{change:+.3g}"
            row.append((Cell(figure(mean), basis, basis, mean), Cell(text, "", text, change if index else None)))
        found.append((column, row))
    return found


def _mean(values: Sequence[Quantity]) -> float | None:
    return fmean(float(v.value or 0) for v in values) if values else None


def _basis(values: Sequence[Quantity], layers: int) -> str:
    if not values:
        return f"0 of {layers} layers"
    return f"{len(values)} of {layers} layers, {amount(sum(v.data for v in values))} {values[0].unit}"
