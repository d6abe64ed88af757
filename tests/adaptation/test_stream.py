"""A stream of corrections against a plain loop that evaluates the whole model after each."""

from __future__ import annotations

import copy
from itertools import pairwise

import pytest
import torch
from grids import one_of_each

from spectralmoe.adaptation import Guard, Rule, adapt_one, carried, correction_stream

RULES = {
    "sgd": Rule("last", 2e-2),
    "all": Rule("all", 2e-2),
    "few steps": Rule("last", 1e-5, 2),
    "guard": Rule("last", 2e-2, method="low_rank"),
}


@one_of_each(name=["top2", "soft"], case=RULES)
def test_the_stream_is_the_plain_loop(network, data, make_guard, name, case):
    rule, model = RULES[case], network(name).train()
    by_hand = network(name)
    x, y = data.test.images, data.test.labels
    before = by_hand(x).argmax(-1) == y
    guards = [make_guard(budget=1.0) for _ in "ab"] if case == "guard" else [None, None]
    shares = []
    steps = correction_stream(model, x, y, count=4, rule=rule, guard=guards[0], seed=3, progress=shares.append)
    assert shares == [0.25, 0.5, 0.75, 1.0]
    assert model.training
    stream = [step.sample for step in steps]
    assert len(set(stream)) == 4
    assert not before[stream].any()
    others = [i for i in range(len(y)) if i not in stream]
    made = []
    for step in steps:
        i = step.sample
        update = adapt_one(
            by_hand,
            x[[i]],
            y[[i]],
            layers=rule.layers,
            method=rule.method,
            lr=rule.lr,
            max_steps=rule.max_steps,
            guard=guards[1],
        )
        if update.success:
            made.append(i)
            if guards[1] is not None:
                guards[1].protect(x[[i]], y[[i]])
        with torch.no_grad():
            right = [int(a) == int(b) for a, b in zip(by_hand(x).argmax(-1), y, strict=True)]
        assert (step.success, step.method, step.touched) == (update.success, update.method, update.touched)
        assert step.accuracy == pytest.approx(100 * sum(right[j] for j in others) / len(others))
        assert step.kept == pytest.approx(sum(right[j] for j in made) / len(made) if made else 1.0)
        assert step.after == carried(by_hand, x[[i]], y[[i]])
    for a, b in zip(model.state_dict().values(), by_hand.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    if case == "few steps":
        assert not any(step.success for step in steps)
    elif case != "guard":
        assert made
    if guards[0] is not None:
        assert len(guards[0].protected) == len(made)


def test_what_an_earlier_correction_made_right_needs_none(network, data, wrong):
    """The same image twice among the samples."""
    model = network("soft")
    i = wrong(model, 1)[0]
    right = (model(data.test.images).argmax(-1) == data.test.labels).nonzero().flatten()[:20].tolist()
    picked = [i, i, *right]
    first, second = correction_stream(model, data.test.images[picked], data.test.labels[picked], rule=Rule(lr=0.05))
    assert first.success
    assert first.touched
    assert (second.success, second.touched, second.kept) == (True, {}, 1.0)


def test_the_order_is_that_of_the_seed(network, data):
    orders = [
        [
            step.sample
            for step in correction_stream(
                network("top2"), *images_of(data), count=3, rule=Rule("last", 5e-2), seed=seed
            )
        ]
        for seed in (0, 0, 1)
    ]
    assert orders[0] == orders[1] != orders[2]


def images_of(data):
    return data.test.images, data.test.labels


def test_a_guard_weighs_each_update_against_the_model_as_it_is_then(network, data):
    """Each update stays within the budget of the state before it."""
    model = network("soft")
    x, y = data.validation.images, data.validation.labels
    guard = Guard([(x, y)], budget=0.6)
    found = [copy.deepcopy(model)]
    correction_stream(
        model,
        *images_of(data),
        count=5,
        rule=Rule("last", 5e-2),
        guard=guard,
        progress=lambda share: found.append(copy.deepcopy(model)),
    )
    accuracies = [100 * float((m.eval()(x).argmax(-1) == y).double().mean()) for m in found]
    assert all(after >= before - 0.6 - 1e-9 for before, after in pairwise(accuracies))
