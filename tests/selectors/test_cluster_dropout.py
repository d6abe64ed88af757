"""Cluster dropout: in training the kept number of experts of each group gets tokens; evaluation is as without it."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from seeds import shifted

from spectralmoe import (
    Capacity,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    MoE,
    NoisyTopK,
    Router,
    TopK,
    TopP,
    UserError,
    after_step,
    attach,
    record,
)
from spectralmoe.selectors import Balanced, ClusterDropout, Soft, SoftBalanced

E = 8
INNER = {
    "topk": lambda: TopK(2),
    "normalised": lambda: TopK(2, normalize=True),
    "sigmoid": lambda: TopK(2, score="sigmoid"),
    "noisy_topk": lambda: NoisyTopK(2),
    "topp": lambda: TopP(1.0),
    "expert_choice": lambda: ExpertChoice(2.0),
    "capacity": lambda: Capacity(TopK(2), 2.0),
}
inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)


def bound(selector=None, groups=2, experts=E, **options):
    selector = ClusterDropout(selector or TopK(1), groups, **options)
    selector.bind(experts)
    return selector


def route(logits, selector, replay=None):
    """The routing of tokens whose logits are the tokens themselves."""
    router = Router(LinearScorer(logits.shape[1], logits.shape[1]), selector)
    router.scorer.weight.data = torch.eye(logits.shape[1])
    return router.train(selector.training)(logits, replay=replay)


@inner
@pytest.mark.parametrize(("groups", "rate", "kept"), [(2, 0.5, 2), (4, 0.5, 1), (1, 0.9, 0), (1, 0.8, 1), (2, 0.0, 4)])
def test_in_each_group_the_kept_number_gets_tokens(make, groups, rate, kept, user_error):
    if not kept:
        with user_error("ClusterDropout", f"rate={rate}", "8 experts of a group"):
            bound(groups=groups, rate=rate)
        return
    routing = route(3 * torch.randn(400, E), ClusterDropout(make(), groups, rate=rate))
    used = routing.counts().view(groups, -1) > 0
    assert used.sum(-1).tolist() == [kept] * groups
    assert (routing.scores.detach() > 0).any(0).view(groups, -1).equal(used)
    assert routing.logits.isfinite().all()
    assert routing.weights.isfinite().all()


@pytest.mark.parametrize(("size", "rate", "kept"), [(10, 0.9, 1), (10, 0.7, 3), (5, 0.5, 2), (7, 1 / 7, 6)])
def test_an_exact_share_is_not_rounded_down(size, rate, kept):
    assert bound(groups=1, experts=size, rate=rate).taking_part.sum() == kept == math.floor(round((1 - rate) * size, 9))


@inner
def test_evaluation_is_bitwise_that_without_dropout(make):
    logits = torch.randn(50, E)
    plain, dropped = (route(logits, selector.eval()) for selector in (make(), ClusterDropout(make(), 4, rate=0.5)))
    assert plain.score == dropped.score
    for name in ("logits", "weights", "indices", "scores"):
        assert torch.equal(getattr(plain, name), getattr(dropped, name))
    assert float(plain.dropped()) == float(dropped.dropped())


def test_a_trained_layer_in_evaluation_is_bitwise_that_without_dropout():
    with_dropout, plain = (
        MoE(Router(LinearScorer(6, E), selector), FeedForward(E, 6, 4))
        for selector in (ClusterDropout(TopK(2), 2, interval=1), TopK(2))
    )
    optimizer = torch.optim.AdamW(with_dropout.parameters(), lr=0.1)
    attach(optimizer, with_dropout)
    for _ in range(3):
        with_dropout(torch.randn(20, 6)).square().mean().backward()
        optimizer.step()
    plain.load_state_dict({n: v for n, v in with_dropout.state_dict().items() if ".selector." not in n})
    x, mask = torch.randn(50, 6), torch.arange(50) % 5 > 0
    assert torch.equal(with_dropout.eval()(x, mask=mask), plain.eval()(x, mask=mask))
    assert not torch.equal(with_dropout.train()(x, mask=mask), plain(x, mask=mask))


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_weights_are_those_of_the_others_alone(score, normalize, same):
    selector = bound(TopK(2, score=score, normalize=normalize))
    logits = torch.randn(20, E, dtype=torch.float64, requires_grad=True)
    indices, part = selector.choose(logits.detach()), selector.taking_part.nonzero().flatten().tolist()
    rows = []
    for row, chosen in zip(logits, indices.tolist(), strict=True):
        assert chosen == sorted(part, key=lambda e: -float(row[e].detach()))[:2]
        shares = {e: row[e].exp() if score == "softmax" else 1 / (1 + (-row[e]).exp()) for e in part}
        total = sum(shares[e] for e in (chosen if normalize else part))
        divided = normalize or score == "softmax"
        rows.append(torch.stack([shares[e] / total if divided else shares[e] for e in chosen]))
    same(selector.weigh(logits, indices), torch.stack(rows), [logits])


def test_by_hand():
    selector = bound(groups=2, experts=4)
    selector.taking_part.copy_(torch.tensor([False, True, True, False]))
    logits = torch.tensor([[9.0, 1.0, 2.0, 8.0]])
    assert selector.choose(logits).tolist() == [[2]]
    assert selector.weigh(logits, torch.tensor([[2]])).item() == pytest.approx(math.e / (1 + math.e))
    assert selector.eval().choose(logits).tolist() == [[0]]


def test_a_replayed_expert_that_is_out_weighs_nothing():
    selector = ClusterDropout(TopK(2, normalize=True), 2)
    router = Router(LinearScorer(E, E), selector)
    x = torch.randn(30, E)
    first = router(x)
    out = ~selector.taking_part
    selector.taking_part.copy_(out)
    again = router(x, replay=first)
    assert torch.equal(again.indices, first.indices)
    assert not again.weights.any()
    again.weights.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in router.parameters())


def draws(selector, steps):
    """Who takes part at the start and after each step."""
    found = [selector.taking_part.tolist()]
    for _ in range(steps):
        selector.after_step()
        found.append(selector.taking_part.tolist())
    return found


def test_experts_are_drawn_anew_after_every_interval():
    found = draws(bound(groups=1, interval=3), 29)
    rounds = [found[i : i + 3] for i in range(0, 30, 3)]
    assert all(one == two == three for one, two, three in rounds)
    assert len({tuple(each[0]) for each in rounds}) > 3


def test_every_expert_is_left_out_as_often_as_the_others():
    shares = torch.tensor(draws(bound(groups=2, interval=1), 2999)).double().mean(0)
    assert (shares - 0.5).abs().max() < 0.06  # six standard deviations


def test_a_seed_fixes_the_draws_and_a_saved_model_goes_on_with_them():
    torch.manual_seed(shifted(5))
    first, other = bound(interval=2), bound(interval=2)
    torch.manual_seed(shifted(5))
    second = bound(interval=2)
    whole = draws(first, 40)
    assert draws(second, 15) == whole[:16]
    assert draws(other, 40) != whole
    resumed, copied = bound(interval=2), copy.deepcopy(second)
    resumed.load_state_dict(second.state_dict())
    assert draws(resumed, 25) == draws(copied, 25) == whole[15:]


@pytest.mark.parametrize("hooked", [False, True])
def test_it_moves_at_the_step_only(hooked):
    torch.manual_seed(shifted(0))
    layer = MoE(Router(LinearScorer(6, E), ClusterDropout(TopK(1), 1, interval=1)), FeedForward(E, 6, 4))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.01)
    attachment = attach(optimizer, layer) if hooked else None
    selector, seen = layer.router.selector, []
    for _ in range(8):
        before = selector.taking_part.clone()
        with record(layer) as tape:
            layer(torch.randn(5, 6)).sum().backward()
            layer(torch.randn(5, 6)).sum().backward()
        assert torch.equal(selector.taking_part, before)
        optimizer.step()
        if attachment is None:
            after_step(layer, tape)
        seen.append(tuple(selector.taking_part.tolist()))
    assert int(selector.steps) == 8
    assert len(set(seen)) > 2


def test_a_part_of_the_experts_keeps_the_seed_and_is_drawn_for_itself(user_error):
    router = Router(LinearScorer(E, E), ClusterDropout(TopK(1), 2, interval=1))
    router.selector.after_step()
    part = router.select([7, 0, 3, 4]).selector
    assert (part.seed, part.steps) == (router.selector.seed, 1)
    assert part.taking_part.view(2, 2).sum(-1).tolist() == [1, 1]
    with user_error("ClusterDropout", "groups=2", "E=3"):
        router.select([1, 2, 3])


def test_mistakes_are_named(user_error):
    for arguments, words in (
        ({"groups": 0}, ("groups", "0")),
        ({"groups": 2, "rate": 1.0}, ("rate", "[0, 1)", "1.0")),
        ({"groups": 2, "interval": 0}, ("interval", "0")),
    ):
        with user_error("ClusterDropout", *words):
            ClusterDropout(TopK(1), **arguments)
    with user_error("ClusterDropout", "groups=3", "E=8"):
        bound(groups=3)
    for selector in (Balanced(2), Capacity(Balanced(2), 1.0)):
        with user_error("ClusterDropout", "Balanced", "load_balance"):
            bound(selector)
    for selector in (Soft(), SoftBalanced(), TopK(E)):
        with user_error("ClusterDropout", "soft"):
            bound(selector)
    shared = bound()
    with pytest.raises(UserError, match="another router"):
        shared.bind(E)
