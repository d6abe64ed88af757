"""Weights that somebody else reads, too: the verdict is the whole truth about the reference data all the same."""

from __future__ import annotations

import copy

import pytest
import torch
from grids import first_of
from torch import nn
from torch.nn import functional as F

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, MoE, Router, TopK
from spectralmoe.adaptation import Guard, Rule, adapt_one, apply_update, make_receipt, one_shot_trials
from spectralmoe.adaptation.adapt import split
from spectralmoe.adaptation.memory import share_memory, shared_banks
from spectralmoe.adaptation.targets import Weights

D, CLASSES = 6, 5


def layer(bank):
    return MoE(Router(LinearScorer(D, 4), TopK(1)), bank)


def stacked(hidden=12):
    return FeedForward(4, D, hidden, bias=True)


class Two(nn.Module):
    """Vectors (B, D) -> logits: two residual MoE layers and a head; ``split`` resumes from the second."""

    def __init__(self, first, second, ways_apart=True):
        super().__init__()
        self.a, self.b, self.head = layer(first), layer(second), nn.Linear(D, CLASSES)
        if ways_apart:
            self.split = self._split

    def forward(self, x):
        x = x + self.a(x)
        return self.head(x + self.b(x))

    def _split(self, name):
        if name == "a":
            return nn.Identity(), self
        return Head(self.a), Tail(self.b, self.head)


class Head(nn.Module):
    def __init__(self, a):
        super().__init__()
        self.a = a

    def forward(self, x):
        return x + self.a(x)


class Tail(nn.Module):
    def __init__(self, b, head):
        super().__init__()
        self.b, self.head = b, head

    def forward(self, x):
        return self.head(x + self.b(x))


def one_bank():
    bank = stacked()
    return Two(bank, bank)


def one_layer_twice():
    """Registered twice; the second name is never called, which nobody can know."""
    model = Two(stacked(), stacked())
    model.again = model.b
    return model


def tied_across_layers():
    model = Two(stacked(), stacked())
    model.b.experts.up = model.a.experts.up
    return model


def tied_transposed():
    model = Two(stacked(), stacked())
    model.a.experts.down = nn.Parameter(model.b.experts.up.detach().transpose(1, 2))
    return model


def tied_view_outside():
    """The classifier is a part of one expert's matrix."""
    model = Two(stacked(), stacked())
    model.head.weight = nn.Parameter(model.b.experts.up.detach()[1, :CLASSES])
    return model


def one_module_twice():
    modules = [nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D)) for _ in range(3)]
    return Two(stacked(), ModuleExperts([*modules, modules[0]]))


def one_matrix_in_two_experts():
    modules = [nn.Sequential(nn.Linear(D, 8), nn.ReLU(), nn.Linear(8, D)) for _ in range(4)]
    modules[3][0].weight = modules[1][0].weight
    return Two(stacked(), ModuleExperts(modules))


def an_expert_elsewhere():
    """The head runs one of the experts for every sample."""
    modules = [nn.Linear(D, D) for _ in range(4)]
    model = Two(stacked(), ModuleExperts(modules))
    model.head = nn.Sequential(modules[2], nn.Linear(D, CLASSES))
    return model


def a_buffer():
    model = Two(stacked(), stacked())
    model.register_buffer("copy", model.b.experts.down.detach()[2])
    return model


def experts_alike():
    """One matrix for all experts: the stack has stride 0."""
    model = Two(stacked(), stacked())
    model.b.experts.up = nn.Parameter(model.b.experts.up.detach()[:1].expand(4, -1, -1))
    return model


TIED = [
    one_bank,
    one_layer_twice,
    tied_across_layers,
    tied_transposed,
    tied_view_outside,
    one_module_twice,
    one_matrix_in_two_experts,
    an_expert_elsewhere,
    a_buffer,
    experts_alike,
]


class Reading(Two):
    """Nothing is tied, but the forward reads an expert of ``b`` by itself."""

    def forward(self, x):
        return super().forward(x) + 0.5 * F.linear(x, self.b.experts.down[1][:, :CLASSES].T)


def reading():
    return Reading(stacked(), stacked(), ways_apart=False)


@pytest.mark.parametrize("make", TIED)
def test_every_reader_is_found(make):
    assert "b" in shared_banks(make())


def test_what_is_read_once_is_not_shared():
    plain = Two(stacked(), ModuleExperts([nn.Linear(D, D) for _ in range(4)]))
    assert shared_banks(plain) == frozenset()
    within = ModuleExperts([nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.Linear(D, D)) for _ in range(4)])
    within.experts[0][2].weight = within.experts[0][0].weight  # one expert reads it twice
    assert shared_banks(Two(stacked(), within)) == frozenset()
    flat = torch.randn(4 * 12 * D + 4 * 12)
    parts = Two(stacked(), stacked())
    parts.b.experts.up = nn.Parameter(flat[: 4 * 12 * D].view(4, 12, D))
    parts.b.experts.up_bias = nn.Parameter(flat[4 * 12 * D :].view(4, 12))
    assert shared_banks(parts) == frozenset()  # one storage, but no byte in common
    assert shared_banks(torch.nn.Sequential(plain, parts)) == frozenset()


@pytest.mark.parametrize("make", [one_bank, tied_across_layers, tied_transposed])
def test_a_head_that_reads_the_rest_is_no_head(make):
    model = make()
    assert share_memory(*model.split("b"))
    head, tail = split(model, "b")
    x = torch.randn(3, D)
    assert tail is model
    assert head(x) is x
    apart = Two(stacked(), stacked())
    assert split(apart, "b")[1] is not apart


def trained(model, x, y):
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(60):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
    return model.eval()


@pytest.mark.parametrize("make", first_of(5, [reading, *TIED[-2::-1]]))
def test_the_verdict_is_a_full_evaluation(make):
    """Each kept correction is measured by hand; its cost is the verdict's, and within the budget."""
    x = torch.randn(600, D)
    y = (x @ torch.randn(D, CLASSES) + 0.8 * torch.randn(600, CLASSES)).argmax(-1)
    model = trained(make(), x[:400], y[:400])
    guard, kept = Guard([(x[:400], y[:400])], budget=0.6), 0
    before = model(x[:400]).argmax(-1)
    wrong = (model(x[400:]).argmax(-1) != y[400:]).nonzero().flatten()[:6] + 400
    for i in wrong.tolist():
        update = adapt_one(model, x[[i]], y[[i]], guard=guard, lr=0.05, layers="all")
        after = model(x[:400]).argmax(-1)
        if update.success and update.written:
            kept += 1
            cost = 100 * (int((after == y[:400]).sum()) - int((before == y[:400]).sum())) / 400
            assert update.verdict.change.mean == pytest.approx(cost)
            assert cost >= -0.6
            assert update.verdict.flipped.tolist() == (after != before).nonzero().flatten().tolist()
            assert update.verdict.reachable >= len(update.verdict.flipped)
            if make is not reading:
                assert update.verdict.reachable == 400
            assert int(model(x[[i]]).argmax()) == int(y[i])
        update.revert()
        assert torch.equal(model(x[:400]).argmax(-1), before)
    assert kept


def test_interference_of_trials_is_that_of_the_whole_model():
    x = torch.randn(300, D)
    y = (x @ torch.randn(D, CLASSES)).argmax(-1)
    model = trained(one_bank(), x, y.roll(40))  # much is wrong
    before = model(x).argmax(-1)
    for scope in ("one-expert", "all-experts", "all-parameters"):
        rule = Rule(layers="last", lr=0.05, scope=scope)
        for trial in one_shot_trials(model, x, y, trials=3, rule=rule):
            changed = copy.deepcopy(model)
            if scope == "one-expert":
                rule.correct(changed, x[[trial.sample]], y[[trial.sample]])
            else:
                names = {"b.experts"} if scope == "all-experts" else {""}
                weights = {n: p for n, p in changed.named_parameters() if any(n.startswith(part) for part in names)}
                weights |= {} if scope == "all-parameters" else dict(changed.b.experts.named_parameters())
                by_hand(changed, Weights(weights), x[[trial.sample]], y[[trial.sample]], rule)
            after = changed(x).argmax(-1)
            others = torch.arange(300) != trial.sample
            step = (after == y).int() - (before == y).int()
            assert trial.interference == pytest.approx(100 * int(step[others].sum()) / 299)


def by_hand(model, weights, x, y, rule):
    for _ in range(rule.max_steps):
        if int(model(x).argmax()) == int(y):
            return
        views = list(weights.views.values())
        for view, gradient in zip(views, torch.autograd.grad(F.cross_entropy(model(x), y), views), strict=True):
            view.data.sub_(rule.lr * gradient)


def test_one_expert_under_two_names_moves_once(tmp_path):
    """Both layers choose the same expert of one bank: one step is one step, and one change is counted once."""
    model = one_bank()
    with torch.no_grad():
        for part in (model.a, model.b):
            part.router.scorer.weight.zero_()  # every token goes to the same expert
    x = torch.randn(1, D)
    y = int(model(x).argsort(dim=-1)[0, -2])
    plain = copy.deepcopy(model)
    update = adapt_one(model, x, y, layers="all", lr=0.05)
    assert update.success
    expert = update.touched["a"]
    assert update.touched == {"a": expert, "b": expert}
    for _ in range(update.steps):
        loss = F.cross_entropy(plain(x), torch.tensor([y]))
        bank = list(plain.a.experts.parameters())
        for weight, gradient in zip(bank, torch.autograd.grad(loss, bank), strict=True):
            weight.data.sub_(0.05 * gradient)
    torch.testing.assert_close(model.state_dict(), plain.state_dict())
    receipt = make_receipt(model, x, y, update)
    update.save(tmp_path / "update")
    new = [p.detach().clone() for p in model.a.experts.parameters()]
    update.revert()
    moved = [n - p.detach() for n, p in zip(new, model.a.experts.parameters(), strict=True)]
    assert receipt.change == pytest.approx(sum(float(m.square().sum()) for m in moved) ** 0.5, rel=1e-4)
    assert receipt.written == sum(int(m.ne(0).sum()) for m in moved)
    apply_update(model, tmp_path / "update")
    torch.testing.assert_close([p.detach() for p in model.a.experts.parameters()], new)
