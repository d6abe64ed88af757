"""Loss-free balancing: the bias changes the choice, never the weights (core.md 9.3, item 11)."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import Balanced, FeedForward, LinearScorer, MoE, Router, TopK


def bound(experts=6, **arguments):
    selector = Balanced(2, **arguments)
    selector.bind(experts)
    return selector


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_choice_is_top_k_of_scores_and_bias(score):
    selector = bound(score=score)
    selector.bias.copy_(torch.randn(6) / 5)
    logits = torch.randn(40, 6)
    scores = logits.double().softmax(-1) if score == "softmax" else 1 / (1 + (-logits.double()).exp())
    biased = (scores + selector.bias.double()).tolist()
    assert selector.choose(logits).tolist() == [sorted(range(6), key=lambda e: -row[e])[:2] for row in biased]


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_the_bias_changes_the_choice_but_never_the_weights(score, normalize, same):
    selector = bound(score=score, normalize=normalize)
    logits = torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    plain = selector.choose(logits.detach())
    selector.bias.copy_(torch.randn(6))
    indices = selector.choose(logits.detach())
    assert not torch.equal(indices, plain)
    same(selector.weigh(logits, indices), TopK(2, score=score, normalize=normalize).weigh(logits, indices), [logits])


@pytest.mark.parametrize("counts", [[5, 1, 0, 6, 3, 3], [2, 2, 2, 2, 2, 2], [0] * 6, [2**40, 2**40 + 1, 0, 0, 0, 0]])
def test_update(counts, close):
    selector = bound(rate=0.25)
    mean = sum(counts) / 6
    selector.update(torch.tensor(counts))
    close(selector.bias, [0.25 * ((mean > c) - (mean < c)) for c in counts])


def test_by_hand():
    selector = Balanced(2, rate=0.5)
    selector.bind(3)
    selector.update(torch.tensor([4, 1, 1]))
    assert selector.bias.tolist() == [-0.5, 0.5, 0.5]
    assert selector.choose(torch.zeros(1, 3)).sort().values.tolist() == [[1, 2]]


def test_updates_even_out_a_collapsed_load():
    router = Router(LinearScorer(8, 4, bias=True), Balanced(2, rate=1e-3))
    router.scorer.bias.data[:2] = 2.0
    x = torch.randn(400, 8)
    before = router(x).load()
    for _ in range(1000):
        router.selector.update(router(x).counts())
    after = router(x).load()
    assert float(before.max()) > 0.4
    assert float(after.max() - after.min()) < 0.05


def test_the_bias_is_saved_and_is_no_parameter():
    layer = MoE(Router(LinearScorer(8, 4), Balanced(2)), FeedForward(4, 8, 8))
    assert "router.selector.bias" in layer.state_dict()
    assert "router.selector.bias" not in dict(layer.named_parameters())


def test_mistakes_are_named(user_error):
    with user_error("Balanced", "k=4", "E=4", "soft"):
        Router(LinearScorer(8, 4), Balanced(4))
    with user_error("Balanced", "k=5", "E=4"):
        Router(LinearScorer(8, 4), Balanced(5))
    with user_error("Balanced", "k=1", "normalize"):
        Balanced(1)
    with user_error("Balanced", "rate", "-0.1"):
        Balanced(2, rate=-0.1)
    with user_error("score", "'max'"):
        Balanced(2, score="max")
    shared = bound()
    with user_error("Balanced", "another router"):
        Router(LinearScorer(8, 6), shared)
