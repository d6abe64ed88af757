"""The guard's verdict against a full evaluation before and after, and what it may never let through."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from grids import one_of_each
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from spectralmoe import (
    Capacity,
    ExpertChoice,
    FeedForward,
    LinearScorer,
    MoE,
    Router,
    Soft,
    TopK,
    TopP,
    record,
)
from spectralmoe.adaptation import Guard, adapt_one
from spectralmoe.adaptation.adapt import split
from spectralmoe.adaptation.reference import Reference
from spectralmoe.diagnostics import accuracy_change

NAMES = ["stages.0.moe", "stages.1.moe"]


@torch.no_grad()
def full_pass(model, x):
    """Predictions and, layer by layer, each sample's experts as sets (soft: the one of the largest weight)."""
    with record(model) as tape:
        predictions = model(x).argmax(-1)
    routes = {}
    for item in tape:
        rows = []
        for indices, weights in zip(item.routing.indices.tolist(), item.routing.weights.tolist(), strict=True):
            used = {e for e in indices if e >= 0}
            rows.append({indices[weights.index(max(weights))]} if item.routing.soft else used)
        size = len(rows) // len(x)
        routes[item.name] = [rows[i * size : (i + 1) * size] for i in range(len(x))]
    return predictions, routes


def shake(model, touched, scale=2.0):
    with torch.no_grad():
        for layer, e in touched.items():
            for view in model.get_submodule(layer).experts.expert_parameters(e).values():
                view.add_(scale * torch.randn_like(view))


@pytest.mark.parametrize("layers", [["stages.1.moe"], NAMES], ids=["last", "both"])
@pytest.mark.parametrize("name", ["top1", "top2", "soft"])
def test_the_verdict_is_a_full_evaluation_by_hand(network, data, make_guard, name, layers):
    model = network(name)
    x, y = data.validation.images, data.validation.labels
    before, routes = full_pass(model, x)
    for expert in range(4):
        guard, touched = make_guard(budget=3.0), dict.fromkeys(layers, expert)
        head, tail = split(model, layers[0])
        reference = guard.reference(model, head, tail, layers[0], [])
        changed = copy.deepcopy(model)
        shake(changed, touched)
        verdict = guard.judge(
            split(changed, layers[0])[1], reference, touched, model=changed, others=torch.ones(len(y), dtype=torch.bool)
        )
        after, moved = full_pass(changed, x)
        gained = sum(bool(a == t) and bool(b != t) for a, b, t in zip(after, before, y, strict=True))
        lost = sum(bool(a != t) and bool(b == t) for a, b, t in zip(after, before, y, strict=True))
        assert verdict.samples == len(y)
        assert (verdict.change.gained, verdict.change.lost) == (gained, lost)
        assert verdict.change.mean == pytest.approx(100 * (gained - lost) / len(y))
        assert verdict.flipped.tolist() == [i for i in range(len(y)) if before[i] != after[i]]
        assert verdict.rerouted.tolist() == [
            i for i in range(len(y)) if any(moved[layer][i] != routes[layer][i] for layer in routes)
        ]
        assert verdict.holds == (verdict.change.mean >= -3.0)
        assert verdict.reachable == len(reference.reachable(touched))


@one_of_each(k=[1, 2, None], method=["sgd", "low_rank", "unit"])
def test_a_model_of_sequences_without_split_is_judged_too(pooled, method, k):
    model = pooled("stacked", k)
    x, tokens = torch.randn(1, 5, 6), torch.randn(80, 5, 6)
    before, routes = full_pass(model, tokens)
    guard = Guard([(tokens[:30], before[:30]), (tokens[30:], before[30:])], budget=100.0)
    y = int(model(x).argsort(dim=-1)[0, -2])
    update = adapt_one(model, x, y, layers="all", method=method, lr=0.2, guard=guard)
    assert update.success
    after, moved = full_pass(model, tokens)
    flipped = [i for i in range(80) if before[i] != after[i]]
    assert update.verdict.flipped.tolist() == flipped
    assert update.verdict.change.mean == pytest.approx(-100 * len(flipped) / 80)
    assert update.verdict.rerouted.tolist() == [
        i for i in range(80) if any(moved[n][i] != routes[n][i] for n in routes)
    ]
    used = [i for i in range(80) if any(e in set().union(*routes[n][i]) for n, e in update.touched.items())]
    assert update.verdict.reachable == (80 if k is None else len(used))


def test_flips_alone_can_break_it(network, make_guard):
    model = network("top2")
    head, tail = split(model, NAMES[0])
    guards = [make_guard(budget=100.0, max_flips=n) for n in (0, 10_000)]
    reference = guards[0].reference(model, head, tail, NAMES[0], [])
    shake(model, {NAMES[0]: 1, NAMES[1]: 1})
    touched, every = {NAMES[0]: 1, NAMES[1]: 1}, torch.ones(len(guards[0]), dtype=torch.bool)
    verdicts = [guard.judge(tail, reference, touched, model=model, others=every) for guard in guards]
    assert [verdict.holds for verdict in verdicts] == [False, True]


def token_model(selector, deep=2):
    """Sequences (B, S, 5) -> logits (B, 3) through residual layers, the last with the given selector."""
    selectors = [TopK(1)] * (deep - 1) + [selector]
    layers = [MoE(Router(LinearScorer(5, 4), s), FeedForward(4, 5, 6, bias=True)) for s in selectors]

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = nn.ModuleList(layers), nn.Linear(5, 3)

        def forward(self, x):
            for layer in self.layers:
                x = x + layer(x)
            return self.head(x.mean(1))

    return Model().eval()


@pytest.mark.parametrize("touched", [{"layers.0": 2}, {"layers.1": 0}, {"layers.0": 1, "layers.1": 3}], ids=str)
@pytest.mark.parametrize("selector", [TopK(1), TopK(2, normalize=True), TopP(0.4)], ids=["top1", "top2", "top-p"])
def test_what_is_out_of_reach_cannot_change(selector, touched, close):
    model = token_model(selector)
    x = torch.randn(300, 2, 5)
    reference = Reference(model, x, torch.zeros(300).long())
    reach = reference.reachable(touched)
    outside = torch.ones(300, dtype=torch.bool)
    outside[reach] = False
    assert 0 < len(reach) < 300
    with torch.no_grad():
        before = model(x)
        for _ in range(3):
            shake(model, touched, scale=30.0)
            after = model(x)
            close(after[outside], before[outside])
            assert not torch.isclose(after[reach], before[reach]).all(-1).all()


@pytest.mark.parametrize("selector", [Soft(), ExpertChoice(capacity=1.0), Capacity(TopK(1), 1.0)], ids=repr)
def test_all_are_in_reach_where_tokens_share_experts(selector):
    """Also of a sparse layer below: what it changes moves the choices of other samples further up."""
    model = token_model(selector)
    reference = Reference(model, torch.randn(50, 2, 5), torch.zeros(50).long())
    assert reference.reachable({"layers.1": 3}).tolist() == list(range(50))
    if not isinstance(selector, Soft):
        assert reference.reachable({"layers.0": 3}).tolist() == list(range(50))


def test_choices_of_other_samples_are_seen():
    """A change of the first layer that reaches samples only through the expert's choice above it."""
    model = token_model(ExpertChoice(capacity=1.0))
    x, touched = torch.randn(50, 2, 5), {"layers.0": 2}
    reference = Reference(model, x, torch.zeros(50).long())
    with torch.no_grad():
        before = model(x)
        shake(model, touched, 30.0)
        moved = (~torch.isclose(model(x), before).all(-1)).nonzero().flatten()
    assert set(moved.tolist()) <= set(reference.reachable(touched).tolist())


def test_an_expert_that_no_reference_sample_uses(network, data):
    model = network("top1")
    with record(model) as tape, torch.no_grad():
        model(data.test.images)
    experts = tape.layer(NAMES[1])[0].routing.indices[:, 0]
    e = int(experts[(model(data.test.images).argmax(-1) != data.test.labels).nonzero()[0, 0]])
    sample = int(((model(data.test.images).argmax(-1) != data.test.labels) & (experts == e)).nonzero()[0])
    unused = experts != e
    guard = Guard([(data.test.images[unused], data.test.labels[unused])], budget=0.0, max_flips=0)
    update = adapt_one(model, data.test.images[[sample]], data.test.labels[[sample]], guard=guard)
    assert update.success
    assert update.verdict.reachable == 0
    assert update.verdict.change.mean == 0
    assert update.verdict.samples == int(unused.sum())


@one_of_each(
    method=["sgd", "low_rank", "unit"],
    limits=[("top2", 0.0, 0), ("soft", 0.6, None), ("top2", 5.0, 1), ("soft", 0.0, 2)],
)
def test_the_budget_is_honoured(network, data, wrong, make_guard, snapshot, changed, limits, method):
    name, budget, flips = limits
    model = network(name)
    guard = make_guard(budget=budget, max_flips=flips)
    x, y = data.validation.images, data.validation.labels
    seen = set()
    for sample in wrong(model, 2):
        state, (was, _) = snapshot(model), full_pass(model, x)
        update = adapt_one(
            model,
            data.test.images[[sample]],
            data.test.labels[[sample]],
            layers="all",
            method=method,
            lr=0.05,
            max_steps=30,
            guard=guard,
        )
        now, _ = full_pass(model, x)
        drop = 100 * (int((was == y).sum()) - int((now == y).sum())) / len(y)
        assert drop <= budget + 1e-9
        assert flips is None or int((was != now).sum()) <= flips
        if update.success:
            assert int(model(data.test.images[[sample]]).argmax()) == int(data.test.labels[sample])
            if update.verdict is not None:
                assert update.verdict.holds
                assert update.verdict.change.mean == pytest.approx(-drop)
                assert update.verdict.flipped.tolist() == (was != now).nonzero().flatten().tolist()
        else:
            assert changed(model, state) == []
            assert update.tried
        seen.add(update.success)
    assert seen


def test_a_refusal_names_every_attempt_and_leaves_the_model(network, data, make_guard, untouched):
    """Six samples of one expert moved to a far class: nothing within budget 0 and no flips."""
    model = network("soft")
    x = data.test.images[:6]
    y = (model(x).argmax(-1) + 5) % 10
    with untouched(model):
        update = adapt_one(model, x, y, layers="all", lr=0.1, guard=make_guard(budget=0.0, max_flips=0))
    assert not update.success
    assert update.verdict is None or not update.verdict.holds
    starts = ["sgd in stages.0.moe, stages.1.moe", "sgd in stages.1.moe", "unit", "low_rank", "null_space", "margin"]
    assert len(update.tried) == len(starts)
    for reason, start in zip(update.tried, starts, strict=True):
        assert reason.startswith(start)


def test_the_reference_is_measured_again_when_the_model_has_changed(network, data, make_guard):
    model, guard = network("top2"), make_guard()
    x = data.validation.images

    def measured():
        head, tail = split(model, NAMES[1])
        reference = guard.reference(model, head, tail, NAMES[1], [])
        torch.testing.assert_close(reference.before.logits, model(x).detach(), rtol=1e-5, atol=1e-5)
        return reference

    first = measured()
    assert measured() is first
    for part in (model.head.weight, model.stages[0].moe.experts.up, model.stem.project.bias):
        with torch.no_grad():
            part.add_(0.1)
        assert measured() is not first
        first = measured()
    other = copy.deepcopy(model)
    other.stages[1].residual = False  # the same weights, another function
    head, tail = split(other, NAMES[1])
    reference = guard.reference(other, head, tail, NAMES[1], [])
    torch.testing.assert_close(reference.before.logits, other(x).detach(), rtol=1e-5, atol=1e-5)


def test_protected_samples_weigh_more_and_count_nowhere(network, data, make_guard):
    model, guard = network("top2"), make_guard(budget=100.0)
    x, right = data.test.images, model(data.test.images).argmax(-1) == data.test.labels
    chosen = right.nonzero().flatten()[:5]
    for i in chosen.tolist():
        guard.protect(x[[i]], data.test.labels[[i]])
    head, tail = split(model, NAMES[1])
    reference = guard.reference(model, head, tail, NAMES[1], [])
    n = len(data.validation)
    assert (len(guard), len(reference)) == (n, n + 5)
    assert reference.importance.tolist() == [1.0] * n + [5.0] * 5
    before, _ = full_pass(model, data.validation.images)
    touched = {NAMES[1]: 0}
    shake(model, touched, 20.0)
    every = torch.ones(n, dtype=torch.bool)
    verdict = guard.judge(tail, reference, touched, model=model, others=every)
    after, _ = full_pass(model, data.validation.images)
    assert verdict.flipped.tolist() == (before != after).nonzero().flatten().tolist()
    y = data.validation.labels
    assert verdict.change.mean == pytest.approx(100 * (int((after == y).sum()) - int((before == y).sum())) / n)
    assert verdict.samples == n
    now, _ = full_pass(model, x[chosen])
    assert verdict.lost == int((now != data.test.labels[chosen]).sum())


def test_tokens_that_cannot_be_told_apart_are_refused(pooled, untouched, user_error):
    class SequenceFirst(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = pooled()

        def forward(self, x):
            x = x.transpose(0, 1)  # (S, B, D): the tokens of a sample are not one block
            return self.inner.head(self.inner.first(x).mean(0))

    guard = Guard([(torch.randn(20, 4, 6), torch.zeros(20))])
    model = SequenceFirst()
    with untouched(model), user_error("'inner.first'", "sample"):
        adapt_one(model, torch.randn(1, 4, 6), 0, layers="inner.first", guard=guard)
        adapt_one(model, torch.randn(1, 4, 6), 1, layers="inner.first", guard=guard)
    twice = pooled()
    twice.second = twice.first
    with untouched(twice), user_error("'first'", "more than once"):
        adapt_one(twice, torch.randn(1, 4, 6), 0, guard=guard)
        adapt_one(twice, torch.randn(1, 4, 6), 1, guard=guard)


@pytest.mark.parametrize(
    "loader",
    [[], [(torch.zeros(0, 3), torch.zeros(0))], [torch.zeros(3)], [(torch.zeros(2, 3), torch.zeros(3))]],
    ids=["nothing", "no samples", "no labels", "lengths"],
)
def test_loaders_that_are_none(loader, user_error):
    with user_error("Guard", "loader"):
        Guard(loader)


BROKEN_LOADERS = {
    "a dataset": (TensorDataset(torch.rand(4, 1, 8, 8), torch.zeros(4)), ("single samples", "DataLoader")),
    "single samples": ([(torch.rand(1, 8, 8), 2)], ("single samples", "DataLoader")),
    "a number": (3, ("int",)),
    "no tensor": ([([1.0], [0])], ("batches (inputs, labels)",)),
    "words": ([(torch.rand(2, 3), ["a", "b"])], ("class numbers", "list", "'a'")),
    "halves": ([(torch.rand(2, 3), torch.tensor([1.0, 1.5]))], ("whole class numbers", "1.5")),
    "one-hot": ([(torch.rand(2, 3), torch.eye(2))], ("batches (inputs, labels)",)),
    "two sizes": ([(torch.rand(2, 3), torch.zeros(2)), (torch.rand(2, 4), torch.zeros(2))], ("(3,) and (4,)",)),
}


@pytest.mark.parametrize("case", BROKEN_LOADERS)
def test_mistakes_in_a_loader_are_named(case, user_error):
    loader, words = BROKEN_LOADERS[case]
    with user_error("Guard", *words):
        Guard(loader)


@pytest.mark.parametrize("labels", [[0, 1], torch.tensor([0.0, 1.0]), torch.tensor([0, 1], dtype=torch.uint8)], ids=str)
def test_whole_labels_of_any_type(labels, user_error):
    guard = Guard([(torch.rand(2, 3), labels)])
    assert guard.labels.tolist() == [0, 1]
    assert guard.labels.dtype == torch.int64
    with user_error("Guard", "whole class numbers", "0.5"):
        guard.protect(torch.rand(1, 3), torch.tensor([0.5]))
    assert len(Guard(DataLoader(TensorDataset(torch.rand(4, 3), torch.zeros(4)), batch_size=3))) == 4


@pytest.mark.parametrize("arguments", [{"budget": -0.1}, {"budget": math.nan}, {"max_flips": -1}], ids=str)
def test_bounds_that_are_none(arguments, user_error):
    with user_error("Guard", "negative"):
        Guard([(torch.zeros(1, 3), torch.zeros(1))], **arguments)


def by_formula(gained, lost, n):
    """Agresti and Min 2005: half a pair added to each cell of the 2 x 2 table, then Wald."""
    b, c, total = lost + 0.5, gained + 0.5, n + 2.0
    d = (c - b) / total
    half = 1.959964 * math.sqrt(((b + c) / total - d * d) / total)
    return 100 * (gained - lost) / n, 100 * (d - half), 100 * (d + half)


@given(data=st.data(), n=st.integers(1, 5000))
def test_accuracy_change_is_the_formula(data, n):
    gained = data.draw(st.integers(0, n))
    lost = data.draw(st.integers(0, n - gained))
    step = torch.cat([torch.ones(gained), -torch.ones(lost), torch.zeros(min(3, n - gained - lost))]).int()
    found = accuracy_change(step[torch.randperm(len(step))], n)
    assert (found.mean, found.low, found.high) == pytest.approx(by_formula(gained, lost, n), abs=1e-9)
    assert found.low < found.mean < found.high
    assert (found.gained, found.lost, found.samples) == (gained, lost, n)
    mirrored = accuracy_change(-step, n)
    assert (mirrored.low, mirrored.high) == pytest.approx((-found.high, -found.low))


def test_no_samples_are_no_answer():
    found = accuracy_change(torch.zeros(0), 0)
    assert all(math.isnan(value) for value in (found.mean, found.low, found.high))
    assert found.samples == 0
