"""The rules of findings about one layer, from its part of an inspection document or of a monitor's report."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from spectralmoe.diagnostics import duplicates
from spectralmoe.instruments.cures import CURES, THRESHOLDS
from spectralmoe.instruments.findings import Finding, Severity

__all__ = ["layer_findings", "not_finite"]

_LISTED = 8


def layer_findings(layer: Mapping[str, Any]) -> list[Finding]:
    """The findings of one layer, from its part of an inspection document; what is missing or null is skipped.

    Of a layer with numbers that are not finite nothing else is said: its other values mean nothing.
    """
    return list(not_finite(layer)) or [finding for rule in _RULES for finding in rule(layer)]


def not_finite(layer: Mapping[str, Any]) -> Iterator[Finding]:
    """Weights or scores that are no numbers."""
    if layer.get("finite") is False:
        yield _finding("not_finite", layer, "severe", "weights of the router or its experts are not finite numbers")
    elif layer.get("finite_scores") is False:
        text = "the scores are not finite numbers: the router's weights, or the tokens that it reads, are not"
        yield _finding("not_finite", layer, "severe", text)


Rule = Callable[[Mapping[str, Any]], Iterator[Finding]]


def _load(layer: Mapping[str, Any]) -> Iterator[Finding]:
    load = layer.get("load")
    if not load:
        return
    dead, slots = load["dead"], load["dead"]["data"]
    if _reaches(dead, "dead_experts"):
        count, e = int(dead["value"]), layer["experts"]
        text = f"{count} of {e} experts dead (less than a tenth of an even share of {slots} slots)"
        yield _finding("dead_experts", layer, "severe" if 4 * count >= e else "warning", text, dead)
    concentration, sequences = load["concentration"], load.get("concentration_sequence", {})
    if _reaches(concentration, "collapse"):
        k = layer["top_k"] or 1
        text = f"the {k} busiest of {layer['experts']} experts take {_busiest(layer, k):.0%} of {slots} slots"
        yield _finding("collapse", layer, "severe", text, concentration)
    elif _reaches(sequences, "sequence_collapse"):
        text = (
            f"single sequences use few experts: concentration {sequences['value']:.2f} in {sequences['data']} sequences"
        )
        yield _finding("sequence_collapse", layer, "warning", text, sequences)
    elif _reaches(load["max_vio"], "imbalance"):
        text = f"the busiest expert carries {load['max_vio']['value'] + 1:.1f} times an even load ({slots} slots)"
        yield _finding("imbalance", layer, "warning", text, load["max_vio"])
    if _reaches(load["dropped"], "dropped_slots"):
        text = f"{load['dropped']['value']:.1%} of {load['dropped']['data']} slots dropped by the capacity"
        yield _finding("dropped_slots", layer, "warning", text, load["dropped"])


def _stability(layer: Mapping[str, Any]) -> Iterator[Finding]:
    stability = layer.get("stability") or {}
    ties = stability.get("near_tie", {})
    if _reaches(ties, "near_tie"):
        share, tokens = ties["value"], ties["data"]
        text = f"the best expert left out is within 1% of the choice for {share:.0%} of {tokens} tokens"
        yield _finding("near_tie", layer, "warning", text, ties)
    yield from _flips(layer, stability.get("bf16", {}), stability.get("bf16_sound", {}))


def _flips(layer: Mapping[str, Any], flips: Mapping[str, Any], sound: Mapping[str, Any]) -> Iterator[Finding]:
    """More than rounding does to a sound router of this size, by a factor of 2 and clear of chance: three standard
    deviations from half the limit."""
    share, usual = flips.get("value"), sound.get("value") or 0.0
    limit = max(THRESHOLDS["precision_flip"], 2 * usual)
    if share is None or share < limit or share - 3 * math.sqrt(share * (1 - share) / flips["data"]) <= limit / 2:
        return
    than = f", {usual:.1%} with a sound router of this size" if sound.get("value") is not None else ""
    text = f"{share:.1%} of {flips['data']} tokens choose other experts when the router runs in bf16{than}"
    yield _finding("precision_flip", layer, "warning", text, flips, threshold=limit)


def _similarity(layer: Mapping[str, Any]) -> Iterator[Finding]:
    similarity = layer.get("similarity") or {}
    mean, matrices = similarity.get("output_cos2", {}), similarity.get("matrices", {})
    pairs = _alike(matrices.get("output") or matrices.get("weights"))
    if _reaches(mean, "homogeneous"):
        text = (
            f"the experts are alike: mean squared cosine of their outputs {mean['value']:.2f} on {mean['data']} tokens"
        )
        yield _finding("homogeneous", layer, "severe" if mean["value"] > 0.9 else "warning", text, mean)
    elif pairs:
        i, j, value = pairs[0]
        what = "outputs" if matrices.get("output") else "weights"
        more = f" and {len(pairs) - 1} more pairs" if len(pairs) > 1 else ""
        text = f"experts {i} and {j}{more} are copies of each other (cosine of their {what} {value:.2f})"
        share = len(pairs) / (layer["experts"] * (layer["experts"] - 1) / 2)
        severity: Severity = "severe" if share > 0.5 else "warning"
        yield _finding("homogeneous", layer, severity, text, threshold=THRESHOLDS["duplicates"])


def _weights(layer: Mapping[str, Any]) -> Iterator[Finding]:
    spread, empty = (layer.get("geometry") or {}).get("row_spread", {}), layer.get("empty_experts") or []
    if spread.get("value") is not None and spread["value"] <= THRESHOLDS["no_router"]:
        text = f"the router tells no experts apart: its {spread['data']} rows differ by {spread['value']:.1%}"
        yield _finding("no_router", layer, "severe", text, spread)
    if empty:
        listed = ", ".join(map(str, empty[:_LISTED])) + (", ..." if len(empty) > _LISTED else "")
        text = f"{len(empty)} of {layer['experts']} experts empty, all their weights are zero ({listed})"
        measure = {"value": float(len(empty)), "data": layer["experts"], "unit": "experts"}
        yield _finding("empty_expert", layer, "severe", text, measure)


def _router(layer: Mapping[str, Any]) -> Iterator[Finding]:
    if layer.get("logits_are_probabilities"):
        text = "what the router returns as logits are probabilities"
        yield _finding("probabilities_as_logits", layer, "note", text)
    weights = layer.get("weights") or {}
    if layer["top_k"] == 1 < layer["experts"] and weights.get("constant"):
        text = "every token has one expert with the constant weight 1: the task gives this router no gradient"
        yield _finding("no_router_gradient", layer, "warning", text)


_RULES: tuple[Rule, ...] = (_weights, _load, _stability, _similarity, _router)


def _finding(
    kind: str,
    layer: Mapping[str, Any],
    severity: Severity,
    text: str,
    measure: Mapping[str, Any] | None = None,
    *,
    threshold: float | None = None,
) -> Finding:
    place = f"{layer['stack']} layer {layer['layer']}" if layer.get("stack") else f"layer {layer['layer']}"
    limit = THRESHOLDS.get(kind) if threshold is None else threshold
    return Finding(kind, layer["layer"], layer["name"], severity, f"{place}: {text}", CURES[kind], measure, limit)


def _reaches(measure: Mapping[str, Any], kind: str) -> bool:
    value = measure.get("value")
    return value is not None and value >= THRESHOLDS[kind]


def _busiest(layer: Mapping[str, Any], k: int) -> float:
    return float(sum(sorted(layer["load"]["share"], reverse=True)[:k]))


def _alike(matrix: Sequence[Sequence[float]] | None) -> list[tuple[int, int, float]]:
    """Pairs of experts at or above the threshold of copies, the closest first."""
    if not matrix:
        return []
    known = [[math.nan if value is None else value for value in row] for row in matrix]
    pairs = duplicates(torch.tensor(known, dtype=torch.float64), THRESHOLDS["duplicates"])
    return sorted(((i, j, matrix[i][j]) for i, j in pairs), key=lambda pair: -pair[2])
