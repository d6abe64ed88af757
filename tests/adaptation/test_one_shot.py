"""One-shot trials against a plain loop: full forwards, no caching, each correction on a copy of the model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from grids import one_of_each
from torch.nn import functional as F

from spectralmoe.adaptation import Rule, adapt_one, carried, one_shot_trials, rotated

LAYERS = {"all": (0, 1), "last": (1,)}


def accuracy_by_class(model, data):
    with torch.no_grad():
        return model(data.test.images).argmax(-1) == data.test.labels


def copies_right(model, image, label):
    """The share of right copies of each kind, the copies built anew and asked one at a time."""
    noise = torch.randn(32, *image.shape, generator=torch.Generator().manual_seed(0))
    mean = image.mean()
    copies = {
        "noisy": image + 0.1 * noise,
        "shifted_two": shifts(image, 2),
        "rotated": rotated(image[None], [-10, 10]),
        "contrast": [mean + f * (image - mean) for f in (0.7, 1.3)],
        "shifted_one": shifts(image, 1),
    }
    with torch.no_grad():
        return {
            kind: sum(int(model(one[None]).argmax()) == label for one in many) / len(many)
            for kind, many in copies.items()
        }


def shifts(image, by):
    """All shifts by so many pixels, the edge repeated."""
    wide = torch.cat([image[:, :1]] * by + [image] + [image[:, -1:]] * by, 1)
    wide = torch.cat([wide[:, :, :1]] * by + [wide] + [wide[:, :, -1:]] * by, 2)
    places = [(i * by, j * by) for i in range(3) for j in range(3) if (i, j) != (1, 1)]
    return [wide[:, i : i + 8, j : j + 8] for i, j in places]


def descend(model, image, label, rule):
    """Plain descent on all experts of the layers, or on everything from the first of them on."""
    model = copy.deepcopy(model)
    stages = [model.stages[i] for i in LAYERS[rule.layers]]
    if rule.scope == "all-experts":
        own = [p for stage in stages for p in stage.moe.experts.parameters()]
    else:
        own = [p for part in (*stages, model.norm, model.head) for p in part.parameters()]
    for step in range(rule.max_steps + 1):
        logits = model(image[None])
        if int(logits.argmax()) == label:
            return model, step, True
        if step == rule.max_steps:
            return model, step, False
        model.zero_grad()
        F.cross_entropy(logits, torch.tensor([label])).backward()
        with torch.no_grad():
            for parameter in own:
                if parameter.grad is not None:
                    parameter -= rule.lr * parameter.grad
    raise AssertionError


RULES = {
    "sgd": Rule(),
    "last": Rule("last", lr=2e-2),
    "few steps": Rule("all", 1e-4, 3),
    "margin": Rule("last", method="margin"),
    "low_rank": Rule("last", method="low_rank"),
    "copies": Rule("last", 2e-2, augment=lambda x: torch.cat([x + 0.05, x - 0.05])),
    "experts": Rule("all", 1e-2, scope="all-experts"),
    "last experts": Rule("last", 1e-2, method="sgd", scope="all-experts"),
    "parameters": Rule("all", 1e-2, scope="all-parameters"),
    "last parameters": Rule("last", 1e-2, scope="all-parameters"),
    "few steps for all": Rule("last", 1e-6, 2, scope="all-parameters"),
}


@one_of_each(name=["top2", "soft"], case=RULES)
def test_trials_are_the_plain_loop(network, data, make_guard, untouched, name, case):
    model, rule = network(name).train(), RULES[case]
    guard = make_guard(budget=1.0) if rule.method == "low_rank" else None
    with untouched(model):
        trials = one_shot_trials(model, data.test.images, data.test.labels, trials=2, rule=rule, guard=guard, seed=1)
    model.eval()
    right = accuracy_by_class(model, data)
    assert len({trial.sample for trial in trials}) == 2
    for trial in trials:
        assert not right[trial.sample]
        image, label = data.test.images[trial.sample], int(data.test.labels[trial.sample])
        if rule.scope == "one-expert":
            changed = copy.deepcopy(model)
            update = adapt_one(
                changed,
                image[None],
                label,
                layers=rule.layers,
                method=rule.method,
                lr=rule.lr,
                max_steps=rule.max_steps,
                guard=guard,
                augment=rule.augment,
            )
            success, steps = update.success, update.steps
            assert (trial.touched, trial.method) == (update.touched, update.method)
            assert trial.change == pytest.approx(update.change, rel=1e-5)
        else:
            changed, steps, success = descend(model, image, label, rule)
            changed = changed if success else model
            norm = sum(
                float((a.detach() - b.detach()).double().square().sum())
                for a, b in zip(changed.parameters(), model.parameters(), strict=True)
            )
            assert trial.change == pytest.approx(norm**0.5, rel=1e-3, abs=1e-9)
            assert trial.touched == {}
        assert (trial.success, trial.steps) == (success, steps)
        after = accuracy_by_class(changed, data)
        others = torch.arange(len(right)) != trial.sample
        expected = 100 * float(after[others].double().mean() - right[others].double().mean())
        assert trial.interference == pytest.approx(expected, abs=1e-6)
        assert trial.before == pytest.approx(copies_right(model, image, label))
        assert trial.after == pytest.approx(copies_right(changed, image, label))


def test_all_experts_of_a_model_without_split_are_those_of_the_layers(pooled):
    """ "last" leaves the experts of the first layer alone there too."""
    model = pooled()
    x = torch.randn(12, 4, 6)
    y = model(x).argsort(dim=-1)[:, -2]
    found = one_shot_trials(model, x, y, trials=2, rule=Rule("last", 0.1, scope="all-experts"))
    for trial in found:
        by_hand = copy.deepcopy(model)
        for step in range(201):
            logits = by_hand(x[[trial.sample]])
            if int(logits.argmax()) == int(y[trial.sample]) or step == 200:
                break
            by_hand.zero_grad()
            F.cross_entropy(logits, y[[trial.sample]]).backward()
            with torch.no_grad():
                for parameter in by_hand.second.experts.parameters():
                    parameter -= 0.1 * parameter.grad
        norm = sum(
            float((a.detach() - b.detach()).double().square().sum())
            for a, b in zip(by_hand.parameters(), model.parameters(), strict=True)
        )
        assert trial.success
        assert trial.steps == step
        assert trial.change == pytest.approx(norm**0.5, rel=1e-3)
        assert trial.before.keys() == trial.after.keys() == {"noisy"}


def test_trials_are_those_of_the_seed(network, data):
    first, again, other = (
        one_shot_trials(network("top2"), data.test.images, data.test.labels, trials=2, rule=Rule("last", 5e-2), seed=s)
        for s in (0, 0, 5)
    )
    assert [t.sample for t in first] == [t.sample for t in again]
    assert [t.sample for t in first] != [t.sample for t in other]


def test_all_mistakes_where_there_are_fewer(network, data, wrong):
    model = network("top2")
    images, labels = data.test.images[:40], data.test.labels[:40]
    mistakes = [i for i in wrong(model, 1000) if i < 40]
    trials = one_shot_trials(model, images, labels, trials=1000, rule=Rule("last", 5e-2))
    assert sorted(trial.sample for trial in trials) == mistakes


@pytest.mark.parametrize("scope", ["one-expert", "all-experts", "all-parameters"])
def test_a_broken_measurement_restores_the_model(network, data, untouched, monkeypatch, scope):
    from spectralmoe.adaptation import one_shot

    model, calls, real = network("top2"), [], one_shot._carries

    def broken(*args, **kwargs):
        calls.append(args)
        if len(calls) == 2:  # with the model corrected
            raise KeyboardInterrupt
        return real(*args, **kwargs)

    monkeypatch.setattr(one_shot, "_carries", broken)
    with untouched(model), pytest.raises(KeyboardInterrupt):
        one_shot_trials(model, data.test.images, data.test.labels, rule=Rule(scope=scope, lr=0.05))


def test_carried_counts_copies(network, data):
    model = network("soft")
    for i in range(3):
        found = carried(model, data.test.images[[i]], data.test.labels[[i]])
        expected = copies_right(model, data.test.images[i], int(data.test.labels[i]))
        assert found == pytest.approx(expected)


def test_carried_of_a_model_with_an_object_of_logits():
    def model(x):
        return SimpleNamespace(logits=torch.eye(3)[x.flatten(1).sum(1).round().long().clamp(0, 2)])

    found = carried(model, torch.tensor([[0.0, 2.0]]), torch.tensor([2]))
    assert found == {"noisy": 1.0}


def test_rules_that_do_not_fit(user_error):
    with user_error("scope", "'some'", "all-experts"):
        Rule(scope="some")
    with user_error("method", "'sdg'"):
        Rule(method="sdg")
    with user_error("step size", "-1"):
        Rule(lr=-1)
    with user_error("all-experts", "'margin'"):
        Rule(scope="all-experts", method="unit")
    with user_error("all-parameters", "copies"):
        Rule(scope="all-parameters", augment=lambda x: x)
