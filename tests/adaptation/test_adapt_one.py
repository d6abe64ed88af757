"""adapt_one against a plain reading of the protocol, and what it may never do to a model."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
from grids import first_of, one_of_each
from torch import nn
from torch.nn import functional as F

from spectralmoe import UserError, record
from spectralmoe.adaptation import METHODS, Guard, adapt_one
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE

LAYERS = {
    "all": ["stages.0.moe", "stages.1.moe"],
    "last": ["stages.1.moe"],
    "name": ["stages.0.moe"],
}


def used_experts(model, x):
    """In each layer the expert with the largest weight, summed over all tokens one number at a time."""
    with record(model) as tape:
        model(x)
    found = {}
    for item in tape:
        total = [0.0] * item.routing.num_experts
        for experts, weights in zip(item.routing.indices.tolist(), item.routing.weights.tolist(), strict=True):
            for e, w in zip(experts, weights, strict=True):
                if e >= 0:
                    total[e] += w
        found[item.name] = total.index(max(total))
    return found


def expert_tensors(model, used):
    """(parameter, index): the slice of each that belongs to the used expert."""
    for layer, e in used.items():
        bank = model.get_submodule(layer).experts
        inside = getattr(bank, "experts", None)
        for parameter in (bank if inside is None else inside[e]).parameters():
            yield parameter, (e if inside is None else ...)


def by_hand(model, x, y, layers, lr, max_steps):
    """The protocol on a copy: full forwards, backward, plain gradient steps on the used experts' slices."""
    model = copy.deepcopy(model).eval()
    used = {name: e for name, e in used_experts(model, x).items() if name in layers}
    for step in range(max_steps + 1):
        logits = model(x)
        if bool((logits.argmax(-1) == y).all()):
            return model, step, used, True
        if step == max_steps:
            return model, step, used, False
        model.zero_grad()
        F.cross_entropy(logits, y).backward()
        with torch.no_grad():
            for parameter, index in expert_tensors(model, used):
                parameter[index] -= lr * parameter.grad[index]
    raise AssertionError


def equal_weights(model, expected):
    for (name, value), other in zip(model.state_dict().items(), expected.state_dict().values(), strict=True):
        torch.testing.assert_close(value, other, rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.grid(name=["top2", "soft"], layers=["all", "last", "name"], k=[1, 3])
def test_sgd_is_the_protocol_by_hand(network, data, wrong, name, layers, k):
    original = network(name)
    chosen = wrong(original, 2 + k)
    for first in range(2):
        picked = chosen[first : first + k]
        x, y = data.test.images[picked], data.test.labels[picked]
        expected, steps, used, success = by_hand(original, x, y, LAYERS[layers], 2e-2, 40)
        model = network(name)
        wish = layers if layers != "name" else LAYERS["name"]
        update = adapt_one(model, x, y if k > 1 else int(y), layers=wish, lr=2e-2, max_steps=40)
        assert (update.success, update.steps) == (success, steps)
        equal_weights(model, expected if success else original)
        if success:
            assert update.touched == used
            moved = [
                (a.detach().double() - b.detach().double()).square().sum()
                for a, b in zip(expected.parameters(), original.parameters(), strict=True)
            ]
            assert update.change == pytest.approx(float(sum(moved).sqrt()), rel=1e-3)


@one_of_each(kind=["stacked", "modules"], k=[1, 2, None])
def test_sgd_on_a_model_of_sequences_without_split(pooled, kind, k):
    original = pooled(kind, k)
    solved = 0
    for samples, layers in ((1, ["first", "second"]), (1, ["second"]), (2, ["first", "second"]), (2, ["second"])):
        x = torch.randn(samples, 7, 6)
        y = original(x).argsort(dim=-1)[:, -2]
        expected, steps, used, success = by_hand(original, x, y, layers, 0.2, 100)
        model = copy.deepcopy(original)
        update = adapt_one(model, x, y, layers=layers, lr=0.2, max_steps=100)
        assert (update.success, update.steps, update.touched) == (success, steps, used if success else {})
        equal_weights(model, expected if success else original)
        solved += success
    assert solved >= 2


def test_a_sample_may_use_the_same_layer_twice(pooled):
    """The weights of both calls are added up; the tokens are such that neither call alone would choose alike."""
    original = pooled()
    original.second = original.first
    while True:
        x = torch.randn(1, 3, 6)
        with record(original) as tape, torch.no_grad():
            y = original(x).argsort(dim=-1)[:, -2]
        first, second = (
            torch.zeros(3).scatter_add(0, item.routing.indices.flatten(), item.routing.weights.flatten())
            for item in tape
        )
        e = int((first + second).argmax())
        if e not in (int(first.argmax()), int(second.argmax())):
            break
    update = adapt_one(original, x, y, layers="all", lr=0.1)
    assert update.success
    assert update.touched == {"first": e}


def test_weights_that_are_not_contiguous_get_their_own_gradient(pooled):
    original = pooled("modules")
    for layer in moe_layers(original).values():
        for expert in layer.experts.experts:
            for linear in (expert[0], expert[2]):
                linear.weight = nn.Parameter(linear.weight.detach().T.contiguous().T)
    x = torch.randn(1, 5, 6)
    y = original(x).argsort(dim=-1)[:, -2]
    expected, steps, _, success = by_hand(original, x, y, ["second"], 0.2, 100)
    update = adapt_one(original, x, y, lr=0.2)
    assert (update.success, update.steps) == (success, steps)
    equal_weights(original, expected)


def with_frozen_parameters(model):
    for index, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(index % 3 == 0)
    return model.train()


@one_of_each(name=["top2", "soft"], method=METHODS)
def test_nothing_but_the_touched_experts_changes(network, data, wrong, make_guard, snapshot, changed, name, method):
    model = with_frozen_parameters(network(name))
    modes = [module.training for module in model.modules()]
    flags = [parameter.requires_grad for parameter in model.parameters()]
    guard = make_guard(budget=100.0)
    sample = wrong(network(name), 1)[0]
    before = snapshot(model)
    update = adapt_one(
        model, data.test.images[[sample]], data.test.labels[[sample]], layers="all", method=method, guard=guard
    )
    assert update.success
    assert update.touched
    allowed = {
        f"{layer}.experts.{part}[{e}]"
        for layer, e in update.touched.items()
        for part in ("up", "down", "up_bias", "down_bias")
    }
    found = set(changed(model, before))
    assert found
    assert found <= allowed
    assert {entry.rsplit(".", 2)[0] for entry in found} == set(update.touched)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert all(parameter.grad is None for parameter in model.parameters())
    model.eval()
    assert int(model(data.test.images[[sample]]).argmax()) == int(data.test.labels[sample])


@pytest.mark.parametrize("method", ["sgd", "margin"])
def test_a_bank_of_modules_changes_one_module(pooled, snapshot, changed, method):
    model = with_frozen_parameters(pooled("modules"))
    flags = [parameter.requires_grad for parameter in model.parameters()]
    x = torch.randn(1, 4, 6)
    y = int(model(x).argsort(dim=-1)[0, -2])
    before = snapshot(model)
    update = adapt_one(model, x, y, layers="all", method=method, lr=0.1)
    assert update.success
    prefixes = tuple(f"{layer}.experts.experts.{e}." for layer, e in update.touched.items())
    found = changed(model, before)
    assert found
    assert all(name.startswith(prefixes) for name in found)
    assert model.training
    assert [parameter.requires_grad for parameter in model.parameters()] == flags


class Answer(nn.Module):
    def __init__(self, model, wrap):
        super().__init__()
        self.model, self.wrap = model, wrap

    def forward(self, x):
        return self.wrap(self.model(x))


def test_a_model_that_returns_an_object_with_logits(pooled):
    plain = pooled()
    x = torch.randn(1, 4, 6)
    y = int(plain(x).argsort(dim=-1)[0, -2])
    wrapped = Answer(pooled(), lambda logits: SimpleNamespace(logits=logits))
    one, two = adapt_one(plain, x, y, lr=0.1), adapt_one(wrapped, x, y, lr=0.1)
    assert one.success
    assert two.success
    assert two.touched == {f"model.{name}": e for name, e in one.touched.items()}
    for a, b in zip(plain.parameters(), wrapped.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("method", METHODS)
def test_what_is_right_already_is_left_alone(network, data, make_guard, untouched, method):
    model = network("top2")
    right = (model(data.test.images).argmax(-1) == data.test.labels).nonzero().flatten()[:3]
    with untouched(model):
        update = adapt_one(
            model, data.test.images[right], data.test.labels[right], method=method, guard=make_guard(budget=0)
        )
        assert (update.success, update.steps, update.touched, update.change) == (True, 0, {}, 0)
        update.revert()


@pytest.mark.parametrize("method", ["sgd", "margin", "null_space", "low_rank"])
def test_too_few_steps_leave_the_model_as_it_was(network, data, wrong, untouched, make_guard, method):
    model = network("top2").train()
    x, y = data.test.images[wrong(network("top2"), 6)], data.test.labels[wrong(network("top2"), 6)]
    guard = make_guard() if method in ("null_space", "low_rank") else None
    with untouched(model):
        update = adapt_one(model, x, y, method=method, lr=1e-6, max_steps=0, guard=guard)
        assert not update.success
        assert update.touched == {}
        assert update.change == 0
        assert any("did not become right" in reason for reason in update.tried)


def test_weights_that_run_away_leave_the_model_as_it_was(network, data, wrong, untouched):
    model = network("top2")
    picked = wrong(model, 6)
    with untouched(model):
        assert not adapt_one(model, data.test.images[picked], data.test.labels[picked], lr=1e30).success


WRONG_CALLS = {
    "label": (("10", "0 to 9"), {"y": 10}),
    "negative": (("-1", "0 to 9"), {"y": -1}),
    "no whole number": (("adapt_one", "whole class numbers", "1.5"), {"y": 1.5}),
    "not a number": (("adapt_one", "whole class numbers", "nan"), {"y": float("nan")}),
    "endless": (("adapt_one", "whole class numbers", "inf"), {"y": torch.tensor([float("inf")])}),
    "a word": (("adapt_one", "class numbers", "str", "'x'"), {"y": "x"}),
    "nothing": (("adapt_one", "class numbers", "NoneType"), {"y": None}),
    "method": (("method", "'sdg'", "unit"), {"method": "sdg"}),
    "layer": (("layer", "'stages.9.moe'", "stages.1.moe", "last"), {"layers": "stages.9.moe"}),
    "one of two layers": (("layer", "'moe'"), {"layers": ["stages.1.moe", "moe"]}),
    "no layers": (("layer", "stages.1.moe"), {"layers": []}),
    "empty": (("0 samples",), {"x": torch.zeros(0, 1, 8, 8), "y": torch.zeros(0).long()}),
    "count": (("1 samples", "2"), {"y": torch.tensor([1, 2])}),
    "zero lr": (("step size", "0"), {"lr": 0.0}),
    "infinite lr": (("step size", "inf"), {"lr": float("inf")}),
    "nan lr": (("step size", "nan"), {"lr": float("nan")}),
    "steps": (("max_steps", "-1"), {"max_steps": -1}),
    "no guard": (("guard", "low_rank"), {"method": "low_rank"}),
    "copies": (("augment", "3", "2"), {"x": torch.zeros(2, 1, 8, 8), "y": torch.tensor([1, 2]), "augment": "three"}),
}


@pytest.mark.parametrize("case", WRONG_CALLS)
def test_mistakes_are_named_and_cost_nothing(network, data, untouched, user_error, case):
    words, arguments = WRONG_CALLS[case]
    call = {"x": data.test.images[:1], "y": 3, **arguments}
    if "augment" in call:
        call["augment"] = lambda x: torch.cat([x, x[:1]])
    model = network("top2").train()
    with untouched(model), user_error(*words):
        adapt_one(model, call.pop("x"), call.pop("y"), **call)


@pytest.mark.parametrize(
    "wrap", [lambda z: (z,), lambda z: z[:, None], lambda z: z[:0], lambda z: SimpleNamespace(logits=None)]
)
def test_a_model_that_gives_no_logits(pooled, untouched, user_error, wrap):
    model = Answer(pooled(), wrap)
    with untouched(model), user_error("logits (B, C)"):
        adapt_one(model, torch.randn(2, 4, 6), torch.tensor([0, 1]))


def test_a_model_without_experts(user_error):
    with user_error("MoE"):
        adapt_one(nn.Linear(3, 3), torch.zeros(1, 3), 0)


def test_a_bank_that_cannot_be_adapted_alone(pooled, untouched, user_error, monkeypatch):
    model, x = pooled(), torch.randn(1, 4, 6)
    monkeypatch.setattr(type(model.second.experts), "expert_parameters", lambda self, e: {})
    with untouched(model), user_error("'second'", "FeedForward", "cannot be adapted alone"):
        adapt_one(model, x, int(model(x).argmin()))


class Stop(Exception):
    """Raised by a test."""


def failing(error, call):
    """A forward of MoE that raises at its n-th call."""
    state, forward = {"calls": 0}, MoE.forward

    def run(self, *args, **kwargs):
        state["calls"] += 1
        if state["calls"] == call:
            raise error
        return forward(self, *args, **kwargs)

    return run, state


@pytest.mark.parametrize(
    "case",
    first_of(4, [("margin", False), *((method, True) for method in reversed(METHODS)), ("sgd", False)]),
    ids=str,
)
def test_an_exception_anywhere_leaves_the_model_as_it_was(
    network, data, wrong, make_guard, untouched, monkeypatch, case
):
    method, guarded = case
    model = network("top2").train()
    picked = wrong(network("top2"), 2)
    x, y = data.test.images[picked], data.test.labels[picked]

    def correct(module):
        guard = make_guard(budget=0.0, max_flips=0) if guarded else None  # refuses: all methods and scales run
        arguments = {"layers": "last" if guarded else "all", "max_steps": 10, "augment": lambda x: x + 0.01}
        return adapt_one(module, x, y, method=method, guard=guard, **arguments)

    run, state = failing(None, -1)
    with monkeypatch.context() as patch:
        patch.setattr(MoE, "forward", run)
        correct(copy.deepcopy(model))
    calls = state["calls"]
    points = [n for n in (1, 2, 3, 5, *range(8, calls - 1, max(calls // 3, 1)), calls) if n <= calls]
    with untouched(model):
        for index, call in enumerate(points):
            error = (Stop, KeyboardInterrupt)[index % 2]
            with monkeypatch.context() as patch:
                patch.setattr(MoE, "forward", failing(error(), call)[0])
                with pytest.raises(error):
                    correct(model)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_call_gives_the_same_bits(network, data, wrong, make_guard, method):
    sample = wrong(network("soft"), 1)[0]
    states = []
    for seed in range(2):
        model = network("soft")
        torch.manual_seed(seed)
        update = adapt_one(
            model,
            data.test.images[[sample]],
            int(data.test.labels[sample]),
            method=method,
            guard=make_guard(budget=100.0),
        )
        assert update.success
        states.append(model.state_dict())
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


@pytest.mark.parametrize("k", [1, 2])
def test_copies_count_as_much_as_the_samples(network, data, wrong, k):
    """Steps on (CE of the samples + CE of the copies) / 2, on a copy, by hand."""
    original = network("soft")
    chosen = wrong(original, 1)
    if k == 2:  # and one of another class that is right
        right = (original(data.test.images).argmax(-1) == data.test.labels) & (
            data.test.labels != data.test.labels[chosen]
        )
        chosen += right.nonzero()[0].tolist()
    x, y = data.test.images[chosen], data.test.labels[chosen]

    def augment(z):
        return torch.cat([torch.stack([one + 0.1, one - 0.1, one.flip(-1)]) for one in z])

    expected = copy.deepcopy(original)
    e = used_experts(expected, x)["stages.1.moe"]
    labels = torch.tensor([label for label in y.tolist() for _ in range(3)])
    steps = 0
    while steps < 80:
        logits, others = expected(x), expected(augment(x))
        if (logits.argmax(-1) == y).all() and (others.argmax(-1) == labels).double().mean() >= 0.5:
            break
        expected.zero_grad()
        (F.cross_entropy(logits, y) / 2 + F.cross_entropy(others, labels) / 2).backward()
        with torch.no_grad():
            for parameter in expected.stages[1].moe.experts.parameters():
                parameter[e] -= 0.05 * parameter.grad[e]
        steps += 1
    model = network("soft")
    update = adapt_one(model, x, y, lr=0.05, max_steps=80, augment=augment, carry=0.5)
    assert update.success
    assert update.steps == steps
    equal_weights(model, expected)


def test_a_guard_of_other_errors_is_named(user_error):
    with user_error("budget", "-1"):
        Guard([(torch.zeros(1, 2), torch.zeros(1))], budget=-1)
    with pytest.raises(UserError, match="budget"):
        Guard([(torch.zeros(1, 2), torch.zeros(1))], budget=float("nan"))
