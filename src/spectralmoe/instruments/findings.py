"""Findings: what is wrong with a router, from stated thresholds, with a cure that this library has.

They are read off the values of an inspection (``spectralmoe inspect``), of a checkpoint that is not run,
or of a training run (``Monitor``), so the three agree. A value without data gives no finding: the finding ``no_data``
says what could not be judged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from spectralmoe.instruments.cures import CURES, THRESHOLDS

__all__ = ["Finding", "find_problems", "layer_findings", "model_findings"]

Severity = Literal["severe", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("severe", "warning", "note")


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is wrong.

    Attributes:
        kind: one of the keys of ``CURES``.
        layer: the model's own layer number; None: the whole model.
        name: the path of the layer's module.
        severity: "severe", "warning" or "note".
        message: one sentence with the figures.
        cure: what to do about it.
        measure: the value behind it, with its data (``Measure.as_json``).
        threshold: what the value was held against.
    """

    kind: str
    layer: int | None
    name: str | None
    severity: Severity
    message: str
    cure: str
    measure: Mapping[str, Any] | None = None
    threshold: float | None = None

    def as_json(self) -> dict[str, Any]:
        """Everything, for JSON."""
        return asdict(self)


def find_problems(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All findings of an inspection document, the worst first, as JSON.

    >>> find_problems({"layers": [], "model": {}})
    []
    """
    found = [*model_findings(document["model"])]
    for layer in document["layers"]:
        found += layer_findings(layer)
    if "probabilities_as_logits" in {item.kind for item in found} and _computes_loss(document["model"]):
        text = "the model's balance loss takes the softmax of probabilities: its routers return them as logits"
        found.append(_about_model("double_softmax", "warning", text))
    if document["model"].get("mode") != "router-only":
        found += _unjudged(document["layers"])
    return [item.as_json() for item in sorted(found, key=lambda item: SEVERITIES.index(item.severity))]


def layer_findings(layer: Mapping[str, Any]) -> list[Finding]:
    """The findings of one layer, from its part of an inspection document; what is missing or null is skipped."""
    return [found for rule in _RULES for found in rule(layer)]


def model_findings(model: Mapping[str, Any]) -> Iterator[Finding]:
    """The findings about how the model would be trained, from the "training" block of a Hugging Face model."""
    facts = model.get("training")
    if not facts:
        return
    coefficient, computes = facts["router_aux_loss_coef"], facts["computes_aux_loss"]
    if coefficient and computes and not facts["output_router_logits"]:
        text = f"the balance loss is off: its coefficient is {coefficient}, but output_router_logits is False"
        yield _about_model("balance_off", "warning", text)
    elif coefficient and not computes:
        text = f"the balance loss is off: its coefficient is {coefficient}, but this family computes no such loss"
        yield _about_model("balance_off", "warning", text, CURES["no_balancing"])
    if facts["correction_bias"] and not computes:
        text = "the router has a selection bias, and nothing in transformers updates it"
        yield _about_model("balance_off", "note", text, CURES["no_balancing"])


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
    held, sequences = load["concentration"], load.get("concentration_sequence", {})
    if _reaches(held, "collapse"):
        k = layer["top_k"] or 1
        text = f"the {k} busiest of {layer['experts']} experts take {_busiest(layer, k):.0%} of {slots} slots"
        yield _finding("collapse", layer, "severe", text, held)
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
    ties, flips = stability.get("near_tie", {}), stability.get("bf16", {})
    if _reaches(ties, "near_tie"):
        share, tokens = ties["value"], ties["data"]
        text = f"the best expert left out is within 1% of the choice for {share:.0%} of {tokens} tokens"
        yield _finding("near_tie", layer, "warning", text, ties)
    if _reaches(flips, "precision_flip"):
        text = f"{flips['value']:.1%} of {flips['data']} tokens choose other experts when the router runs in bf16"
        yield _finding("precision_flip", layer, "warning", text, flips)


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


def _router(layer: Mapping[str, Any]) -> Iterator[Finding]:
    if layer.get("finite") is False:
        yield _finding("not_finite", layer, "severe", "weights of the router or its experts are not finite numbers")
    if layer.get("logits_are_probabilities"):
        text = "what the router returns as logits are probabilities"
        yield _finding("probabilities_as_logits", layer, "note", text)
    weights = layer.get("weights") or {}
    if layer["top_k"] == 1 and weights.get("constant"):
        text = "every token has one expert with the constant weight 1: the task gives this router no gradient"
        yield _finding("no_router_gradient", layer, "warning", text)


_RULES: tuple[Rule, ...] = (_load, _stability, _similarity, _router)


_JUDGED = (
    ("load", "dead"),
    ("load", "concentration"),
    ("load", "max_vio"),
    ("stability", "near_tie"),
    ("stability", "bf16"),
    ("similarity", "output_cos2"),
)


def _unjudged(layers: Sequence[Mapping[str, Any]]) -> Iterator[Finding]:
    """One note about all that had too little data."""
    missing: dict[str, int] = {}
    for layer in layers:
        for block, name in _JUDGED:
            measure = (layer.get(block) or {}).get(name)
            if measure is not None and measure["value"] is None:
                missing[name] = missing.get(name, 0) + 1
    if missing:
        listed = ", ".join(f"{name.replace('_', ' ')} ({count})" for name, count in missing.items())
        text = f"no data for these values, in so many of {len(layers)} layers: {listed}"
        yield _about_model("no_data", "note", text)


def _computes_loss(model: Mapping[str, Any]) -> bool:
    return bool((model.get("training") or {}).get("computes_aux_loss"))


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


def _about_model(kind: str, severity: Severity, text: str, cure: str | None = None) -> Finding:
    return Finding(kind, None, None, severity, text, cure or CURES[kind])


def _reaches(measure: Mapping[str, Any], kind: str) -> bool:
    value = measure.get("value")
    return value is not None and value >= THRESHOLDS[kind]


def _busiest(layer: Mapping[str, Any], k: int) -> float:
    return float(sum(sorted(layer["load"]["share"], reverse=True)[:k]))


def _alike(matrix: Sequence[Sequence[float]] | None) -> list[tuple[int, int, float]]:
    """Pairs of experts at or above the threshold of copies, the closest first."""
    found = [
        (i, j, value)
        for i, row in enumerate(matrix or ())
        for j, value in enumerate(row[:i])
        if value is not None and value >= THRESHOLDS["duplicates"]
    ]
    return sorted(((j, i, value) for i, j, value in found), key=lambda pair: -pair[2])
