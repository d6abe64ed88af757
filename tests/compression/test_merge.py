"""Merged experts are weighted averages, and the router goes on choosing among all."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import FeedForward, LinearScorer, MoE, Placement, Router, TopK, load, record, save
from spectralmoe.compression import group_by_affinity, merge, prune, replicate
from spectralmoe.models import sr_moe

D, E = 12, 6
GROUPS = [[0, 3, 5], [1, 2]]


def layer_of(*, experts=E, **options):
    return MoE(Router(LinearScorer(D, experts), TopK(2)), FeedForward(E, D, 8, bias=True), **options)


@pytest.fixture
def taped():
    layer = layer_of()
    with record(layer, keep=("input", "output")) as tape:
        layer(torch.randn(50, D))
    return layer, tape


def group_of(e, groups):
    return next((group for group in groups if e in group), [e])


@pytest.mark.parametrize("by", ["frequency", None])
def test_definition(taped, by, same):
    """y_t = sum_j w_tj E_g(x_t), E_g with the weighted means of the tensors of i_tj's group."""
    layer, tape = taped
    share = [float(n) for n in tape[0].routing.counts()] if by else [1.0] * E
    small = merge(layer, GROUPS, by=by, evidence=tape)
    means = {}
    for e in range(E):
        group = group_of(e, GROUPS)
        total = sum(share[i] for i in group)
        weights = [share[i] / total if total else 1 / len(group) for i in group]
        means[e] = {
            name: sum(w * stack[i].double() for w, i in zip(weights, group, strict=True)).float()
            for name, stack in layer.experts.named_parameters()
        }
    bank = FeedForward(E, D, 8, bias=True)
    for name, stack in bank.named_parameters():
        stack.data = torch.stack([means[e][name] for e in range(E)])
    x = torch.randn(20, D, requires_grad=True)
    twin = MoE(small.router, bank)
    assert small.experts.num_experts == 3
    assert torch.equal(small.router.scorer.weight, layer.router.scorer.weight)
    assert torch.equal(small.router(x).indices, layer.router(x).indices)
    same(small(x), twin(x), [x, small.router.scorer.weight])


def test_by_hand():
    layer = MoE(Router(LinearScorer(2, 3), TopK(1)), FeedForward(3, 2, 2, activation="relu"))
    layer.experts.up.data[:] = torch.tensor([[[1.0]], [[2.0]], [[6.0]]])
    small = merge(layer, [[2, 0]], by=None)
    assert small.placement.table.tolist() == [[0], [1], [0]]
    assert small.experts.up[:, 0, 0].tolist() == [3.5, 2.0]


def test_groups_of_one_are_the_identity(taped):
    layer, tape = taped
    x = torch.randn(9, D)
    for groups in ([], [[3], [1]], E):
        same = merge(layer, groups, evidence=tape)
        assert same.placement is None
        assert torch.equal(same(x), layer(x))


def test_copies_merge_into_themselves(close):
    layer = layer_of()
    layer.experts.up.data[3], layer.experts.down.data[3] = layer.experts.up.data[0], layer.experts.down.data[0]
    layer.experts.up_bias.data[3], layer.experts.down_bias.data[3] = (
        layer.experts.up_bias[0],
        layer.experts.down_bias[0],
    )
    x = torch.randn(20, D)
    close(merge(layer, [[0, 3]], by=None)(x), layer(x))


def test_a_number_makes_groups_around_the_busiest(taped):
    layer, tape = taped
    routing = tape[0].routing
    counts, logits = routing.counts().tolist(), routing.logits.detach().double()
    centres = sorted(sorted(range(E), key=lambda e: -counts[e])[:3])
    groups = {centre: [centre] for centre in centres}
    for e in set(range(E)) - set(centres):
        cosines = [float(torch.cosine_similarity(logits[:, e], logits[:, c], dim=0)) for c in centres]
        groups[centres[cosines.index(max(cosines))]].append(e)
    small, by_hand = merge(layer, 3, evidence=tape), merge(layer, list(groups.values()), evidence=tape)
    assert small.experts.num_experts == 3
    assert torch.equal(small.placement.table, by_hand.placement.table)
    assert torch.equal(small.experts.up, by_hand.experts.up)


def test_affinity_groups_by_hand():
    affinity = torch.tensor([[1.0, 0.9, 0.1, 0.0], [0.9, 1.0, 0.0, 0.2], [0.1, 0.0, 1.0, 0.8], [0.0, 0.2, 0.8, 1.0]])
    assert group_by_affinity(torch.tensor([0.1, 0.4, 0.4, 0.1]), affinity, 2) == [[0, 1], [2, 3]]
    assert group_by_affinity(torch.tensor([0.7, 0.1, 0.1, 0.1]), affinity, 1) == [[0, 1, 2, 3]]


def test_an_idle_group_is_averaged_evenly():
    layer = layer_of()
    layer.router.scorer.weight.data.zero_()
    layer.router.scorer.weight.data[2:4, 0] = 9.0
    x = torch.randn(9, D).abs()
    with record(layer) as tape:
        layer(x)
    small = merge(layer, [[0, 1], [2, 4]], evidence=tape)
    torch.testing.assert_close(small.experts.up[0], layer.experts.up[:2].mean(0))
    assert torch.equal(small.experts.up[1], layer.experts.up[2])  # 4 had no token


def test_merged_again_replicated_and_pruned(close):
    layer, x = layer_of().eval(), torch.randn(30, D)
    first = merge(layer, [[0, 3]], by=None)
    again = merge(first, [[1, 2]], by=None)
    assert again.placement.table.flatten().tolist() == [0, 1, 1, 0, 2, 3]
    assert torch.equal(again.experts.up[0], first.experts.up[0])
    many = replicate(first, [2, 1, 1, 1, 3, 1])
    close(many(x), first(x))
    close(merge(many, [], by=None)(x), first(x))
    assert prune(first, [3, 0]).experts.num_experts == 1
    assert prune(first, [3, 0]).placement.table.tolist() == [[0], [0]]


def test_zero_experts_stay(close):
    layer, x = layer_of(experts=E + 1), torch.randn(30, D)
    small = merge(layer, [[0, 1]], by=None)
    assert small.placement.table.flatten().tolist() == [0, 0, 1, 2, 3, 4, -1]
    twin = MoE(small.router, layer.experts.averaged([[0, 1], [0, 1], [2], [3], [4], [5]]))
    close(small(x), twin(x))


def test_whole_models_are_saved(tmp_path):
    model = sr_moe(3, channels=1, width=D, depth=2, num_experts=E, hidden=8).eval()
    x = torch.rand(20, 1, 8, 8)
    with record(model) as tape:
        model(x)
    small = merge(model, {"stages.1.moe": 2}, evidence=tape)
    assert [stage.moe.experts.num_experts for stage in small.stages] == [E, 2]
    save(small, tmp_path)
    twin = load(tmp_path)
    assert torch.equal(twin(x), small(x))
    assert torch.equal(twin.stages[1].moe.placement.table, small.stages[1].moe.placement.table)


def test_mistakes_are_named(taped, user_error):
    layer, tape = taped
    for groups, words in (
        ([[0, 1], [1, 2]], ["overlap", "expert 1", "2 times"]),
        ([[0, 0]], ["overlap", "expert 0"]),
        ([[0, 9]], ["no expert 9"]),
        ([[]], ["no expert was named"]),
        ([0, 1], ["lists of experts", "[0, 1]"]),
        (7, ["networks", "from 1 to 6", "got 7"]),
        (0, ["got 0"]),
    ):
        with user_error("merge", *words):
            merge(layer, groups, evidence=tape)
    with user_error("merge", "needs a saliency"):
        merge(layer, 3, by=None, evidence=tape)
    with user_error("merge", "another model"):
        merge(layer_of(), 3, evidence=tape)
    with user_error("merge", "no evidence"):
        merge(layer, GROUPS)
    with user_error("merge", "zero expert"):
        merge(layer_of(placement=Placement([[0], [1], [2], [3], [4], []])), [[0, 5]], by=None)
