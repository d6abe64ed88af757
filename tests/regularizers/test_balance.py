"""Load balance, router z-loss and importance against their equations; the values that everybody quotes."""

from __future__ import annotations

import math

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, PrototypeScorer, Router, Soft, TopK, record
from spectralmoe.regularizers import importance_cv2, load_balance, router_z

TERMS = {"load_balance": load_balance, "router_z": router_z, "importance_cv2": importance_cv2}
terms = pytest.mark.parametrize("term", TERMS.values(), ids=TERMS)


def slow(name, routing):
    """The equation over the real tokens, one token at a time, in float64."""
    real = [t for t in range(len(routing.logits)) if routing.mask is None or routing.mask[t]]
    logits = [routing.logits[t].double() for t in real]
    experts = routing.num_experts
    if name == "router_z":
        return sum(row.exp().sum().log() ** 2 for row in logits) / len(real)
    shares = [routing.scores[t].double() / routing.scores[t].double().sum() for t in real]
    if name == "importance_cv2":
        importance = sum(shares)
        mean = importance.sum() / experts
        return ((importance - mean) ** 2).sum() / experts / mean**2
    if routing.soft:
        held = [int(row.argmax()) for row in logits]
    else:
        held = [e for t in real for e in routing.indices[t].tolist() if e >= 0]
    load = [held.count(e) / len(held) for e in range(experts)]
    return experts * sum(f * p for f, p in zip(load, sum(shares) / len(real), strict=True))


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("name", TERMS)
def test_equation(make_router, selector_name, name, masked, same):
    router = make_router("linear", selector_name).double()
    mask = torch.rand(40) < 0.6 if masked else None
    routing = router(torch.randn(40, 12, dtype=torch.float64), mask=mask)
    same(TERMS[name](routing), slow(name, routing), router.parameters())


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
@terms
def test_gradcheck(term, score):
    router = Router(LinearScorer(4, 3, bias=True), TopK(2, score=score)).double()
    x, mask = torch.randn(6, 4, dtype=torch.float64), torch.tensor([True, True, False, True, True, False])
    assert gradcheck(lambda *_: term(router(x, mask=mask)), tuple(router.parameters()))


@terms
def test_a_record_and_its_routing_are_one(term):
    layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 8))
    with record(layer) as tape:
        layer(torch.randn(10, 8))
    assert torch.equal(term(tape[0]), term(tape[0].routing))


def routed(logits, k):
    """The routing of tokens whose logits are given."""
    router = Router(LinearScorer(logits.shape[1], logits.shape[1]), Soft() if k is None else TopK(k))
    router.scorer.weight.data = torch.eye(logits.shape[1])
    return router(logits)


@pytest.mark.parametrize("k", [1, 2, None], ids=["top-1", "top-2", "soft"])
def test_an_even_load_is_exactly_one(k):
    logits = torch.stack([torch.tensor([9.0, 6.0, 0.0, 0.0]).roll(i) for i in range(4)]).repeat(3, 1)
    routing = routed(logits, k)
    assert routing.load().tolist() == [0.25] * 4
    assert load_balance(routing).item() == pytest.approx(1.0, abs=1e-6)
    assert importance_cv2(routing).item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("k", [1, None], ids=["top-1", "soft"])
def test_full_collapse_is_the_number_of_experts(k):
    routing = routed(torch.tensor([[90.0, 0.0, 0.0, 0.0]]).repeat(10, 1), k)
    assert load_balance(routing).item() == pytest.approx(4.0, abs=1e-6)
    assert importance_cv2(routing).item() == pytest.approx(3.0, abs=1e-6)


def test_router_z_by_hand():
    assert router_z(routed(torch.tensor([[0.0, 0.0], [math.log(3), 0.0]]), 1)).item() == pytest.approx(
        (math.log(2) ** 2 + math.log(4) ** 2) / 2
    )


@terms
@pytest.mark.parametrize("masked", [False, True], ids=["empty", "masked"])
def test_no_real_token_gives_zero(make_router, selector_name, term, masked, gradients):
    router = make_router("linear", selector_name)
    n = 5 if masked else 0
    value = term(router(torch.randn(n, 12), mask=torch.zeros(n, dtype=torch.bool) if masked else None))
    assert value.item() == 0
    assert not any(g.any() for g in gradients(value, router.parameters()))


@terms
def test_underflowing_scores_give_finite_gradients(term, gradients):
    router = Router(PrototypeScorer(400, 8), TopK(2, score="sigmoid"))  # squared distances of 400: the sigmoid is 0
    value = term(router(torch.randn(1, 400)))
    assert value.isfinite()
    assert gradients(value, [router.scorer.prototypes])[0].isfinite().all()


@terms
def test_values_are_fp32_under_autocast(make_router, term):
    with torch.autocast("cpu", torch.bfloat16):
        assert term(make_router("linear", "topk")(torch.randn(5, 12))).dtype == torch.float32
