"""Path coupling against its equations, one token and one path at a time."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, Term, TopK, TopP, feed, penalty, record
from spectralmoe.regularizers import path_coupling
from spectralmoe.routing import Routing
from spectralmoe.tape import Record

D, E, N = 6, 4, 30
forms = pytest.mark.parametrize("form", ["mass", "paths"])


class Layers(nn.Module):
    """Three layers on the same tokens, the second with fewer experts."""

    def __init__(self, selector=None, sizes=(E, 3, E)):
        super().__init__()
        select = selector or (lambda: TopK(2))
        self.moes = nn.ModuleList(MoE(Router(LinearScorer(D, e), select()), FeedForward(e, D, 5)) for e in sizes)

    def forward(self, x, mask=None):
        for moe in self.moes:
            x = x + moe(x, mask=mask)
        return x


def coupling(model, x, mask=None, **options):
    with record(model) as tape:
        model(x, mask=mask)
    return path_coupling(tape, **options), tape


def slow(tape, form):
    """The equations in float64."""
    values = []
    for one, two in zip(tape.records[:-1], tape.records[1:], strict=True):
        a, b = one.routing, two.routing
        real = [t for t in range(len(a.logits)) if a.mask is None or a.mask[t]]
        joint = [[torch.zeros((), dtype=torch.float64)] * b.num_experts for _ in range(a.num_experts)]
        for t in real:
            for e in set(a.indices[t].tolist()) - {-1}:
                for v in set(b.indices[t].tolist()) - {-1}:
                    joint[e][v] = joint[e][v] + a.logits[t].softmax(0)[e] * b.logits[t].softmax(0)[v] / len(real)
        total = sum(map(sum, joint))
        if form == "mass":
            values.append(-total)
            continue
        joint = [[mass / total for mass in row] for row in joint]
        ends = [sum(row[v] for row in joint) for v in range(b.num_experts)]
        information = [
            mass * (mass / sum(row) / ends[v]).log() for row in joint for v, mass in enumerate(row) if mass > 0
        ]
        values.append(-sum(information))
    return sum(values) / len(values)


@forms
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
@pytest.mark.parametrize("selector", [None, lambda: TopP(0.6), lambda: TopK(2, normalize=True)], ids=["k", "p", "norm"])
def test_equation(form, masked, selector, same):
    model, x = Layers(selector).double(), torch.randn(N, D, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(N) % 3 > 0 if masked else None
    value, tape = coupling(model, x, mask, form=form)
    same(value, slow(tape, form), [x, *model.parameters()])


def item(logits, k=1, *, name="a", score="softmax", mask=None):
    """A record of a layer that chooses the k largest logits."""
    indices = logits.topk(k).indices
    routing = Routing(logits, torch.ones(indices.shape), indices, score, mask)
    return Record(name, MoE(Router(LinearScorer(2, logits.shape[1]), TopK(k)), FeedForward(2, 2, 2)), routing)


def certain(*experts, of=4):
    """Logits that choose these experts with probability 1."""
    return 200 * torch.eye(of)[list(experts)]


def test_by_hand(close):
    """Masses 3/4 and 1/2 of one token, 1/2 and 1/2 of another."""
    a = torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log()
    b = torch.zeros(2, 2)
    close(path_coupling([item(a), item(b, name="b")]), -(0.75 * 0.5 + 0.5 * 0.5) / 2)


def test_paths_that_tell_the_next_expert_are_worth_log_e(close):
    a, even = item(certain(0, 1, 2, 3)), item(certain(2, 3, 1, 0), name="b")
    close(path_coupling([a, even], form="paths"), -math.log(4))
    blind = item(certain(0, 0, 0, 0), name="b")
    close(path_coupling([a, blind], form="paths"), 0.0)
    close(path_coupling([a, blind]), path_coupling([a, even]))


def test_permuted_tokens_of_one_layer_are_seen_by_paths_alone(close):
    """Every token has the same mass, on an expert of its own."""
    sharp = torch.tensor([2.0, 0, 0, 0])
    a = torch.stack([sharp.roll(t) for t in range(4)] * 2)
    order = torch.tensor([0, 2, 1, 3, 0, 1, 2, 3])
    follows, mixed = item(a, name="b"), item(a[order], name="b")
    close(path_coupling([item(a), follows]), path_coupling([item(a), mixed]))
    assert path_coupling([item(a), follows], form="paths") < path_coupling([item(a), mixed], form="paths") - 0.01


def test_mass_is_the_product_of_both_masses_and_constant_where_scores_are_renormalised(user_error, close):
    logits = torch.randn(2, N, E, requires_grad=True)
    masses = logits.softmax(-1).topk(2).values.sum(-1)
    close(path_coupling([item(logits[0], 2), item(logits[1], 2, name="b")]), -(masses[0] * masses[1]).mean())
    kept = torch.where(logits >= logits.topk(2).values[..., 1:], logits, -torch.inf).softmax(-1)
    renormalised = [item(logits[i], 2, name=name, score=kept[i]) for i, name in enumerate("ab")]
    with user_error("no gradient", "'a'", 'form="paths"'):
        path_coupling(renormalised)
    mask = torch.arange(N) > 3  # padding is routed nowhere, and scored all the same
    padded = [
        replace(one.routing, mask=mask, indices=one.routing.indices.where(mask[:, None], -1)) for one in renormalised
    ]
    with user_error("no gradient", "'a'"):
        path_coupling([replace(one, routing=routing) for one, routing in zip(renormalised, padded, strict=True)])
    assert path_coupling(renormalised, form="paths").isfinite()


@pytest.mark.parametrize("selector", [Soft, lambda: TopK(3)], ids=["soft", "all"])
def test_a_layer_that_uses_all_experts_has_no_mass_to_gain(selector, user_error):
    model = Layers(selector, sizes=(3, 3))
    for mask in (None, torch.arange(N) > 2):
        with user_error("path_coupling has no gradient", "moes.0"):
            coupling(model, torch.randn(N, D), mask)


def test_as_a_term_by_name_it_sharpens_the_scores():
    model, x = Layers(), torch.randn(64, D)
    terms = {"coupling": Term(path_coupling, 1.0)}
    assert terms["coupling"].scope == "model"
    optimizer, values = torch.optim.SGD(model.parameters(), lr=0.1), []
    for _ in range(6):
        with record(model, terms=terms) as tape:
            model(x)
        total, parts = penalty(tape, terms)
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        values.append(parts["coupling"])
    assert values[-1] < values[0]


def test_layers_are_paired_call_by_call(close):
    model, x = Layers(), torch.randn(2, N, D)
    with record(model) as tape:
        for half in x:
            model(half)
    halves = torch.stack([coupling(model, half)[0] for half in x])
    close(path_coupling(tape), halves.mean())


def test_of_a_replayed_routing_it_is_the_routers_own_choice(close):
    model, x = Layers(), torch.randn(N, D)
    with feed(model, indices={"moes.0": torch.tensor([[0, 1]]).expand(N, 2)}), record(model) as tape:
        model(x)
    assert not tape[0].routing.members().equal(tape[0].routing.live.members())
    own = [replace(one, routing=one.routing.unforced) for one in tape]
    close(path_coupling(tape), path_coupling(own))


def test_misuse(user_error):
    a, b = item(torch.randn(N, E)), item(torch.randn(N, E), name="b")
    with user_error("form", "'masses'", "mass, paths"):
        path_coupling([a, b], form="masses")
    with user_error("one alone", "a"):
        path_coupling([a])
    with user_error("records of all layers", 'scope="model"'):
        path_coupling(a)
    with user_error("called equally often", "a, b"):
        path_coupling([a, a, b])
    same_tokens = ("'a' and 'b' do not see the same tokens", "Term(layers=...)")
    with user_error(*same_tokens, "N=30 and N=29"):
        path_coupling([a, item(torch.randn(N - 1, E), name="b")])
    with user_error(*same_tokens, "masked"):
        path_coupling([a, item(torch.randn(N, E), name="b", mask=torch.arange(N) > 3)])
    shaped = [replace(one, routing=replace(one.routing, shape=shape)) for one, shape in ((a, (5, 6)), (b, (6, 5)))]
    with user_error(*same_tokens, "(5, 6)", "(6, 5)"):
        path_coupling(shaped)
