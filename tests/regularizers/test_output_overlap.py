"""Output overlap against its equation, one token and one pair of experts at a time."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, Router, Soft, Term, TopK, TopP, penalty, record
from spectralmoe.regularizers import output_overlap

D, E, N = 6, 4, 20
forms = pytest.mark.parametrize("form", ["projection", "cosine"])


def make_layer(selector=None, experts=None):
    scorer = LinearScorer(D, E + 1)  # one zero expert
    return MoE(Router(scorer, selector or TopK(3)), experts or FeedForward(E, D, 8))


def overlap(layer, x, mask=None, **options):
    with record(layer, terms={"overlap": Term(output_overlap, 1.0)}) as tape:
        layer(x, mask=mask)
    return output_overlap(tape[0], **options)


def slow(layer, x, mask, form):
    """The equation in float64."""
    routing, total, real = layer.router(x, mask=mask), 0, 0
    for t in range(len(x)):
        if mask is not None and not mask[t]:
            continue
        real += 1
        ys = [layer.experts.expert(x[t : t + 1], e)[0] for e in routing.indices[t].tolist() if 0 <= e < E]
        for j, one in enumerate(ys):
            for k, two in enumerate(ys):
                if j != k and form == "cosine":
                    total = total + (one @ two) ** 2 / (one @ one) / (two @ two)
                elif j != k:
                    shadow = (one @ two) / (two @ two + 1e-6) * two
                    total = total + shadow @ shadow
    return total / real


@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("selector", [TopK(3), TopP(0.9), Soft()], ids=["topk", "top_p", "soft"])
def test_equation(form, masked, selector, same):
    layer, x = make_layer(selector).double(), torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(N) % 3 > 0 if masked else None
    same(overlap(layer, x, mask, form=form), slow(layer, x, mask, form), [x, *layer.experts.parameters()])


@forms
def test_orthogonal_outputs_do_not_overlap(form):
    layer = make_layer(experts=ModuleExperts([nn.Linear(D, D) for _ in range(E)]))
    for e, expert in enumerate(layer.experts.experts):
        nn.init.zeros_(expert.weight)
        expert.bias.data = torch.eye(D)[e]
    assert overlap(layer, torch.randn(N, D), form=form) == 0


def test_only_the_projection_grows_with_the_outputs(close):
    layer, x = make_layer().double(), torch.randn(N, D, dtype=torch.float64)
    larger = copy.deepcopy(layer)
    larger.experts.down.data *= 3
    close(overlap(larger, x, form="cosine"), overlap(layer, x, form="cosine"))
    close(overlap(larger, x, eps=1e-14), 9 * overlap(layer, x, eps=1e-14))


def test_outputs_are_paired_token_by_token():
    """Swapping the rows of one expert between tokens changes the overlap: they are found by their slots."""
    layer, x = make_layer(), torch.randn(N, D)
    with record(layer, keep="output") as tape:
        layer(x)
    item, before = tape[0], output_overlap(tape[0], form="cosine")
    counts = item.routing.counts()[:E]
    first = int(counts[: int(counts.argmax())].sum())
    rows = item.kept.tensors["output"]
    rows[[first, first + 1]] = rows[[first + 1, first]].clone()
    assert not torch.isclose(output_overlap(item, form="cosine"), before)


def test_without_a_real_token_it_is_zero():
    value = overlap(make_layer(), torch.randn(3, D), torch.zeros(3, dtype=torch.bool))
    assert value == 0
    assert value.isfinite()
    assert overlap(make_layer(), torch.randn(0, D)) == 0


def test_misuse(user_error):
    layer, x = make_layer(TopK(1)), torch.randn(N, D)
    with user_error("output_overlap", "K=1"):
        overlap(layer, x)
    with user_error("'cosines'", "cosine, projection"):
        overlap(make_layer(), x, form="cosines")
    with record(layer) as tape:
        layer(x)
    with user_error("did not keep 'output'", "record(model, terms=terms)"):
        output_overlap(tape[0])


def test_a_term_knows_what_it_reads():
    assert Term(output_overlap, 1.0).keeps == Term(partial(output_overlap, form="cosine"), 1.0).keeps == ("output",)


@forms
def test_as_a_term_it_parts_the_experts(form):
    layer, x = make_layer(), torch.randn(64, D)
    terms = {"overlap": Term(partial(output_overlap, form=form), 1.0)}
    optimizer, values = torch.optim.SGD(layer.experts.parameters(), lr=0.05), []
    for _ in range(6):
        with record(layer, terms=terms) as tape:
            layer(x)
        total, parts = penalty(tape, terms)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(parts["overlap"])
    assert values[-1] < values[0]
