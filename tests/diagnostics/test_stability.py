"""Firmness of the choice: by hand, against sets, and against the certificate."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from spectralmoe import Balanced, Capacity, ExpertChoice, FeedForward, LinearScorer, MoE, Router, TopK, TopP
from spectralmoe.diagnostics import (
    Watched,
    changed_between,
    margins,
    near_ties,
    noise_flips,
    precision_flips,
    routing_radius,
    sound_flips,
    watch,
)
from spectralmoe.routing import Routing


def gate(dim=6, experts=5, k=2):
    return Router(LinearScorer(dim, experts), TopK(k))


def own(router):
    model = MoE(router, FeedForward(router.num_experts, router.scorer.dim, 4))
    with watch(model) as seen:
        return seen.layers[0]


class Rounded(Watched):
    """A router that runs in the precision it is asked for, its own weights included; it remembers what it was asked."""

    name, number, top_k, matrix = "rounded", 0, 1, None

    def __init__(self, weight):
        self.weight, self.num_experts, self.asked = weight, len(weight), []

    def route(self, x, dtype=None):
        self.asked.append((x.dtype, dtype))
        dtype = dtype or x.dtype
        logits = (x.to(dtype) @ self.weight.to(dtype).T).float()
        scores = logits.softmax(-1)
        return Routing(logits, *scores.topk(1), scores)

    def expert(self, x, e):
        raise NotImplementedError

    expert_weights = expert


def by_hand(scores, indices, mask=None, asked=None):
    scores, indices = torch.tensor(scores, dtype=torch.float64), torch.tensor(indices)
    return Routing(scores, torch.ones(indices.shape), indices, scores, mask, asked=asked)


# The share that noise moves


def test_only_tokens_within_reach_change():
    router, x = gate(), torch.randn(500, 6)
    for noise in (0.02, 0.1, 0.5):
        reach = float((routing_radius(router, x) < noise * x.norm(dim=-1)).float().mean())
        assert 0 < noise_flips(own(router), x, noise).value <= reach


def test_the_order_of_the_chosen_does_not_count():
    router = gate(dim=2, experts=2, k=2)
    assert noise_flips(own(router), torch.randn(80, 2), noise=10.0).value == 0.0


def test_half_of_all_tokens_change_when_only_noise_is_left():
    router = gate(dim=2, experts=2, k=1)
    layer, x = own(router), torch.randn(2000, 2)
    assert noise_flips(layer, x, 1000.0).value == pytest.approx(0.5, abs=0.05)
    assert noise_flips(layer, x, 0.3, seed=1) == noise_flips(layer, x, 0.3, seed=1)


def test_no_tokens_no_number_and_negative_noise_is_refused(user_error):
    layer = own(gate())
    assert noise_flips(layer, torch.randn(0, 6)).value is None
    assert noise_flips(layer, torch.empty(0)).value is None
    with user_error("noise_flips", "-1"):
        noise_flips(layer, torch.randn(3, 6), noise=-1)


def test_the_step_is_in_units_of_the_tokens_own_norm_and_seeded():
    router, x = gate(), torch.randn(300, 6)
    for noise, seed in ((0.05, 0), (0.3, 0), (0.3, 4)):
        draw = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed))
        moved = x + noise * x.norm(dim=-1, keepdim=True) * draw / draw.norm(dim=-1, keepdim=True)
        flips = noise_flips(own(router), x, noise, seed)
        changed = changed_between(router(x), router(moved)).value
        assert flips.value == pytest.approx(changed, abs=1.5 / 300)  # up to a token that rounding decides
        assert flips.data == 300


# The share that rounding moves


def test_precision_flips_are_those_of_the_rounded_router():
    weight, x = torch.randn(6, 16), torch.randn(400, 16)
    weight[3:] = weight[:3] + 1e-3 * torch.randn(3, 16)  # every first choice has a rival that rounding makes its equal
    exact = (x @ weight.T).argmax(-1)
    rough = (x.bfloat16() @ weight.bfloat16().T).float().softmax(-1).topk(1).indices[:, 0]
    found = precision_flips(Rounded(weight), x)
    assert found.value == pytest.approx(float((exact != rough).double().mean()), abs=1e-12)
    assert found.value > 0.05
    assert found.data == 400
    assert precision_flips(Rounded(weight), x, torch.float32).value == 0


def test_half_tokens_are_compared_with_fp32():
    layer, x = Rounded(torch.randn(6, 16)), torch.randn(40, 16).bfloat16()
    precision_flips(layer, x)
    noise_flips(layer, x)
    noise_flips(layer, x.float())
    half, full = (torch.bfloat16, torch.bfloat16), (torch.float32, torch.float32)
    assert layer.asked == [full, half, full, full, (torch.float32, None), (torch.float32, None)]


def test_a_firm_choice_survives_rounding():
    weight, x = torch.eye(4), torch.eye(4).repeat(30, 1) + 0.1 * torch.randn(120, 4)
    assert precision_flips(Rounded(weight), x).value == 0
    assert precision_flips(own(gate(dim=4)), x[:0]).value is None


# Any two routings


@given(st.integers(0, 10**6), st.sampled_from(["topk", "topp", "capacity"]))
def test_changed_between_is_the_share_of_unequal_sets(seed, kind):
    torch.manual_seed(seed)
    selector = {"topk": TopK(2), "topp": TopP(0.5), "capacity": Capacity(TopK(2), 1.0)}[kind]
    x, mask = torch.randn(30, 6), torch.rand(30) < 0.8
    a, b = (Router(LinearScorer(6, 5), selector)(x, mask=mask) for _ in range(2))
    different, whole = 0, 0
    for real, first, second in zip(mask.tolist(), a.indices.tolist(), b.indices.tolist(), strict=True):
        if real and not (kind == "capacity" and -1 in first + second):
            whole, different = whole + 1, different + (set(first) != set(second))
    found = changed_between(a, b)
    assert found.data == whole
    assert found.value == (pytest.approx(different / whole) if whole else None)
    assert changed_between(b, a) == found
    assert changed_between(a, a).value == (0 if changed_between(a, a).data else None)


def test_changed_between_refuses_other_tokens(user_error):
    router = gate()
    with user_error("changed_between", "N=4", "N=5"):
        changed_between(router(torch.randn(4, 6)), router(torch.randn(5, 6)))
    with user_error("changed_between", "E=5", "E=3"):
        changed_between(router(torch.randn(4, 6)), gate(experts=3)(torch.randn(4, 6)))


# Margins


@given(st.integers(0, 10**6), st.integers(1, 4), st.sampled_from(["softmax", "sigmoid"]))
def test_margins_by_definition(seed, k, score):
    torch.manual_seed(seed)
    mask = torch.rand(20) < 0.8
    routing = Router(LinearScorer(6, 5), TopK(k, score=score))(torch.randn(20, 6, dtype=torch.float64), mask=mask)
    odds = routing.logits.exp()  # softmax up to what a token's scores have in common; the sigmoid's order is the same
    for margin, row, chosen in zip(margins(routing).tolist(), odds.tolist(), routing.indices.tolist(), strict=True):
        if chosen[0] < 0:
            assert math.isnan(margin)
            continue
        worst, best = min(row[e] for e in chosen), max(s for e, s in enumerate(row) if e not in chosen)
        assert margin == pytest.approx((worst - best) / worst, rel=1e-9)
        assert 0 <= margin <= 1
    known = [m for m in margins(routing).tolist() if not math.isnan(m)]
    assert near_ties(routing, 0.2).data == len(known)
    share = sum(m <= 0.2 for m in known) / len(known) if known else None
    assert near_ties(routing, 0.2).value == pytest.approx(share)


def test_margins_of_a_softmax_are_gaps_of_logits():
    logits = torch.tensor([[3.0, 2.5, -1.0], [80.0, 0.0, -900.0]])
    found = margins(Routing(logits, *logits.softmax(-1).topk(1), logits.softmax(-1)))
    assert found.tolist() == pytest.approx([1 - math.exp(-0.5), 1])
    shifted = margins(Routing(logits + 7, *logits.softmax(-1).topk(1), (logits + 7).softmax(-1)))
    torch.testing.assert_close(shifted, found)


def test_near_ties_are_found_and_firm_routers_are_not():
    router, x = gate(k=1), torch.randn(300, 6)
    assert near_ties(router(x)).value < 0.1
    router.scorer.weight.data[:] = router.scorer.weight[:1] + 1e-4 * torch.randn(5, 6)
    assert near_ties(router(x)).value > 0.95


def test_tokens_without_all_their_experts_have_no_margin():
    scores = [[0.4, 0.3, 0.2, 0.1]] * 3
    full = by_hand(scores, [[0, 1], [0, -1], [-1, -1]])
    assert margins(full).tolist() == pytest.approx([1 / 3, 1 / 4, math.nan], nan_ok=True)  # fewer than K were wanted
    dropped = by_hand(scores, [[0, 1], [0, -1], [-1, -1]], asked=torch.tensor(6))
    assert margins(dropped).tolist() == pytest.approx([1 / 3, math.nan, math.nan], nan_ok=True)
    padded = by_hand(scores, [[0, 1]] * 3, mask=torch.tensor([True, False, False]))
    assert margins(padded).tolist() == pytest.approx([1 / 3, math.nan, math.nan], nan_ok=True)


def test_soft_routing_has_no_margin():
    for routing in (gate(k=5)(torch.randn(9, 6)), gate()(torch.randn(0, 6)), by_hand([[1.0]], [[0]])):
        assert near_ties(routing).value is None
        assert margins(routing).isnan().all()


def test_scores_that_the_choice_does_not_follow_tell_no_margin():
    balanced = Router(LinearScorer(6, 5), Balanced(2))
    x = torch.randn(200, 6)
    assert near_ties(balanced(x)).known  # no bias yet
    balanced.selector.bias += torch.tensor([0.3, -0.3, 0.0, 0.1, 0.0])
    assert near_ties(balanced(x)).value is None
    skewed = Router(LinearScorer(6, 5, bias=True), ExpertChoice(2.0))
    skewed.scorer.bias.data[0] = 2.0  # its expert takes the best of many, the others the best of few
    assert near_ties(skewed(x)).value is None


def test_rounding_that_swaps_two_experts_is_a_tie():
    routing = by_hand([[0.500, 0.501, 0.1], [0.9, 0.2, 0.1]], [[0], [0]])
    assert margins(routing).tolist() == pytest.approx([0, 7 / 9])
    assert near_ties(routing).value == 0.5


def test_what_underflow_leaves_is_no_margin():
    crumbs = torch.tensor([[1.0, 2e-44, 1e-44]])
    assert margins(Routing(crumbs, torch.ones(1, 2), torch.tensor([[0, 1]]), crumbs)).isnan().all()
    negative = by_hand([[1.0, 0.0, -0.1]], [[0, 1]])
    assert near_ties(negative).value is None


def test_underflow_is_no_tie():
    logits = torch.tensor([[0.0, -300.0, -600.0]])
    scores = logits.softmax(-1)
    assert scores[0, 1] == scores[0, 2] == 0
    assert margins(Routing(logits, torch.ones(1, 2), torch.tensor([[0, 1]]), scores)).isnan().all()
    assert margins(Routing(logits, torch.ones(1, 1), torch.tensor([[0]]), scores)).tolist() == [1]


def test_margins_of_a_watched_layer_hold_the_selection_bias():
    layer = MoE(Router(LinearScorer(6, 5), Balanced(2)), FeedForward(5, 6, 8))
    layer.router.selector.bias.copy_(torch.linspace(-0.2, 0.2, 5))
    with watch(layer) as seen:
        layer(torch.randn(200, 6))
    routing = seen.drain()[0].routing
    bias = layer.router.selector.bias
    biased = routing.logits.sigmoid() + bias - bias.min()
    top = biased.topk(3).values
    expected = (top[:, 1] - top[:, 2]) / top[:, 1].abs()
    torch.testing.assert_close(margins(routing), expected.detach())


def test_tokens_without_finite_logits_have_no_choice():
    weight, x = torch.randn(6, 16), torch.randn(100, 16)
    x[:7, 0] = float("nan")
    assert precision_flips(Rounded(weight), x).data == 93
    weight[2, 0] = float("nan")
    assert precision_flips(Rounded(weight), x).value is None
    assert noise_flips(Rounded(weight), x).value is None


def test_flips_take_64_tokens():
    layer, x = Rounded(torch.randn(6, 16)), torch.randn(64, 16)
    assert precision_flips(layer, x).known
    assert noise_flips(layer, x).known
    for found in (precision_flips(layer, x[:63]), noise_flips(layer, x[:63]), precision_flips(layer, x[:0])):
        assert (found.value, found.needs) == (None, 64)


@pytest.mark.parametrize(("experts", "k"), [(8, 2), (128, 8)])
def test_flips_of_a_sound_router_are_those_of_any_other_draw(experts, k):
    class Sound(Rounded):
        def route(self, x, dtype=None):
            routing = super().route(x, dtype)
            return Routing(routing.logits, *routing.scores.topk(k), routing.scores)

    found = [precision_flips(Sound(torch.randn(experts, 48) / 7), torch.randn(2048, 48)).value for _ in range(8)]
    sound = sound_flips(experts, k, 48, 2048)
    spread = (sound.value / 2048) ** 0.5
    assert abs(sound.value - sum(found) / 8) < 5 * spread
    assert sound_flips(experts, k, 48, 2048) == sound
    assert not sound_flips(8, 8, 48, 2048).known
    assert not sound_flips(8, None, 48, 2048).known


def test_large_logits_under_a_sigmoid_are_no_ties():
    logits = torch.tensor([[60.0, 50.0, 0.0], [3.0, 2.999, 0.0]])
    found = margins(Routing(logits, *logits.sigmoid().topk(1), logits.sigmoid()))
    assert found.tolist() == pytest.approx([1, 1 - math.exp(-0.001)], rel=1e-3)
    biased = logits.sigmoid() + torch.tensor([0.5, 0.5, 0.0])  # fp32 has rounded these to 1 before the bias came
    assert margins(Routing(logits, *biased.topk(1), biased))[0] == 0


def test_what_all_biases_have_in_common_is_no_tie():
    layer = MoE(Router(LinearScorer(6, 5), Balanced(2)), FeedForward(5, 6, 8))
    x = torch.randn(200, 6)

    def seen(offset):
        layer.router.selector.bias.copy_(torch.linspace(-0.2, 0.2, 5) + offset)
        with watch(layer) as watching:
            layer(x)
        return watching.drain()[0].routing

    near, far = seen(0.0), seen(20.0)
    assert torch.equal(near.indices, far.indices)
    torch.testing.assert_close(margins(far), margins(near), rtol=1e-4, atol=1e-4)
