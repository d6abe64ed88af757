"""Group-limited choice: the groups are those of DeepSeek's rule, and nothing else of the wrapped selector changes."""

from __future__ import annotations

import pytest
import torch
from seeds import generator

from spectralmoe import Balanced, Capacity, ExpertChoice, LinearScorer, NoisyTopK, Router, Soft, TopK, TopP
from spectralmoe.selectors import ClusterDropout, GroupLimited

E = 12
INNER = {
    "topk": lambda: TopK(3),
    "sigmoid": lambda: TopK(3, score="sigmoid", normalize=True),
    "balanced": lambda: Balanced(3),
    "balanced-softmax": lambda: Balanced(3, score="softmax", normalize=False),
}
inner = pytest.mark.parametrize("make", INNER.values(), ids=INNER)


def bound(selector, groups=4, groups_on=2, experts=E, **options):
    selector = GroupLimited(selector, groups, groups_on, **options)
    selector.bind(experts)
    if "bias" in selector.selector._buffers:
        selector.selector.bias.normal_(std=0.3)
    return selector


def slow(selector, logits):
    """The choice of one token (a list of numbers), by the words of the paper, and its groups."""
    scores = torch.tensor(logits, dtype=torch.float64)
    scores = scores.softmax(-1) if selector.score == "softmax" else scores.sigmoid()
    bias = getattr(selector.selector, "bias", torch.zeros(len(logits))).tolist()
    ranked, size = [s + b for s, b in zip(scores.tolist(), bias, strict=True)], len(logits) // selector.groups
    members = [list(range(g * size, (g + 1) * size)) for g in range(selector.groups)]
    worth = [sum(sorted((ranked[e] for e in group), reverse=True)[: selector.counted]) for group in members]
    best = sorted(range(selector.groups), key=lambda g: -worth[g])[: selector.groups_on]
    offered = [e for g in best for e in members[g]]
    return sorted(offered, key=lambda e: -ranked[e])[: selector.selector.k], best


@inner
@pytest.mark.parametrize(("groups", "groups_on", "counted"), [(4, 2, 2), (4, 1, 1), (6, 3, 2), (2, 1, 3), (3, 3, 1)])
def test_the_choice_is_that_of_the_paper(make, groups, groups_on, counted):
    selector = bound(make(), groups, groups_on, counted=counted)
    logits = torch.randn(200, E, dtype=torch.float64)
    assert selector.choose(logits).tolist() == [slow(selector, row)[0] for row in logits.tolist()]


@inner
def test_weights_and_scores_are_those_without_a_limit(make, same):
    selector = bound(make())
    logits = torch.randn(30, E, dtype=torch.float64, requires_grad=True)
    indices = selector.choose(logits.detach())
    assert selector.choose(logits.detach()).ne(selector.selector.choose(logits.detach())).any()
    same(selector.weigh(logits, indices), selector.selector.weigh(logits, indices), [logits])
    scores = logits.softmax(-1) if selector.score == "softmax" else logits.sigmoid()
    same(selector.scores(logits), scores, [logits])
    if not selector.normalize:
        same(selector.weigh(logits, indices), scores.gather(1, indices), [logits])


@inner
def test_what_it_ranks_by_is_largest_at_the_choice(make):
    selector = bound(make())
    logits = torch.randn(50, E)
    ranked, indices = selector.ranked(logits), selector.choose(logits)
    assert torch.equal(ranked.topk(3).indices, indices)
    assert ((ranked == 0).sum(-1) >= E // 2).all()


def test_by_hand():
    scores = torch.tensor([[0.9, 0.1, 0.6, 0.55, 0.5, 0.45]])
    logits = scores.logit()
    for counted, chosen in ((2, [2, 3]), (1, [0, 1])):  # groups: 1.0, 1.15, 0.95, or 0.9, 0.6, 0.5
        selector = GroupLimited(TopK(2, score="sigmoid"), 3, 1, counted=counted)
        selector.bind(6)
        assert selector.choose(logits).tolist() == [chosen]
    selector = GroupLimited(Balanced(2), 3, 1)
    selector.bind(6)
    selector.selector.bias.copy_(torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 0.3]))  # lifts the last group to 1.25
    assert selector.choose(logits).tolist() == [[5, 4]]
    assert selector.weigh(logits.double(), torch.tensor([[5, 4]]))[0].tolist() == pytest.approx([9 / 19, 10 / 19])


def test_a_bias_lifts_nobody_out_of_a_group_that_is_off():
    selector = bound(Balanced(3), groups=4, groups_on=1)
    selector.selector.bias.copy_(torch.tensor([0.0, 0.0, 0.0, *[0.0, 0.0, 5.0], *[3.0, 3.0, 0.0], *[0.0] * 3]))
    chosen = selector.choose(torch.full((4, E), -200.0))  # scores of 0: the biases alone decide
    assert chosen.sort().values.tolist() == [[6, 7, 8]] * 4


@pytest.mark.parametrize("make", [lambda inside: Capacity(inside, 1.0), lambda inside: ClusterDropout(inside, 3)])
def test_with_others_around_it_stays_inside_the_groups(make):
    router = Router(LinearScorer(E, E), make(GroupLimited(TopK(3), 4, 2))).train()
    routing = router(torch.randn(100, E, generator=generator(1)))
    assert (routing.members().view(100, 4, -1).any(-1)).sum(-1).max() <= 2
    assert not routing.weights[routing.indices < 0].any()


def test_it_goes_inside_others_and_keeps_all_slots(close):
    x = torch.randn(60, E)
    whole = Router(LinearScorer(E, E), GroupLimited(Balanced(3), 4, 2))
    routing = whole(x)
    assert routing.full
    assert (routing.indices >= 0).all()
    limited = Router(whole.scorer, Capacity(GroupLimited(Balanced(3), 4, 2), 1.0))(x)
    kept = limited.indices >= 0
    assert torch.equal(limited.indices[kept], routing.indices[kept])
    assert not kept.all()
    mask = torch.rand(60) < 0.5
    assert torch.equal(whole(x, mask=mask).indices[mask], routing.indices[mask])
    assert (whole(x, mask=mask).indices[~mask] == -1).all()
    assert whole(x[:0]).indices.shape == (0, 3)


def test_a_saved_bias_is_loaded_and_moves():
    one, two = (Router(LinearScorer(E, E), GroupLimited(Balanced(3, rate=0.1), 4, 2)) for _ in range(2))
    one.selector.selector.update(torch.arange(E))
    two.load_state_dict(one.state_dict())
    x = torch.randn(40, E)
    assert torch.equal(one(x).indices, two(x).indices)
    assert one.selector.selector.bias.tolist() == pytest.approx([0.1] * 6 + [-0.1] * 6)


def test_a_part_of_the_experts_keeps_whole_groups(user_error):
    router = Router(LinearScorer(E, E), GroupLimited(TopK(2), 4, 2))
    part = router.select([0, 2, 3, 5, 6, 8, 9, 11])  # two of each group
    routing = part(torch.randn(50, E))
    assert (routing.members().view(50, 4, 2).any(-1).sum(-1) <= 2).all()
    with user_error("GroupLimited", "groups=4", "E=7"):
        router.select(range(7))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((0, 1), ("groups", "0")),
        ((4, 0), ("groups_on", "0")),
        ((2, 3), ("groups_on=3", "groups=2")),
        ((2, 1, 0), ("counted", "0")),
        ((5, 2), ("groups=5", "E=12")),
        ((12, 4, 2), ("counted=2", "holds 1")),
        ((6, 1, 1), ("k=3", "groups_on=1", "hold 2")),
    ],
)
def test_mistakes_are_named(arguments, words, user_error):
    groups, groups_on, *counted = arguments
    with user_error("GroupLimited", *words):
        bound(TopK(3), groups, groups_on, **({"counted": counted[0]} if counted else {}))


def test_other_selectors_are_refused(user_error):
    for selector in (Soft(), NoisyTopK(2), TopP(0.5), ExpertChoice(2.0), Capacity(TopK(2), 1.0)):
        with user_error("GroupLimited", type(selector).__name__, "TopK or Balanced"):
            GroupLimited(selector, 4, 2)
    with user_error("GroupLimited", "soft"):
        bound(TopK(E))
