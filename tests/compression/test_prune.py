"""Pruned layers compute what they did where no other could be chosen; saliencies are those of the equations."""

from __future__ import annotations

import copy

import pytest
import torch
from seeds import generator, shifted
from torch import nn

from spectralmoe import (
    Balanced,
    Capacity,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    MoE,
    Placement,
    Router,
    Soft,
    TopK,
    load,
    record,
    save,
)
from spectralmoe.compression import prune, random
from spectralmoe.models import sr_moe
from spectralmoe.selectors.base import largest

D, E = 12, 6
KEPT = [1, 2, 4]


def layer_of(selector=None, *, dim=D, experts=E, **options):
    return MoE(Router(LinearScorer(dim, experts), selector or TopK(2)), FeedForward(E, dim, 8, bias=True), **options)


def slow(layer, x, kept):
    """sum_j w_j E_j over the k best of ``kept`` (scores and bias), softmax or sigmoid over the logits of these."""
    rows, selector = [], layer.router.selector
    for token in x:
        logits = layer.router.scorer(token[None])[0][kept]
        scores = logits.softmax(-1) if selector.score == "softmax" else logits.sigmoid()
        ranked = scores.detach() + (selector.bias[kept] if isinstance(selector, Balanced) else 0)
        chosen = sorted(range(len(kept)), key=lambda i: -float(ranked[i]))[: getattr(selector, "k", None)]
        total = scores[chosen].sum() if selector.normalize else 1.0
        rows.append(sum(scores[i] / total * layer.experts.expert(token[None], kept[i])[0] for i in chosen))
    return torch.stack(rows)


@pytest.mark.grid(
    selector=["topk", "normalized", "soft", "balanced"],
    kept=[KEPT, [5, 0, 3], list(range(E))],
    dispatch=["auto", "loop"],
)
def test_the_layer_computes_what_it_did_without_the_others(selector, kept, dispatch, close):
    chosen = {"topk": TopK(2), "normalized": TopK(2, normalize=True), "soft": Soft(), "balanced": Balanced(2)}[selector]
    layer = layer_of(chosen, dispatch=dispatch).double()
    if selector == "balanced":
        layer.router.selector.bias.copy_(torch.rand(E))
    small = prune(layer, kept)
    x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)
    y, wanted = small(x), slow(layer, x, kept)
    close(y, wanted)
    direction = torch.randn_like(y)
    pairs = [(x, x, slice(None)), (small.router.scorer.weight, layer.router.scorer.weight, kept)]
    pairs += [(getattr(small.experts, n), getattr(layer.experts, n), kept) for n in ("up", "down", "up_bias")]
    for here, there, rows in pairs:
        (one,) = torch.autograd.grad((y * direction).sum(), here, retain_graph=True)
        (two,) = torch.autograd.grad((wanted * direction).sum(), there, retain_graph=True)
        close(one, two[rows])


def test_by_hand():
    layer = MoE(Router(LinearScorer(2, 3), TopK(1)), FeedForward(3, 2, 2, activation="relu"))
    layer.router.scorer.weight.data = torch.tensor([[3.0, 0.0], [2.0, 0.0], [0.0, 1.0]])
    for e in range(3):
        layer.experts.up.data[e], layer.experts.down.data[e] = torch.eye(2), (e + 1) * torch.eye(2)
    small = prune(layer, [1, 2])
    x = torch.tensor([[1.0, 0.0]])
    assert small.router(x).indices.tolist() == [[0]]
    share = float(torch.tensor([2.0, 0.0]).softmax(0)[0])
    torch.testing.assert_close(small(x), torch.tensor([[2 * share, 0.0]]))


@pytest.mark.parametrize("keep", [E, list(range(E))], ids=["number", "experts"])
def test_keeping_all_changes_nothing(make_router, scorer_name, keep):
    layer = MoE(make_router(scorer_name, "balanced", D, E), FeedForward(E, D, 8)).eval()
    small, x = prune(layer, keep), torch.randn(9, D)
    assert small is not layer
    assert torch.equal(small(x), layer(x))
    assert all(torch.equal(small.state_dict()[name], value) for name, value in layer.state_dict().items())


def test_the_model_itself_stays_as_it_is():
    layer = layer_of()
    before = copy.deepcopy(layer.state_dict())
    small = prune(layer, KEPT)
    for parameter in small.parameters():
        parameter.data.zero_()
    assert all(torch.equal(layer.state_dict()[name], value) for name, value in before.items())


@pytest.mark.parametrize("selector", ["capacity", "expert_choice"])
def test_bounds_count_the_experts_that_are_left(selector, close):
    make = {"capacity": lambda f: Capacity(TopK(2), f), "expert_choice": ExpertChoice}[selector]
    small = prune(layer_of(make(1.0)), KEPT)
    twin = copy.deepcopy(small)
    twin.router = Router(twin.router.scorer, make(1.0))
    x = torch.randn(31, D)
    close(small(x), twin(x))


def test_frequency_keeps_the_busiest():
    layer = layer_of()
    with record(layer) as tape:
        for n in (40, 7):
            layer(torch.randn(n, D))
    counts = [sum(int((item.routing.indices == e).sum()) for item in tape) for e in range(E)]
    busiest = sorted(sorted(range(E), key=lambda e: -counts[e])[:3])
    small = prune(layer, 3, evidence=tape)
    assert torch.equal(small.router.scorer.weight, layer.router.scorer.weight[busiest])
    assert torch.equal(small.experts.up, layer.experts.up[busiest])


def kept_by(layer, small):
    rows = [[torch.equal(row, other) for other in layer.experts.up] for row in small.experts.up]
    return [row.index(True) for row in rows]


@pytest.mark.grid(placement=[False, True], masked=[False, True])
def test_reap_keeps_the_largest_weighted_outputs(placement, masked):
    placed = Placement([[0], [1], [2], [0], [3, 4], [5]]) if placement else None
    layer = layer_of(placement=placed)
    batches = [(torch.randn(n, D), torch.rand(n) < 0.8 if masked else None) for n in (40, 9)]
    with record(layer, keep=("output",)) as tape:
        for x, mask in batches:
            layer(x, mask=mask)
    sums, counts = [0.0] * E, [0] * E
    for x, mask in batches:
        routing = layer.router(x, mask=mask)
        taken = [0] * E
        for t, chosen in enumerate(routing.indices.tolist()):
            for j, e in enumerate(chosen):
                if e >= 0:
                    place = layer.places(e)[taken[e] % len(layer.places(e))]
                    taken[e] += 1
                    sums[e] += float(
                        routing.weights[t, j].detach() * layer.experts.expert(x[t : t + 1], place).detach().norm()
                    )
                    counts[e] += 1
    saliency = [s / max(c, 1) for s, c in zip(sums, counts, strict=True)]
    best = sorted(sorted(range(E), key=lambda e: -saliency[e])[:3])
    small = prune(layer, 3, by="reap", evidence=tape)
    assert torch.equal(small.router.scorer.weight, layer.router.scorer.weight[best])


@pytest.mark.parametrize("k", [2, None], ids=["top-2", "soft"])
def test_removal_is_the_change_of_the_output(k):
    layer, x = layer_of(Soft() if k is None else TopK(k)), torch.randn(40, D)
    with record(layer, keep=("input",)) as tape:
        y = layer(x[:25]), layer(x[25:])
    with torch.no_grad():
        rests = [[e for e in range(E) if e != gone] for gone in range(E)]
        changes = [float((torch.cat(y) - prune(layer, rest)(x)).square().sum()) for rest in rests]
    best = sorted(sorted(range(E), key=lambda e: -changes[e])[:4])
    assert kept_by(layer, prune(layer, 4, by="removal", evidence=tape)) == best


def test_random_is_seeded():
    layer = layer_of()
    drawn = random(E, torch.Generator().manual_seed(shifted(3)))
    best = sorted(drawn.argsort(descending=True)[:2].tolist())
    for _ in range(2):
        assert kept_by(layer, prune(layer, 2, by="random", seed=shifted(3))) == best


def test_whole_models(tmp_path, close):
    model = sr_moe(3, channels=1, width=D, depth=3, num_experts=E, hidden=8).eval()
    x = torch.rand(20, 1, 8, 8)
    with record(model) as tape:
        model(x)
    small = prune(model, {"stages.0.moe": 4, "stages.2.moe": [5, 0, 3]}, evidence=tape)
    sizes = [stage.moe.experts.num_experts for stage in small.stages]
    assert sizes == [4, E, 3]
    assert [stage.moe.router.num_experts for stage in small.stages] == sizes
    save(small, tmp_path)
    assert torch.equal(load(tmp_path)(x), small(x))
    everywhere = prune(model, 3, evidence=tape)
    assert [stage.moe.experts.num_experts for stage in everywhere.stages] == [3, 3, 3]
    loss = everywhere.train()(x).square().mean()
    loss.backward()
    assert all(p.grad is not None for stage in everywhere.stages for p in stage.moe.parameters())


def test_placed_layers_lose_the_slots_that_nobody_uses(close):
    layer = layer_of(placement=Placement([[0], [1, 5], [0], [], [3], [2]])).eval()
    small = prune(layer, [2, 1, 3])
    assert small.placement.table.tolist() == [[0, -1], [1, 2], [-1, -1]]
    assert torch.equal(small.experts.up, layer.experts.up[[0, 1, 5]])
    assert prune(layer, [0, 4]).placement is None
    assert prune(layer, [0, 4, 3]).placement is None  # one more in the router than in the bank: a zero expert


def test_zero_experts_of_a_larger_router():
    layer = layer_of(experts=E + 2)
    small = prune(layer, [2, 7, 0])
    assert small.placement.table.tolist() == [[0], [-1], [1]]
    assert small.experts.num_experts == 2


def test_mistakes_are_named(user_error):
    layer, other = layer_of(), layer_of()
    with record(layer) as tape, record(other) as foreign:
        layer(torch.randn(9, D))
        other(torch.randn(9, D))
    for keep, words in (
        (E + 1, ["keep", "from 1 to 6", "got 7"]),
        (0, ["keep", "got 0"]),
        (True, ["keep", "got True"]),
        ([], ["no expert was named"]),
        ([0, 6], ["no expert 6", "0 to 5"]),
        ([1, 1], ["once", "[1, 1]"]),
        ([3], ["k=2", "E=1"]),
        (1, ["k=2", "E=1"]),
        ({"stages.0": 3}, ["unknown layer of prune", "'stages.0'"]),
    ):
        with user_error(*words):
            prune(layer, keep, evidence=tape)
    with user_error("prune", "evidence of another model"):
        prune(layer, 3, evidence=foreign)
    with user_error("no evidence for layer", "record(model)", "evidence=tape"):
        prune(layer, 3)
    with user_error("by", "'frequenzy'", "'frequency'", "reap"):
        prune(layer, 3, by="frequenzy", evidence=tape)
    for by, name in (("reap", "output"), ("removal", "input")):
        with user_error(f"did not keep '{name}'", "keep="):
            prune(layer, 3, by=by, evidence=tape)
    with user_error("Linear holds no MoE"):
        prune(nn.Linear(2, 2), 1)
    with user_error("2 MoE layers", "dict", "0, 1"):
        prune(nn.Sequential(layer, other), [0, 1])
    with user_error("all zero experts"):
        prune(layer_of(TopK(1), experts=E + 2), [6, 7])


def test_largest_is_what_the_slow_form_sorts():
    values = torch.rand(5, 4, generator=generator(0))
    assert largest(values, 2, None).tolist() == values.argsort(1, descending=True)[:, :2].tolist()


def test_sharded_layers_are_named(one_process, user_error):
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(layer_of())
    fully_shard(model[0])
    with user_error("prune", "layer '0' is sharded", "shard it afterwards"):
        prune(model, 3)
