"""The data that the scripts of the page draw, in a compact form."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from spectralmoe.report.encode import bits_that_fit, pack, short
from spectralmoe.report.schema import Inspection, Layer, Leaning, Passage, Path
from spectralmoe.report.schema_runs import Comparison, Estimate, Monitor

__all__ = ["comparison_data", "inspection_data", "monitor_data"]

SIMILARITY_LETTERS, LOAD_LETTERS, TABLE_LETTERS, EXAMPLE_LETTERS = 900_000, 300_000, 150_000, 180_000
TEXT_LETTERS = 200_000
"""The letters that one run may take of the page."""

FLOWS, PAIRS, LABELS, CONTEXT, PIECE = 60, 10, 40, 60, 40
MATRICES = ("output", "weights", "rows")


def inspection_data(inspection: Inspection) -> dict[str, Any]:
    """Everything that is drawn of one inspection."""
    layers = inspection.layers
    values = sum(_letters(m) for layer in layers for m in _matrices(layer).values())
    bits = bits_that_fit(values, SIMILARITY_LETTERS)
    kept, examples = _examples(layers)
    return {
        "title": inspection.title,
        "bits": bits,
        "examples": kept,
        "layers": [{**_layer(layer, bits, len(layers)), "examples": examples[i]} for i, layer in enumerate(layers)],
        "paths": [_path(path, (layers[path.first].experts, layers[path.last].experts)) for path in inspection.paths],
        "text": [_passage(passage, _room(passage, len(inspection.text))) for passage in inspection.text],
    }


def _room(passage: Passage, passages: int) -> int:
    """How many tokens of a passage fit: each takes its piece, and about six letters in every layer."""
    return int(TEXT_LETTERS / (passages * (6 * len(passage.layers) + PIECE)))


def _passage(passage: Passage, room: int) -> dict[str, Any]:
    """The first tokens of a passage; of each layer the experts, -1 for none, and the weights in packed form."""
    return {
        "title": passage.title,
        "all": len(passage.pieces),
        "pieces": [piece[:PIECE] for piece in passage.pieces[:room]],
        "layers": [leaning and _leaning(leaning, room) for leaning in passage.layers],
    }


def _leaning(leaning: Leaning, room: int) -> dict[str, Any]:
    weights = np.array(leaning.weights[:room], dtype=np.float64)
    high = float(weights[np.isfinite(weights)].max(initial=1.0))
    return {
        "experts": [-1 if e is None else e for e in leaning.experts[:room]],
        "high": high,
        "weights": pack(weights, 8, 0.0, high),
    }


def _layer(layer: Layer, bits: int, layers: int) -> dict[str, Any]:
    load, geometry, weights = layer.load, layer.geometry, layer.weights
    ranks, dead = geometry.measures if geometry else {}, load.measures.get("dead") if load else None
    return {
        "name": layer.name,
        "label": layer.label,
        "experts": layer.experts,
        "counts": load.counts if load and sum(load.counts) else None,
        "thin": f"{dead.data:,} of {dead.needs:,} {dead.unit}" if dead is not None and dead.value is None else None,
        "weights": [short(x) for x in weights.share]
        if weights and weights.share and load and sum(load.counts)
        else None,
        "spectrum": [short(x) for x in geometry.spectrum] if geometry else [],
        "ranks": {key: short(m.value) for key, m in ranks.items() if key in ("stable_rank", "effective_rank")},
        "similarity": {name: _similarity(matrix, bits) for name, matrix in _matrices(layer).items()},
        "association": _association(layer, layers),
    }


def _matrices(layer: Layer) -> dict[str, np.ndarray]:
    matrices = layer.similarity.matrices if layer.similarity else None
    named = {name: getattr(matrices, name) for name in MATRICES} if matrices else {}
    return {name: matrix for name, matrix in named.items() if matrix is not None and matrix.size}


def _similarity(matrix: np.ndarray, bits: int) -> dict[str, Any]:
    """The upper triangle of a symmetric matrix, all of another; beside it the pairs that are most alike, exactly."""
    symmetric, e = _symmetric(matrix), len(matrix)
    above = np.triu_indices(e, 1)
    known = matrix[np.isfinite(matrix)]
    low, high = min(0.0, known.min(initial=0.0)), max(1.0, known.max(initial=1.0))
    between = np.where(np.isfinite(matrix[above]), matrix[above], -np.inf)
    best = [i for i in np.argsort(-between, kind="stable")[:PAIRS] if np.isfinite(between[i])]
    return {
        "symmetric": symmetric,
        "low": low,
        "high": high,
        "values": pack(matrix[np.triu_indices(e)] if symmetric else matrix, bits, low, high),
        "pairs": [[int(above[0][i]), int(above[1][i]), short(float(between[i]))] for i in best],
    }


def _symmetric(matrix: np.ndarray) -> bool:
    return bool(np.allclose(matrix, matrix.T, atol=1e-4, equal_nan=True))


def _letters(matrix: np.ndarray) -> int:
    return int(len(matrix) * (len(matrix) + 1) // 2 if _symmetric(matrix) else matrix.size)


def _association(layer: Layer, layers: int) -> dict[str, Any] | None:
    """The labels with most tokens; each row as square roots of shares of its tokens."""
    association = layer.association
    if association is None or not association.labels:
        return None
    table = np.array(association.table, dtype=np.float64)
    totals = table.sum(1)
    room = int(TABLE_LETTERS * 6 / 8 / (layer.experts * layers))
    kept = sorted(np.argsort(-totals, kind="stable")[: max(min(room, LABELS), 8)].tolist())
    share = table[kept] / np.where(totals[kept] > 0, totals[kept], np.nan)[:, None]
    return {
        "labels": [association.labels[i] for i in kept],
        "totals": [int(totals[i]) for i in kept],
        "all": len(association.labels),
        "values": pack(np.sqrt(share), 8, 0.0, 1.0),
    }


def _path(path: Path, experts: tuple[int, int]) -> dict[str, Any]:
    """The largest flows, and the tokens of every expert on both sides, if these are known."""
    summed = np.zeros(experts[0]), np.zeros(experts[1])
    for i, j, count in path.flows:
        summed[0][i] += count
        summed[1][j] += count
    known, total = path.mutual_information, summed[0].sum()
    out, into = summed[0] if path.out is None else path.out, summed[1] if path.into is None else path.into
    flows = sorted((flow for flow in path.flows if flow[2] > 0), key=lambda flow: -flow[2])
    return {
        "from": path.first,
        "to": path.last,
        "total": max(float(sum(out)), known.data if known else 0),
        "whole": path.out is not None or known is None or known.data == total,
        "out": list(map(float, out)),
        "into": list(map(float, into)),
        "flows": flows[:FLOWS],
        "information": None if known is None else short(known.value),
    }


def _examples(layers: Sequence[Layer]) -> tuple[dict[str, int], list[list[list[dict[str, Any]]]]]:
    """As many examples as fit: first one for the busiest expert of each layer, then for the second, and so on."""
    kept: list[list[list[dict[str, Any]]]] = [[[] for _ in layer.examples] for layer in layers]
    order = [_busiest(layer) for layer in layers]
    room, total, shown = EXAMPLE_LETTERS, 0, 0
    deepest = max((len(of_expert) for layer in layers for of_expert in layer.examples), default=0)
    for depth in range(deepest):
        for rank in range(max(layer.experts for layer in layers)):
            for place, layer in enumerate(layers):
                expert = order[place][rank] if rank < len(layer.examples) else -1
                if expert < 0 or depth >= len(layer.examples[expert]):
                    continue
                item = layer.examples[expert][depth]
                example = {"text": item.text[:CONTEXT], "weight": short(item.weight), "image": item.image}
                example |= {"before": item.before[-CONTEXT:], "after": item.after[:CONTEXT]}
                example = {key: value for key, value in example.items() if value not in ("", None)}
                total += 1
                cost = sum(len(str(value)) + 12 for value in example.values())
                if cost <= room:
                    room, shown = room - cost, shown + 1
                    kept[place][expert].append(example)
    return {"shown": shown, "total": total}, kept


def _busiest(layer: Layer) -> list[int]:
    counts = layer.load.counts if layer.load else [0] * layer.experts
    return sorted(range(len(layer.examples)), key=lambda e: -counts[e])


def monitor_data(monitor: Monitor) -> dict[str, Any]:
    """The keys of the steps, and the load of each layer at as many steps as fit."""
    steps = {int(row["step"]): row for row in monitor.steps if isinstance(row.get("step"), int)}
    ordered = [steps[step] for step in sorted(steps)]
    keys = dict.fromkeys(key for row in ordered for key in row if key not in ("kind", "step", "tokens"))
    loads = {row.step: row.shares for row in monitor.loads}
    names = list(dict.fromkeys(name for shares in loads.values() for name in shares))
    experts = {name: max(len(shares.get(name, ())) for shares in loads.values()) for name in names}
    labels = {layer.name: layer.label for layer in monitor.layers}
    shown = _spread(sorted(loads), max(int(LOAD_LETTERS * 6 / 8 / max(sum(experts.values()), 1)), 2))
    return {
        "title": monitor.title,
        "steps": [row["step"] for row in ordered],
        "keys": {key: [_number(row.get(key)) for row in ordered] for key in keys},
        "load": {
            "steps": shown,
            "all": len(loads),
            "layers": [
                {"label": labels.get(name, name), "name": name, "experts": experts[name]}
                | _history([loads[step].get(name, []) for step in shown], experts[name])
                for name in names
            ],
        },
    }


def _history(rows: Iterable[Sequence[float | None]], experts: int) -> dict[str, Any]:
    """Square roots of shares over an even share: fine steps where an expert is nearly dead."""
    table = np.array([[*row, *[None] * (experts - len(row))] for row in rows], dtype=np.float64)
    table[np.nansum(table, 1) <= 0] = np.nan  # nothing was counted: no data, not dead
    root = np.sqrt(np.clip(table, 0, None) * experts)
    high = float(root[np.isfinite(root)].max(initial=1.0))
    return {"high": high, "values": pack(root, 8, 0.0, high)}


def _spread(steps: Sequence[int], count: int) -> list[int]:
    """At most ``count`` of them, evenly spread, the first and the last among them."""
    if len(steps) <= count:
        return list(steps)
    return [steps[int(i)] for i in np.linspace(0, len(steps) - 1, count).round()]


def _number(value: Any) -> float | None:
    return short(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def comparison_data(comparison: Comparison) -> dict[str, Any]:
    """Mean, half width and the single values of each measure and row."""
    several = len({row.depth for row in comparison.summary}) > 1
    return {
        "rows": [f"{row.router}, depth {row.depth}" if several else row.router for row in comparison.summary],
        "columns": {
            key: [_estimate(row.estimates.get(key)) for row in comparison.summary]
            for key in comparison.columns or dict.fromkeys(key for row in comparison.summary for key in row.estimates)
        },
        "meanings": comparison.columns,
    }


def _estimate(value: Estimate | None) -> list[Any] | None:
    if value is None or value.mean is None or not math.isfinite(value.mean):
        return None
    return [value.mean, value.half, [x for x in value.values if x is not None and math.isfinite(x)]]
