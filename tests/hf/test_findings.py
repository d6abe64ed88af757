"""Each sickness is found in each family, and nothing is found in a healthy model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from families import FAMILIES, batch
from families_sick import SICK, healthy, matrix_of, stacks
from grids import one_of_each

from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments import Inspector, inspection_document

KINDS = set(SICK)
families = pytest.mark.parametrize("family", FAMILIES)


def inspected(model: Any) -> dict[str, Any]:
    with watch_transformers(model) as seen, torch.no_grad():
        inspector = Inspector(seen.layers)
        for seed in range(2):
            model(**batch(model, rows=4, length=64, seed=seed))
            inspector.add(seen.drain())
        return inspection_document("tiny", {}, {}, inspector.layers(), inspector.paths())


@families
def test_a_healthy_model_has_no_findings(family):
    assert inspected(healthy(family))["findings"] == []


@one_of_each(family=FAMILIES, kind=SICK)
def test_a_sick_model_is_found_out_in_every_layer(family, kind):
    document = inspected(SICK[kind](family))
    found = [finding for finding in document["findings"] if finding["kind"] == kind]
    assert [finding["layer"] for finding in found] == [layer["layer"] for layer in document["layers"]]
    for finding in found:
        assert finding["message"]
        assert finding["cure"]
        assert finding["severity"] in ("severe", "warning")
        assert finding["measure"]["value"] >= finding["threshold"]


@families
def test_a_sickness_is_not_taken_for_another(family):
    """Collapse brings dead experts, ties and flips go together at times; but alike experts and collapse stand apart."""
    kinds = {kind: {finding["kind"] for finding in inspected(make(family))["findings"]} for kind, make in SICK.items()}
    assert "homogeneous" not in kinds["collapse"] | kinds["near_tie"] | kinds["precision_flip"]
    assert not {"collapse", "dead_experts"} & (kinds["homogeneous"] | kinds["near_tie"])
    assert not {"near_tie", "precision_flip"} & (kinds["homogeneous"] | kinds["collapse"])


@families
def test_one_expert_that_is_no_number_is_found(family):
    model = healthy(family)
    last = find_layers(model)[-1]
    with torch.no_grad():
        for _, values in stacks(last):
            values[1].view(-1)[-1] = float("nan")
    document = inspected(model)
    found = [(item["kind"], item["name"]) for item in document["findings"]]
    assert ("not_finite", last.name) in found
    assert {kind for kind, _ in found} == {"not_finite"}


@one_of_each(family=FAMILIES, kind=["no_router", "empty_expert"])
def test_weights_that_were_never_trained(family, kind):
    model = healthy(family)
    first = find_layers(model)[0]
    with torch.no_grad():
        for value in [matrix_of(first)] if kind == "no_router" else [values[1] for _, values in stacks(first)]:
            value.zero_()
    assert (kind, first.name) in [(item["kind"], item["name"]) for item in inspected(model)["findings"]]


def test_what_all_selection_biases_have_in_common_is_no_tie():
    model = healthy("deepseek_v3")
    for layer in find_layers(model):
        layer.correction_bias.fill_(20.0)
    assert inspected(model)["findings"] == []


def test_large_logits_of_a_sigmoid_are_no_ties():
    model = healthy("llama4")
    with torch.no_grad():
        for layer in find_layers(model):
            matrix_of(layer).mul_(6)
    assert "near_tie" not in {item["kind"] for item in inspected(model)["findings"]}
