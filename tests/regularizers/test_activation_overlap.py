"""Activation overlap against its equation, one token and one pair of experts at a time."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, Router, Soft, Term, TopK, TopP, feed, record
from spectralmoe.experts.feed_forward import activate
from spectralmoe.regularizers import activation_overlap, output_overlap

D, E, H, N = 6, 4, 5, 20


def make_layer(selector=None, experts=None, **options):
    scorer = LinearScorer(D, E + 1)  # one zero expert
    return MoE(Router(scorer, selector or TopK(3)), experts or FeedForward(E, D, H, activation="swiglu"), **options)


def overlap(layer, x, mask=None, **options):
    term = partial(activation_overlap, **options)
    with record(layer, terms={"overlap": Term(term, 1.0)}) as tape:
        layer(x, mask=mask)
    return term(tape[0])


def slow(layer, x, mask):
    """The equation in float64."""
    routing, values = layer.router(x, mask=mask), []
    for t, chosen in enumerate(routing.indices.tolist()):
        zs = [activate("swiglu", layer.experts.up[e] @ x[t]) for e in chosen if 0 <= e < E]
        if len(zs) > 1:
            cosines = [(a @ b) ** 2 / (a @ a) / (b @ b) for a in zs for b in zs if a is not b]
            values.append(sum(cosines) / len(cosines))
    return sum(values) / len(values)


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("selector", [TopK(3), TopP(0.6), Soft()], ids=["topk", "top_p", "soft"])
def test_equation(masked, selector, same):
    layer, x = make_layer(selector).double(), torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(N) % 3 > 0 if masked else None
    same(overlap(layer, x, mask), slow(layer, x, mask), [x, *layer.experts.parameters()])


def hidden_of(rows):
    """A layer that reads ones, sends them to all experts, and whose hidden activations are the rows (E, H)."""
    layer = MoE(Router(LinearScorer(1, len(rows)), Soft()), FeedForward(len(rows), 1, H, activation="relu"))
    layer.experts.up.data[:] = torch.tensor(rows).unsqueeze(2)
    return layer


def test_by_hand(close):
    """Cosines 0.6, 0 and 0.8 between three experts: (0.36 + 0 + 0.64) / 3."""
    layer = hidden_of([[1.0, 0, 0, 0, 0], [0.6, 0.8, 0, 0, 0], [0, 5.0, 0, 0, 0]])
    close(overlap(layer, torch.ones(2, 1)), 1 / 3)


def test_orthogonal_activations_do_not_overlap_and_equal_ones_are_one(close):
    x = torch.ones(3, 1)
    assert overlap(hidden_of(torch.eye(4, H).tolist()), x) == 0
    close(overlap(hidden_of([[1.0, 2, 3, 4, 5]] * 4), x), 1)
    close(overlap(hidden_of([[1.0, 2, 3, 4, 5], [2.0, 4, 6, 8, 10]]), x), 1)
    assert overlap(hidden_of([[0.0] * H] * 4), x) == 0  # experts that are off


def test_it_does_not_see_how_large_activations_are(close):
    layer, x = make_layer().double(), torch.randn(N, D, dtype=torch.float64)
    scaled = copy.deepcopy(layer)
    scaled.experts.up.data.unflatten(1, (2, H))[:, 1] *= torch.tensor([1e-3, 0.5, 3, 1e4]).view(E, 1, 1)
    close(overlap(scaled, x), overlap(layer, x))


def test_its_gradient_turns_activations_and_leaves_their_length(close):
    layer, x = make_layer().double(), torch.randn(N, D, dtype=torch.float64)
    with record(layer, keep="hidden") as tape:
        layer(x)
    rows = tape[0].kept.tensors["hidden"]
    (grad,) = torch.autograd.grad(activation_overlap(tape[0]), rows)
    assert grad.any()
    close((grad * rows).sum(1), torch.zeros(len(rows), dtype=torch.float64))


def test_a_token_with_one_expert_counts_nothing(close):
    layer, x = make_layer(), torch.randn(3, D)
    indices = torch.tensor([[0, 1, 2], [3, -1, E], [2, -1, 0]])  # E: the zero expert
    with feed(layer, indices={"": indices}):
        value = overlap(layer, x)
    with feed(layer, indices={"": indices[[0, 2]]}):
        close(value, overlap(layer, x[[0, 2]]))


def test_activations_are_paired_token_by_token():
    layer, x = make_layer(), torch.randn(N, D)
    with record(layer, keep="hidden") as tape:
        layer(x)
    item, before = tape[0], activation_overlap(tape[0])
    counts = item.routing.counts()[:E]
    first = int(counts[: int(counts.argmax())].sum())
    rows = item.kept.tensors["hidden"]
    rows.data[[first, first + 1]] = rows.data[[first + 1, first]].clone()
    assert not torch.isclose(activation_overlap(item), before)


def test_routed_experts_alone_are_compared(close):
    layer, x = make_layer(), torch.randn(N, D)
    close(overlap(MoE(layer.router, layer.experts, shared=nn.Linear(D, D)), x), overlap(layer, x))


def test_outputs_are_compared_for_banks_without_hidden_activations(close):
    layer = make_layer(TopK(2), ModuleExperts([nn.Linear(D, D) for _ in range(E)]))
    layer.router.scorer.weight.data[E] = 0
    layer.router.scorer.weight.data[:E] = torch.eye(E, D)
    x = torch.rand(N, D) + 1  # the zero expert is nobody's
    with record(layer, keep="output") as tape:
        layer(x)
    close(overlap(layer, x, kind="output"), output_overlap(tape[0], form="cosine") / 2)


def test_a_term_knows_what_it_reads():
    assert Term(activation_overlap, 1.0).keeps == ("hidden",)
    assert Term(partial(activation_overlap, kind="output"), 1.0).keeps == ("output",)


def test_misuse(user_error):
    x = torch.randn(N, D)
    with user_error("activation_overlap", "K=1"):
        overlap(make_layer(TopK(1)), x)
    with user_error("hiden", "hidden, output"):
        activation_overlap(None, kind="hiden")
    with user_error("ModuleExperts has no 'hidden' to keep"):
        overlap(make_layer(experts=ModuleExperts([nn.Linear(D, D) for _ in range(E)])), x)
    layer = make_layer()
    with record(layer) as tape:
        layer(x)
    with user_error("did not keep 'hidden'", "record(model, terms=terms)"):
        activation_overlap(tape[0])
