"""A class that training never saw: against a plain loop on copies."""

from __future__ import annotations

import copy

import pytest
import torch

from spectralmoe.adaptation import Rule, adapt_one, add_class, new_class

NEW = 3


def shortfall(model, images):
    """By how much the class misses being the answer."""
    with torch.no_grad():
        logits = model(images)
    return logits.index_fill(1, torch.tensor([NEW]), -torch.inf).amax(1) - logits[:, NEW]


@pytest.fixture(scope="module")
def without(network, data):
    """A network that seldom answers the class: its logit is shifted so that half of its images miss by over 0.5."""

    def make(name):
        model = network(name)
        missing = shortfall(model, data.train.images[data.train.labels == NEW]).median()
        with torch.no_grad():
            model.head.bias[NEW] += missing - 0.5
        return model

    return make


def support_of(model, data):
    """Images of the class that miss it, by a distance that a few steps go."""
    images = data.train.images[data.train.labels == NEW]
    missing = shortfall(model, images)
    support = images[(missing > 0.1) & (missing < 1)]
    assert len(support) >= 5
    return support


@pytest.mark.parametrize(
    ("rule", "shots"),
    [(Rule("last", 2e-2), 1), (Rule("all", 5e-2), 4), (Rule("last", 1e-6, 1), 2), (Rule("last", method="margin"), 3)],
    ids=["one", "four", "few steps", "margin"],
)
@pytest.mark.parametrize("name", ["top2", "soft"])
def test_tries_are_the_plain_loop(without, data, untouched, name, rule, shots):
    model = without(name)
    support = support_of(model, data)
    model.train()
    x, y = data.test.images, data.test.labels
    with untouched(model):
        found = add_class(model, support, x, y, NEW, shots=shots, tries=3, rule=rule, seed=2)
    model.eval()
    assert len(found) == 3
    assert len({result.samples for result in found}) > 1
    own = y == NEW

    def percent(network, chosen):
        with torch.no_grad():
            return 100 * float((network(x).argmax(-1) == y)[chosen].double().mean())

    for result in found:
        assert result.shots == len(set(result.samples)) == shots
        changed = copy.deepcopy(model)
        update = adapt_one(
            changed,
            support[list(result.samples)],
            torch.full((shots,), NEW),
            layers=rule.layers,
            method=rule.method,
            lr=rule.lr,
            max_steps=rule.max_steps,
        )
        assert (result.success, result.method) == (update.success, update.method)
        assert result.before == pytest.approx(percent(model, own))
        assert result.accuracy == pytest.approx(percent(changed, own))
        assert result.interference == pytest.approx(percent(changed, ~own) - percent(model, ~own))
        if not result.success:
            assert (result.accuracy, result.interference) == (result.before, 0)
    assert any(result.success for result in found) == (rule.max_steps > 1)


def test_what_is_shown_carries_to_the_rest_of_the_class(without, data):
    model, rule = without("soft"), Rule("last", method="margin")
    support = support_of(model, data)
    found = add_class(model, support, data.test.images, data.test.labels, NEW, shots=3, tries=4, rule=rule)
    solved = [result for result in found if result.success]
    assert len(solved) >= 2
    assert sum(result.accuracy - result.before for result in solved) > 5 * len(solved)


def test_a_broken_measurement_restores_the_model(without, data, untouched, monkeypatch):
    model, calls, real = without("soft"), [], new_class.predict

    def broken(*args):
        calls.append(args)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(new_class, "predict", broken)
    support = data.train.images[data.train.labels == NEW]
    with untouched(model), pytest.raises(KeyboardInterrupt):
        add_class(model, support, data.test.images, data.test.labels, NEW, shots=1, rule=Rule(lr=0.05))


def test_mistakes_are_named(without, data, untouched, user_error):
    model, x, y = without("top2"), data.test.images, data.test.labels
    support = data.train.images[:3]
    with untouched(model):
        with user_error("4 shots", "3 images"):
            add_class(model, support, x, y, NEW, shots=4)
        with user_error("no test image", "3"):
            add_class(model, support, x[y != NEW], y[y != NEW], NEW, shots=2)
        with user_error("0 samples"):
            add_class(model, support, x, y, NEW, shots=0)
        with user_error("label 10", "0 to 9"):
            add_class(model, support, x, y + 1, 10, shots=1)
