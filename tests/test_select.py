"""Parts for some of the experts alone: routers decide as if the others had no logits, banks hold the same experts."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import Adapter, Balanced, Capacity, FeedForward, ModuleExperts, TopK
from spectralmoe.experts import Experts
from spectralmoe.scorers import PrincipalScorer, Scorer
from spectralmoe.selectors.base import largest
from spectralmoe.spec import build, describe

D, E = 12, 6
KEPT = [4, 1, 2]

BANKS = {
    "feed_forward": lambda: FeedForward(E, D, 8, activation="swiglu", bias=True, spare=2),
    "adapter": lambda: Adapter(E, D, 5),
    "modules": lambda: ModuleExperts([nn.Sequential(nn.Linear(D, 7), nn.ReLU(), nn.Linear(7, D)) for _ in range(E)]),
}


def started(scorer):
    """The scorer after a step in which tokens went by: statistics and bases are not those of the start."""
    for name, parameter in scorer.named_parameters():
        if name not in scorer.manifold:
            parameter.data += 0.3 * torch.randn_like(parameter)
    if isinstance(scorer, PrincipalScorer):
        scorer.mean.normal_()
        scorer.spread.uniform_(0.5, 2.0)
    return scorer


@pytest.mark.grid(kept=[KEPT, [0], list(range(E)), torch.tensor([5, 0])])
def test_scorers_keep_the_logits_of_those_that_are_left(make_scorer, scorer_name, kept, same):
    scorer = started(make_scorer(scorer_name, D, E)).double().eval()
    part, x = scorer.select(kept), torch.randn(30, D, dtype=torch.float64, requires_grad=True)
    same(part(x), scorer(x)[:, torch.as_tensor(kept)], [x])
    assert part.num_experts == len(kept)
    spec = describe(part)
    twin = build(spec).double().eval()
    twin.load_state_dict(part.state_dict())
    assert torch.equal(twin(x), part(x))
    again = part.select([len(kept) - 1])
    same(again(x), scorer(x)[:, [int(kept[-1])]], [x])
    assert not {p.data_ptr() for p in part.parameters()} & {p.data_ptr() for p in scorer.parameters()}


def test_flip_distances_are_those_of_the_pairs_that_are_left(make_scorer, scorer_name, close):
    scorer, x = started(make_scorer(scorer_name, D, E)).double().eval(), torch.randn(30, D, dtype=torch.float64)
    over, under = torch.zeros(30, 1, dtype=torch.int64), torch.ones(30, 1, dtype=torch.int64)
    part = scorer.select(KEPT)
    here, there = part.flip_distance(x, over, under), scorer.flip_distance(x, over + KEPT[0], under * KEPT[1])
    torch.testing.assert_close(here, there, rtol=1e-6, atol=1e-9)


def masked_routing(router, x, mask=None):
    """The decision where none but KEPT can be chosen; bounds by E count those that are left."""
    away = torch.ones(E, dtype=torch.bool)
    away[KEPT] = False
    selector = router.selector
    for name in ("capacity", "factor"):
        if hasattr(selector, name):
            setattr(selector, name, getattr(selector, name) * E / len(KEPT))
    logits = router.scorer(x).masked_fill(away, -torch.inf)
    if isinstance(selector, Balanced):  # a bias lifts even a score of 0
        ranked = selector.ranked(logits.detach()).masked_fill(away, -torch.inf)
        indices = largest(ranked, selector.k, mask)
    else:
        indices = selector.limit(selector.choose(logits.detach(), mask=mask), E)
    indices = indices.masked_fill((indices >= 0) & away[indices.clamp_min(0)], -1)
    return indices, selector.weigh(logits, indices)


def gates(indices, weights):
    dense = weights.new_zeros(len(indices), E + 1)
    return dense.scatter_add(1, torch.where(indices < 0, E, indices), weights)[:, :E]


@pytest.mark.grid(masked=[False, True])
def test_routers_decide_as_if_the_others_had_no_logits(make_router, scorer_name, selector_name, masked, close):
    router = make_router(scorer_name, selector_name, D, E).double().eval()
    started(router.scorer)
    for name, values in router.selector.named_buffers():
        if values.is_floating_point():
            values.copy_(torch.rand(E) if name.endswith("bias") else torch.full((E,), 1 / E))
    x = torch.randn(2000, D, dtype=torch.float64)
    logits = router.scorer(x)[:, KEPT].sort().values
    x = x[(logits.diff().amin(1) > 1e-6).nonzero().flatten()[:40]]  # ties may go either way
    assert len(x) == 40
    mask = torch.rand(40) < 0.7 if masked else None
    part = router.select(KEPT)
    routing = part(x, mask=mask)
    wanted = gates(*masked_routing(router, x, mask))
    found = torch.zeros_like(wanted)
    found[:, KEPT] = gates(routing.indices, routing.weights)[:, : len(KEPT)]
    close(found, wanted)
    assert routing.num_experts == len(KEPT)
    part.selector.update(torch.arange(len(KEPT)))  # what it remembers is of those that are left


def test_selectors_that_cannot_choose_among_so_few(make_router, user_error):
    for name in ("topk", "noisy_topk", "balanced", "capacity"):
        with user_error("k=2", "E=1"):
            make_router("linear", name, D, E).select([3])
    with user_error("k=2 of E=2"):
        make_router("linear", "balanced", D, E).select([3, 0])
    router = make_router("linear", "topk", D, E)
    for indices, words in (
        ([], ["no expert was named"]),
        ([6], ["no expert 6", "0 to 5"]),
        ([1, 1], ["once", "[1, 1]"]),
    ):
        with user_error("Router.select", *words):
            router.select(indices)


def test_selecting_draws_nothing(make_router, selector_name):
    router = make_router("linear", selector_name, D, E)
    before = torch.get_rng_state()
    router.select(KEPT)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_scorer_that_names_no_rows(user_error):
    class Own(Scorer):
        pass

    with user_error("Own", "no rows"):
        Own(D, E).select([0])


def test_a_bounded_selector_keeps_its_inner_one(make_router):
    router = make_router("linear", "balanced", D, E)
    router.selector.bias.copy_(torch.arange(6.0))
    outer = Capacity(TopK(1), 2.0)
    outer.selector = router.selector
    assert outer.select([5, 0, 3]).selector.bias.tolist() == [5.0, 0.0, 3.0]
    assert router.selector.bias.tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]


@pytest.mark.parametrize("name", BANKS)
def test_selected_experts_have_the_same_bits(name):
    bank = BANKS[name]()
    next(bank.parameters()).requires_grad_(False)
    part, x = bank.select([4, 1, 1]), torch.randn(5, D)
    assert type(part) is type(bank)
    assert part.num_experts == 3
    for e, source in enumerate([4, 1, 1]):
        assert torch.equal(part.expert(x, e), bank.expert(x, source))
        theirs = bank.expert_parameters(source)
        for key, value in part.expert_parameters(e).items():
            assert torch.equal(value, theirs[key])
            assert value.data_ptr() != theirs[key].data_ptr()
    assert not next(part.parameters()).requires_grad or name == "modules"
    torch.testing.assert_close(
        part(x, torch.tensor([2, 0, 3])), torch.cat([bank.expert(x[:2], 4), bank.expert(x[2:], 1)])
    )
    if name != "modules":  # a Sequential has no spec
        assert describe(build(describe(part))) == describe(part)


@pytest.mark.parametrize("name", BANKS)
def test_averaged_experts(name, close):
    """theta_g = sum_i w_i theta_i / sum_i w_i, number by number."""
    bank = BANKS[name]()
    groups, weights = [[0, 3, 5], [2], [1, 0]], [[1.0, 3.0, 0.0], [0.25], [0.5, 0.5]]
    part = bank.averaged(groups, weights)
    for g, (group, row) in enumerate(zip(groups, weights, strict=True)):
        members = [bank.expert_parameters(e) for e in group]
        for key, value in part.expert_parameters(g).items():
            mean = sum(w * member[key].double() for w, member in zip(row, members, strict=True)) / sum(row)
            close(value, mean)
    assert all(torch.equal(v, bank.expert_parameters(2)[k]) for k, v in part.expert_parameters(1).items())
    even = bank.averaged([[0, 1]])
    for key, value in even.expert_parameters(0).items():
        close(value, (bank.expert_parameters(0)[key] + bank.expert_parameters(1)[key]) / 2)


def test_a_new_bank_needs_nothing(close):
    class Scale(Experts):
        def __init__(self):
            super().__init__(E)
            self.scale = nn.Parameter(torch.randn(E, D))
            self.register_buffer("shift", torch.randn(E))

        def expert(self, x, e):
            return x * self.scale[e] + self.shift[e]

    bank, x = Scale(), torch.randn(4, D)
    assert torch.equal(bank.select([3, 0]).expert(x, 0), bank.expert(x, 3))
    close(bank.averaged([[3, 0]]).expert(x, 0), (bank.expert(x, 3) + bank.expert(x, 0)) / 2)


def test_banks_that_cannot_be_taken_apart(user_error):
    class Tied(FeedForward):
        def __init__(self):
            super().__init__(E, D, 8)
            self.gain = nn.Parameter(torch.ones(()))

    with user_error("Tied", "'gain'", "E=6"):
        Tied().select([0])
    odd = ModuleExperts([nn.Linear(D, D), nn.Linear(D, D, bias=False), nn.Tanh()])
    for group in ([0, 1], [0, 2]):
        with user_error("ModuleExperts", f"{group[0]} and {group[1]}", "not built alike"):
            odd.averaged([group])
    bank = BANKS["adapter"]()
    for indices, words in (([], ["no expert"]), ([6], ["expert 6"]), ([-1], ["expert -1"]), ([1.5], ["expert 1.5"])):
        with user_error("Adapter.select", *words):
            bank.select(indices)
    for groups, weights, words in (
        ([], None, ["at least one group"]),
        ([[]], None, ["no expert was named"]),
        ([[0, 1]], [[1.0]], ["a weight for each"]),
        ([[0, 1]], [[0.0, 0.0]], ["not all 0", "[0, 1]"]),
        ([[0, 1]], [[2.0, -1.0]], ["not negative"]),
    ):
        with user_error("Adapter.averaged", *words):
            bank.averaged(groups, weights)
