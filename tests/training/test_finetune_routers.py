"""Routers and terms of a finetuning: the rows of ``compare`` in Hugging Face models."""

from __future__ import annotations

import pytest

pytest.importorskip("transformers")

from families import batch, build

from spectralmoe.hf.training.text_windows import Windows
from spectralmoe.layers import moe_layers
from spectralmoe.selectors import Balanced, ClusterDropout, TopK, TopP
from spectralmoe.training.finetuning.routers import router_of, swap_to_row, terms_of
from spectralmoe.training.settings.finetuning import FinetuneSettings


def put(family, row, **changes):
    model = build(family, **changes)
    ids = batch(model, rows=6)["input_ids"]
    preset = router_of(FinetuneSettings(router=row))
    swapped = swap_to_row(model, preset, Windows(ids, ids), 4)
    return [layer.router for layer in moe_layers(model).values()], swapped


def test_a_row_without_a_selector_keeps_the_rule_of_the_model():
    for family, changes, kind, score in (
        ("mixtral", {}, TopK, "softmax"),
        ("deepseek_v3", {"n_group": 1, "topk_group": 1}, Balanced, "sigmoid"),
    ):
        routers, swapped = put(family, "linear", **changes)
        assert set(swapped.agreement.values()) == {1.0}
        assert {(type(router.selector), router.selector.score) for router in routers} == {(kind, score)}


def test_a_selector_scores_and_normalises_as_the_model_does():
    for family, normalize in (("mixtral", True), ("olmoe", False)):
        routers, swapped = put(family, "linear+balanced")
        assert {type(router.selector) for router in routers} == {Balanced}
        assert {router.selector.normalize for router in routers} == {normalize}
        assert {router.selector.rate for router in routers} == {1e-2}
        assert set(swapped.agreement.values()) == {1.0}


def test_a_row_says_how_many_experts_a_token_has():
    routers, _ = put("mixtral", {"scorer": "linear", "k": 3})
    assert {(type(router.selector), router.selector.k, router.selector.normalize) for router in routers} == {
        (TopK, 3, True)
    }
    routers, _ = put("mixtral", {"scorer": "linear", "selector": "topp", "p": 0.6})
    assert {(type(router.selector), router.selector.p) for router in routers} == {(TopP, 0.6)}


def test_a_wrapped_selector_scores_as_the_model_does():
    routers, _ = put("mixtral", "moec")
    for selector in (router.selector for router in routers):
        assert (type(selector), selector.groups, selector.interval) == (ClusterDropout, 2, 10)
        assert (type(selector.selector), selector.selector.k, selector.selector.normalize) == (TopK, 2, True)


def test_another_scorer_is_fitted_to_the_gate():
    routers, swapped = put("mixtral", "prototype")
    assert min(swapped.agreement.values()) > 0.9
    assert all(router.selector.normalize for router in routers)


def test_terms_are_those_of_the_row_and_of_the_settings():
    assert set(terms_of(FinetuneSettings(terms={"load_balance": 0.1}))) == {"load_balance"}
    terms = terms_of(FinetuneSettings(router="sr-moe", terms={"spectral_penalty": 0.5, "router_z": 1e-3}))
    assert {name: term.weight for name, term in terms.items()} == {"spectral_penalty": 0.5, "router_z": 1e-3}
    assert terms["spectral_penalty"].reduce == "sum"
    assert router_of(FinetuneSettings()) is None


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"scorer": "linear", "experts": "feed_forward"}, ["experts 'feed_forward'", "keeps the model's experts"]),
        ({"scorer": "linear", "k": "soft"}, ['k = "soft"', "keeps the model's experts"]),
        ("omoe", ["router 'omoe' asks for optimizer 'orthogonal_experts'", "the Trainer's optimizer"]),
        ("liner", ["unknown router 'liner'", "did you mean 'linear'"]),
    ],
)
def test_rows_that_a_finetuning_cannot_take(row, words, user_error):
    with user_error(*words):
        router_of(FinetuneSettings(router=row))
