"""A correction where surroundings could falsify it: inference mode, autocast, precision, wrappers, moving models."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, Router, TopK
from spectralmoe.adaptation import (
    METHODS,
    Guard,
    Rule,
    adapt_one,
    add_class,
    apply_update,
    correction_stream,
    make_receipt,
    one_shot_trials,
)
from spectralmoe.adaptation.samples import same_sample

D, CLASSES = 6, 4


class Net(nn.Module):
    """Vectors (B, D) -> logits, with a place for what a test puts before the head."""

    def __init__(self, bank=None, between=None, dtype=None):
        super().__init__()
        bank = FeedForward(4, D, 8, bias=True, spare=2) if bank is None else bank
        self.moe, self.between = MoE(Router(LinearScorer(D, 4), TopK(2)), bank), between or nn.Identity()
        self.head = nn.Linear(D, CLASSES)
        self.to(dtype or torch.float32).eval()

    def forward(self, x):
        return self.head(self.between(x + self.moe(x)))


def other_class(model, x):
    """The second likeliest class of each sample."""
    with torch.no_grad():
        return model(x).argsort(dim=-1)[:, -2]


def guard_of(model, x, budget=100.0):
    with torch.no_grad():
        return Guard([(x, model(x).argmax(-1))], budget=budget)


def test_under_inference_mode_as_outside_it(untouched, tmp_path):
    model, x, data = Net(), torch.randn(1, D), torch.randn(80, D)
    y = other_class(model, x)
    plain = adapt_one(model, x, y, guard=guard_of(model, data), method="unit")
    assert plain.success
    after = copy.deepcopy(model.state_dict())
    plain.revert()
    with untouched(model), torch.inference_mode():
        guard = guard_of(model, data.clone())
        update = adapt_one(model, x.clone(), y.clone(), guard=guard, method="unit")
        torch.testing.assert_close(dict(model.state_dict()), dict(after))
        make_receipt(model, x.clone(), int(y), update, guard=guard, test=(data, guard.labels))
        update.save(tmp_path / "update")
        update.revert()
        applied = apply_update(model, tmp_path / "update")
        guard.protect(x.clone(), y.clone())
        adapt_one(model, -x, other_class(model, -x), guard=guard, method="unit").revert()
        applied.revert()
        labels = other_class(model, data)
        for scope in ("one-expert", "all-experts", "all-parameters"):
            assert len(one_shot_trials(model, data, labels, trials=2, rule=Rule(lr=0.1, scope=scope))) == 2
        add_class(model, data, data, labels, int(labels[0]), shots=2, tries=1, rule=Rule(lr=0.1))
    with torch.inference_mode():
        assert len(correction_stream(model, data, labels, count=2, rule=Rule(lr=0.1), guard=guard)) == 2
    assert not any(parameter.is_inference() for parameter in model.parameters())


def test_weights_made_under_inference_mode_are_refused(user_error, tmp_path):
    model, x = Net(), torch.randn(1, D)
    update = adapt_one(model, x, other_class(model, x), lr=0.1)
    update.save(tmp_path / "update")
    with torch.inference_mode():
        made = Net()
        made.load_state_dict(model.state_dict())
    with user_error("inference_mode", "load it outside"):
        adapt_one(made, x, 0)
    with user_error("inference_mode", "load it outside"):
        apply_update(made, tmp_path / "update")


def linears():
    return ModuleExperts([nn.Linear(D, D) for _ in range(4)])


@pytest.mark.parametrize(
    "bank", [linears, lambda: FeedForward(4, D, 8, bias=True, spare=2)], ids=["modules", "stacked"]
)
def test_autocast_keeps_no_old_weights(bank):
    """Autocast casts a parameter once; what is written after that must be seen, in steps, verdict and receipt."""
    model, x, data = Net(bank()), torch.randn(1, D), torch.randn(100, D)
    y = other_class(model, x)
    with torch.autocast("cpu", torch.bfloat16):
        model(x)  # fills the cache
        guard = guard_of(model, data)
        before = model(data).argmax(-1)
        update = adapt_one(model, x, y, guard=guard, lr=0.2)
        receipt = make_receipt(model, x, int(y), update, guard=guard, test=(data, guard.labels))
    assert update.success
    with torch.autocast("cpu", torch.bfloat16):
        assert int(model(x).argmax()) == int(y)
        after = model(data).argmax(-1)
    assert update.verdict.flipped.tolist() == (before != after).nonzero().flatten().tolist()
    assert [flip.index for flip in receipt.test.flipped] == update.verdict.flipped.tolist()
    assert receipt.before.prediction != receipt.after.prediction == int(y)


@pytest.mark.parametrize("method", METHODS)
def test_double_precision(method):
    model, x, data = Net(dtype=torch.float64), torch.randn(1, D).double(), torch.randn(100, D).double()
    y = other_class(model, x)
    before = model(data).argmax(-1)
    update = adapt_one(model, x, y, guard=guard_of(model, data), method=method, lr=0.2)
    assert update.success
    assert int(model(x).argmax()) == int(y)
    flipped = (model(data).argmax(-1) != before).nonzero().flatten()
    assert update.verdict.flipped.tolist() == flipped.tolist()
    assert all(value.dtype == torch.float64 for value in model.state_dict().values())


def test_frozen_parameters_are_written_and_stay_frozen():
    model, x = Net().requires_grad_(False), torch.randn(1, D)
    y = other_class(model, x)
    update = adapt_one(model, x, y, lr=0.2)
    assert update.success
    assert not any(parameter.requires_grad for parameter in model.parameters())


def test_wrapped_by_ddp(one_process):
    model, x, data = Net(), torch.randn(1, D), torch.randn(60, D)
    plain, y = copy.deepcopy(model), other_class(model, x)
    wrapped = nn.parallel.DistributedDataParallel(model)
    updates = [adapt_one(m, x, y, guard=guard_of(m, data), lr=0.2) for m in (plain, wrapped)]
    assert updates[0].touched == updates[1].touched != {}
    torch.testing.assert_close(dict(model.state_dict()), dict(plain.state_dict()))
    F.cross_entropy(wrapped(data), model(data).argmax(-1)).backward()  # training goes on
    assert all(parameter.grad is not None for parameter in model.head.parameters())


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return x


class AlwaysDropping(nn.Dropout):
    def train(self, mode=True):
        return super().train(True)


class Functional(nn.Module):
    def forward(self, x):
        return F.dropout(x, 0.5)


class Batchwise(nn.BatchNorm1d):
    """Statistics that move in evaluation mode, because train() is not passed on."""

    def train(self, mode=True):
        return super().train(True)


@pytest.mark.parametrize(
    ("between", "words"),
    [
        (Counting, "buffer 'between.calls'"),
        (AlwaysDropping, "module 'between' stays in training mode"),
        (Functional, "random numbers"),
        (lambda: Batchwise(D), "module 'between' stays in training mode"),
    ],
)
def test_models_that_do_not_always_answer_alike_are_refused(untouched, user_error, between, words):
    model, x = Net(between=between()), torch.randn(2, D)
    with untouched(model), user_error(words):
        adapt_one(model, x, torch.tensor([0, 1]), guard=Guard([(torch.randn(9, D), torch.zeros(9))]))


def test_batch_norm_keeps_its_statistics():
    model, x, data = Net(between=nn.BatchNorm1d(D)).train(), torch.randn(1, D), torch.randn(50, D)
    model(data)
    statistics = {name: buffer.clone() for name, buffer in model.named_buffers()}
    y = other_class(copy.deepcopy(model).eval(), x)
    assert adapt_one(model, x, y, guard=guard_of(copy.deepcopy(model).eval(), data), lr=0.2).success
    assert all(torch.equal(buffer, statistics[name]) for name, buffer in model.named_buffers())
    assert model.training


def test_logits_that_are_not_numbers_are_not_class_0(untouched):
    """argmax takes NaN for the largest number, so class 0 would be "right" once everything has run away."""
    model, x = Net(), torch.randn(1, D)
    with torch.no_grad():
        model.head.bias[0] = -5
    with untouched(model):
        update = adapt_one(model, x, 0, lr=1e30)
    assert not update.success
    model.head.bias.data[1] = torch.nan
    assert not adapt_one(model, x, 0, lr=0.1, max_steps=3).success


def test_the_corrected_sample_counts_for_nothing():
    """Ten reference samples are the corrected one; that they become right would pay for ten others."""
    model, x, data = Net(), torch.randn(1, D), torch.randn(100, D)
    y = other_class(model, x)
    with torch.no_grad():
        labels = model(data).argmax(-1)
    alone = Guard([(data, labels)], budget=100.0)
    mixed = Guard([(torch.cat([x.expand(10, -1), data]), torch.cat([y.expand(10), labels]))], budget=100.0)
    update = adapt_one(model, x, y, guard=alone, lr=0.2)
    update.revert()
    other = adapt_one(model, x, y, guard=mixed, lr=0.2)
    assert (update.success, other.success) == (True, True)
    assert other.verdict.samples == 100
    assert other.verdict.change == update.verdict.change
    assert [index - 10 for index in other.verdict.flipped.tolist()] == update.verdict.flipped.tolist()


def test_a_guard_of_the_sample_alone_is_none(user_error):
    model, x = Net(), torch.randn(1, D)
    with user_error("nothing but the samples"):
        adapt_one(model, x, other_class(model, x), guard=Guard([(x, torch.zeros(1))]))


def test_labels_that_the_model_does_not_know(untouched, user_error):
    model, x = Net(), torch.randn(1, D)
    with untouched(model), user_error("Guard", "label 7", "0 to 3"):
        adapt_one(model, x, other_class(model, x), guard=Guard([(torch.randn(9, D), torch.full((9,), 7))]))


def test_same_samples():
    images = torch.tensor([0.0, 0.2, 0.4, 0.8]).view(1, 1, 2, 2).repeat(4, 1, 1, 1)
    images[1] += 0.4 / 255  # rounds to the same picture
    images[2, 0, 0, 0] += 1 / 255
    images[3] = 0
    assert same_sample(images, (images[0] * 255).round() / 255).tolist() == [True, True, False, False]
    assert same_sample(images, images[3]).tolist() == [False, False, False, True]
    tiny = 1e-4 * torch.rand(5, 1, 2, 2)  # numbers that eight bits cannot tell apart
    assert same_sample(tiny, tiny[2]).tolist() == [False, False, True, False, False]
    vectors = 1e-4 * torch.rand(5, 6)
    assert same_sample(vectors, vectors[1]).tolist() == [False, True, False, False, False]
    assert same_sample(vectors, torch.zeros(3)).tolist() == [False] * 5
