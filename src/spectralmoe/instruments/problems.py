"""The findings of a document: what is wrong with its routers, from stated thresholds, with cures for the model.

They follow from the values of an inspection (``spectralmoe inspect``), of a checkpoint that is not run,
or of a training run (``Monitor``), so the three agree. A value without data gives no finding: the finding ``no_data``
says what could not be judged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

from spectralmoe.instruments.cures import CURES, cures_for
from spectralmoe.instruments.findings import SEVERITIES, Finding, Severity
from spectralmoe.instruments.rules import layer_findings, not_finite

__all__ = ["find_problems", "model_findings"]


def find_problems(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All findings of an inspection document, the worst first, as JSON.

    >>> find_problems({"layers": [], "model": {}})
    []
    """
    cures = cures_for(document["model"], document["layers"])
    findings = [*model_findings(document["model"], cures)]
    for layer in document["layers"]:
        findings += [replace(item, cure=cures[item.kind]) for item in layer_findings(layer)]
    if "probabilities_as_logits" in {item.kind for item in findings} and _computes_loss(document["model"]):
        text = "the model's balance loss takes the softmax of probabilities: its routers return them as logits"
        findings.append(_about_model("double_softmax", "warning", text, cures["double_softmax"]))
    findings += _not_run(cures) if document["model"].get("mode") == "router-only" else _unjudged(document, cures)
    return [item.as_json() for item in sorted(findings, key=lambda item: SEVERITIES.index(item.severity))]


def model_findings(model: Mapping[str, Any], cures: Mapping[str, str] = CURES) -> Iterator[Finding]:
    """The findings about how the model would be trained, from the "training" block of a Hugging Face model.

    Args:
        cures: by kind, as ``cures_for`` gives them.
    """
    facts = model.get("training")
    if not facts:
        return
    coefficient, computes = facts["router_aux_loss_coef"], facts["computes_aux_loss"]
    if coefficient and computes and not facts["output_router_logits"]:
        text = f"the balance loss is off: its coefficient is {coefficient}, but output_router_logits is False"
        yield _about_model("balance_off", "warning", text, cures["balance_off"])
    elif coefficient and not computes:
        text = f"the balance loss is off: its coefficient is {coefficient}, but this family computes no such loss"
        yield _about_model("balance_off", "warning", text, cures["no_balancing"])
    if facts["correction_bias"] and not computes:
        text = "the router has a selection bias, and nothing in transformers updates it"
        yield _about_model("balance_off", "note", text, cures["no_balancing"])


_HALF = ("bfloat16", "float16")
_JUDGED = (
    ("load", "dead"),
    ("load", "concentration"),
    ("load", "max_vio"),
    ("stability", "near_tie"),
    ("stability", "bf16"),
    ("similarity", "output_cos2"),
)


def _unjudged(document: Mapping[str, Any], cures: Mapping[str, str]) -> Iterator[Finding]:
    """Notes about values with too little data, values that no data can give, and values limited by the precision."""
    layers = [layer for layer in document["layers"] if not any(not_finite(layer))]
    few, never = Counter[str](), Counter[str]()
    for layer in layers:
        loaded = ((layer.get("load") or {}).get("dead") or {}).get("value") is not None
        for block, name in _JUDGED:
            measure = (layer.get(block) or {}).get(name)
            if measure is not None and measure["value"] is None:
                little = measure["data"] < measure.get("needs", 1) and (measure["data"] or not loaded)
                (few if little else never)[name.replace("_", " ")] += 1
    for missing, kind, text in ((few, "no_data", "no data for"), (never, "no_choice", "not defined are")):
        if missing:
            listed = ", ".join(f"{name} ({count})" for name, count in missing.items())
            text = f"{text} these values, in so many of {len(document['layers'])} layers: {listed}"
            yield _about_model("no_data", "note", text, cures[kind])
    dtype = document["model"].get("dtype")
    if dtype in _HALF and any((layer.get("stability") or {}).get("bf16") for layer in layers):
        text = f"the weights were loaded in {dtype}: what rounding them to it did to the choices is not known"
        yield _about_model("no_data", "note", text, cures["half_precision"])


def _not_run(cures: Mapping[str, str]) -> Iterator[Finding]:
    """A note that lists the values that cannot be computed from weights alone."""
    text = "no data for load, entropy, stability and outputs: the weights alone were read, and nothing was run"
    yield _about_model("no_data", "note", text, cures["not_run"])


def _computes_loss(model: Mapping[str, Any]) -> bool:
    return bool((model.get("training") or {}).get("computes_aux_loss"))


def _about_model(kind: str, severity: Severity, text: str, cure: str) -> Finding:
    return Finding(kind, None, None, severity, text, cure)
