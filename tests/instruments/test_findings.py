"""Findings from stated thresholds: at the threshold and below it, and without data."""

from __future__ import annotations

import pytest

from spectralmoe.instruments.cures import CURES, THRESHOLDS
from spectralmoe.instruments.problems import find_problems


def measure(value, data=1000):
    return {"value": value, "data": data, "unit": "tokens"}


def layer(**changes):
    """A healthy layer, with values of "block.name" changed."""
    found = {
        "name": "model.layers.3.mlp",
        "layer": 3,
        "stack": "",
        "experts": 8,
        "top_k": 2,
        "finite": True,
        "logits_are_probabilities": False,
        "load": {
            "share": [0.125] * 8,
            **{
                name: measure(0.0) for name in ("dead", "concentration", "concentration_sequence", "max_vio", "dropped")
            },
        },
        "weights": {"share": [0.125] * 8, "constant": False},
        "stability": {name: measure(0.0) for name in ("near_tie", "bf16", "noise")},
        "similarity": {"output_cos2": measure(0.05), "matrices": {"output": None, "weights": None, "rows": None}},
    }
    for path, value in changes.items():
        *blocks, name = path.split("__")
        place = found
        for block in blocks:
            place = place[block]
        place[name] = value
    return found


def kinds(*layers, **model):
    return [finding["kind"] for finding in find_problems({"model": model, "layers": layers})]


CASES = {
    "dead_experts": ("load__dead", 1.0, 0.0),
    "collapse": ("load__concentration", 0.75, 0.74),
    "sequence_collapse": ("load__concentration_sequence", 0.75, 0.74),
    "imbalance": ("load__max_vio", 2.0, 1.99),
    "dropped_slots": ("load__dropped", 0.05, 0.049),
    "near_tie": ("stability__near_tie", 0.5, 0.49),
    "precision_flip": ("stability__bf16", 0.05, 0.049),
    "homogeneous": ("similarity__output_cos2", 0.5, 0.49),
}


@pytest.mark.parametrize("kind", CASES)
def test_a_finding_is_made_at_its_threshold_and_not_below(kind):
    path, at, below = CASES[kind]
    assert at == THRESHOLDS[kind]
    assert kinds(layer(**{path: measure(at)})) == [kind]
    assert kinds(layer(**{path: measure(below)})) == []


def test_a_value_without_data_is_no_finding_but_is_named():
    found = find_problems(
        {"model": {}, "layers": [layer(load__dead={"value": None, "data": 3, "unit": "slots", "needs": 80})]}
    )
    assert [finding["kind"] for finding in found] == ["no_data"]
    assert "dead (1)" in found[0]["message"]


def test_a_finding_says_where_how_much_and_what_to_do():
    (found,) = find_problems({"model": {}, "layers": [layer(load__dead=measure(5.0, 4096))]})
    assert found["message"].startswith("layer 3: 5 of 8 experts dead")
    assert "4096" in found["message"]
    assert found["severity"] == "severe"
    assert found["layer"] == 3
    assert found["name"] == "model.layers.3.mlp"
    assert "load_balance" in found["cure"]
    assert found["measure"] == measure(5.0, 4096)


def test_copies_among_experts_are_found_by_pair():
    table = [[1.0, 0.1, 0.99], [0.1, 1.0, 0.2], [0.99, 0.2, 1.0]]
    sick = layer(experts=3, similarity__matrices={"output": table, "weights": None, "rows": None})
    (found,) = find_problems({"model": {}, "layers": [sick]})
    assert found["kind"] == "homogeneous"
    assert "experts 0 and 2" in found["message"]


def test_a_checkpoint_that_was_not_run_is_judged_by_its_weights():
    table = [[1.0, 1.0], [1.0, 1.0]]
    bare = {
        **layer(experts=2, similarity__matrices={"output": None, "weights": table, "rows": None}),
        "load": None,
        "weights": None,
        "entropy": None,
        "stability": None,
    }
    bare["similarity"]["output_cos2"] = {"value": None, "data": 0, "unit": "tokens", "needs": 8}
    assert "homogeneous" in kinds(bare)


def test_weights_that_are_no_numbers_come_first():
    assert kinds(layer(load__max_vio=measure(3.0)), layer(finite=False))[0] == "not_finite"


def test_a_router_with_one_constant_weight_gets_no_gradient():
    assert kinds(layer(top_k=1, weights__constant=True)) == ["no_router_gradient"]
    assert kinds(layer(top_k=2, weights__constant=True)) == []


FACTS = {
    "router_aux_loss_coef": 0.001,
    "output_router_logits": False,
    "computes_aux_loss": True,
    "correction_bias": False,
}


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, ["balance_off"]),
        ({"output_router_logits": True}, []),
        ({"router_aux_loss_coef": 0.0}, []),
        ({"computes_aux_loss": False}, ["balance_off"]),
        ({"computes_aux_loss": False, "router_aux_loss_coef": None}, []),
        ({"computes_aux_loss": False, "router_aux_loss_coef": None, "correction_bias": True}, ["balance_off"]),
    ],
)
def test_a_balance_loss_that_is_silently_off(changes, expected):
    assert kinds(layer(), training={**FACTS, **changes}) == expected


def test_the_softmax_of_probabilities():
    facts = {**FACTS, "output_router_logits": True}
    assert kinds(layer(logits_are_probabilities=True), training=facts) == ["double_softmax", "probabilities_as_logits"]
    assert kinds(layer(logits_are_probabilities=True)) == ["probabilities_as_logits"]


def test_every_finding_has_a_cure():
    assert set(THRESHOLDS) - {"duplicates"} <= set(CURES)


@pytest.mark.parametrize(
    ("value", "data", "sound", "expected"),
    [
        (0.075, 2048, 0.045, []),  # 256 experts: below twice what rounding does anyway
        (0.095, 2048, 0.045, ["precision_flip"]),
        (0.05, 2048, 0.002, ["precision_flip"]),
        (0.06, 64, 0.002, []),  # chance: four tokens
        (0.30, 64, 0.002, ["precision_flip"]),
        (0.05, 2048, None, ["precision_flip"]),
    ],
)
def test_flips_are_held_against_a_sound_router_and_chance(value, data, sound, expected):
    found = find_problems(
        {
            "model": {},
            "layers": [layer(stability__bf16=measure(value, data), stability__bf16_sound=measure(sound, data))],
        }
    )
    assert [item["kind"] for item in found] == expected
    for item in found:
        assert item["threshold"] == max(0.05, 2 * (sound or 0))
        assert item["measure"]["value"] >= item["threshold"]


@pytest.mark.parametrize("key", ["finite", "finite_scores"])
def test_of_a_layer_that_is_not_finite_nothing_else_is_said(key):
    nothing = {"value": None, "data": 0, "unit": "tokens", "needs": 64}
    sick = layer(load__dead=measure(6.0), load__max_vio=measure(5.0), stability__near_tie=nothing, **{key: False})
    assert kinds(sick) == ["not_finite"]


def test_a_gate_that_tells_nothing_apart_and_empty_experts():
    assert kinds(layer(geometry={"row_spread": measure(0.01, 8)})) == ["no_router"]
    assert kinds(layer(geometry={"row_spread": measure(0.011, 8)})) == []
    (found,) = find_problems({"model": {}, "layers": [layer(empty_experts=[1, 5])]})
    assert (found["kind"], found["severity"], found["measure"]["value"]) == ("empty_expert", "severe", 2)
    assert "(1, 5)" in found["message"]


def test_one_expert_is_no_router_without_gradient():
    assert kinds(layer(top_k=1, experts=1, weights__constant=True)) == []


def test_more_tokens_are_not_advised_where_they_would_not_help():
    few = {"value": None, "data": 3, "unit": "tokens", "needs": 64}
    never = {"value": None, "data": 0, "unit": "tokens", "needs": 64}
    found = find_problems({"model": {}, "layers": [layer(stability__near_tie=few), layer(stability__near_tie=never)]})
    assert [item["message"].split()[0] for item in found] == ["no", "not"]
    assert ["--tokens" in item["cure"] for item in found] == [True, False]


def test_what_half_precision_hides_is_said():
    (found,) = find_problems({"model": {"mode": "run", "dtype": "bfloat16"}, "layers": [layer()]})
    assert (found["kind"], found["severity"]) == ("no_data", "note")
    assert "bfloat16" in found["message"]
    assert kinds(layer(), mode="run", dtype="float32") == []


def test_weights_alone_are_no_clean_bill():
    (found,) = find_problems({"model": {"mode": "router-only", "dtype": "bfloat16"}, "layers": []})
    assert (found["kind"], found["severity"]) == ("no_data", "note")
    assert "load" in found["message"]
