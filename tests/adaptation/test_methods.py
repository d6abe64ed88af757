"""The update methods against their closed forms, written again in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from grids import one_of_each
from seeds import shifted
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, TopK, record
from spectralmoe.adaptation import METHODS, Guard, adapt_one, neighbours
from spectralmoe.adaptation.correction import Correction, margins
from spectralmoe.adaptation.reference import Reference
from spectralmoe.adaptation.targets import Weights, find_targets, joined

EPSILON = 0.05  # the margin that the hinge asks for
TOP = "stages.1.moe"


class Linear(nn.Module):
    """Logits z = W x + b: linear in what is written."""

    def __init__(self):
        super().__init__()
        self.w, self.b = nn.Parameter(torch.randn(4, 5)), nn.Parameter(torch.randn(4))

    def forward(self, x):
        return x @ self.w.T + self.b


@pytest.mark.parametrize("samples", [1, 3])
def test_the_first_margin_step_is_the_minimal_norm_solution(samples):
    """For one linear constraint a (theta + d) = epsilon the smallest d is lstsq's."""
    model = Linear().double()
    x = torch.randn(samples, 5, dtype=torch.float64)
    logits = model(x).detach()
    y = logits.argmin(-1)
    rival = logits.argmax(-1)
    rows = torch.zeros(samples, 4, 6, dtype=torch.float64)  # the margin of each sample as a row on [w, b]
    for i in range(samples):
        rows[i, y[i]] += torch.cat([x[i], torch.ones(1).double()])
        rows[i, rival[i]] -= torch.cat([x[i], torch.ones(1).double()])
    m = logits[range(samples), y] - logits[range(samples), rival]
    a = rows.flatten(1).sum(0, keepdim=True)
    want = torch.linalg.lstsq(a, (EPSILON - m).sum().reshape(1, 1), driver="gelsd").solution.view(4, 6)
    before = copy.deepcopy(model)
    weights = Weights({"w": model.w, "b": model.b})
    correction = Correction(model, x, y, x[:0], weights, max_steps=1, lr=1.0)
    with weights.trainable(model):
        assert METHODS["margin"](correction) == 1
    torch.testing.assert_close(model.w - before.w, want[:, :5], rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(model.b - before.b, want[:, 5], rtol=1e-10, atol=1e-10)
    after = model(x).detach()
    total = sum(float(after[i, y[i]] - after[i, rival[i]]) for i in range(samples))
    assert total == pytest.approx(samples * EPSILON)


def test_margin_gives_up_where_nothing_can_be_moved():
    """The step would be 1e42 long."""
    model = Linear()
    x = torch.full((1, 5), 1e-21)
    y = model(x).argmin(-1)
    weights = Weights({"w": model.w})
    before = model.w.detach().clone()
    with weights.trainable(model):
        METHODS["margin"](Correction(model, x, y, x[:0], weights, max_steps=5, lr=1.0))
    assert torch.equal(model.w, before)


def test_margins_by_hand():
    logits = torch.tensor([[3.0, 1.0, 2.0], [0.5, 0.5, -1.0], [0.0, 4.0, 9.0]])
    assert margins(logits, torch.tensor([0, 1, 1])).tolist() == [1.0, 0.0, -5.0]


def small(activation="relu", k=2, spare=0, bias=True):
    """A stack that is one MoE layer with a linear head on single tokens (B, 5), in float64."""
    torch.manual_seed(shifted(3))
    bank = FeedForward(3, 5, 12, activation=activation, bias=bias, spare=spare)
    layer = MoE(Router(LinearScorer(5, 3), Soft() if k is None else TopK(k)), bank)
    return nn.Sequential(layer, nn.Linear(5, 4)).double().eval()


def problem_on(model, reference_tokens, max_steps=1, length=1.0):
    """A correction of one wrong token in layer "0", and its target."""
    x = length * torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        y = model(x).argmin(-1)
        (target,) = find_targets(model, x, ["0"])
        reference = Reference(model, reference_tokens, torch.zeros(len(reference_tokens)).long(), ["0"])
    weights = joined([target])
    return Correction(
        model, x, y, x[:0], weights, max_steps=max_steps, lr=1.0, experts=[target], reference=reference
    ), target


def hidden_of(bank, x, e):
    h = x @ bank.up[e].double().T + bank.up_bias[e].double()
    if bank.activation == "swiglu":
        gate, value = h.chunk(2, -1)
        return gate * gate.sigmoid() * value
    return h.clamp_min(0) if bank.activation == "relu" else nn.functional.gelu(h)


def gates_by_hand(model, x):
    """The combine weights (N, 3) of the layer, one slot at a time."""
    with record(model) as tape, torch.no_grad():
        model(x)
    gates = torch.zeros(len(x), 3, dtype=torch.float64)
    for token, (indices, weights) in enumerate(zip(tape[0].routing.indices, tape[0].routing.weights, strict=True)):
        for e, w in zip(indices.tolist(), weights.tolist(), strict=True):
            gates[token, e] += w
    return gates


@torch.no_grad()
def what_down_sees(model, tokens, e):
    """Hidden activations and shares of the tokens that weigh expert e at least 0.02."""
    gate = gates_by_hand(model, tokens)[:, e]
    own = gate > 0.02
    share = gate[own] / gate[own].sum()
    return hidden_of(model[0].experts, tokens[own], e), share


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
@pytest.mark.parametrize("k", [2, None], ids=["top2", "soft"])
def test_low_rank_is_the_closed_form_for_one_token(activation, k):
    """dW2 = d (C^-1 h)^T with d = t delta and t such that the linearised margin reaches epsilon."""
    model, tokens = small(activation, k), torch.randn(400, 5, dtype=torch.float64)
    correction, target = problem_on(model, tokens)
    e, bank = target.expert, model[0].experts
    seen, share = what_down_sees(model, tokens, e)
    mean = (share[:, None] * seen).sum(0)
    c = sum(s * torch.outer(h - mean, h - mean) for s, h in zip(share, seen, strict=True))
    c += 0.05 * c.diagonal().mean() * torch.eye(len(c), dtype=torch.float64)
    with torch.no_grad():
        h = hidden_of(bank, correction.samples, e)[0]
        gate = gates_by_hand(model, correction.samples)[0, e]
        logits = model(correction.samples)[0]
        y, rival = int(correction.labels), int(logits.argmax())
        delta = gate * (model[1].weight[y] - model[1].weight[rival])  # margin = <delta, W2 h> + const
        solved = torch.linalg.solve(c, h)
        t = (EPSILON - (logits[y] - logits[rival])) / (delta @ delta * (h @ solved))
        want = torch.outer(t * delta, solved)
    before = copy.deepcopy(model)
    with correction.weights.trainable(model):
        METHODS["low_rank"](correction)
    got = bank.down[e].detach() - before[0].experts.down[e].detach()
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)  # the covariance is of fp32 activations
    assert torch.linalg.matrix_rank(got, rtol=1e-8) == 1
    for name, value in bank.named_parameters():
        if name != "down":
            assert torch.equal(value, dict(before[0].experts.named_parameters())[name])


@pytest.mark.parametrize("activation", ["relu", "swiglu"])
def test_null_space_leaves_the_leading_directions_alone(activation):
    model, tokens = small(activation), torch.randn(400, 5, dtype=torch.float64) * torch.tensor([9.0, 1, 0.3, 0.1, 0.1])
    correction, target = problem_on(model, tokens, max_steps=20)
    e, bank = target.expert, model[0].experts
    seen, share = what_down_sees(model, tokens, e)
    gate = gates_by_hand(model, tokens)[:, e]
    inputs = tokens[gate > 0.02]
    before = copy.deepcopy(bank)
    with correction.weights.trainable(model):
        assert METHODS["null_space"](correction) > 0
    for name, what in (("down", seen), ("up", inputs)):
        _, values, rows = torch.linalg.svd(share.sqrt()[:, None] * what, full_matrices=False)
        energy = values.square().cumsum(0) / values.square().sum()
        leading = rows[: int((energy < 0.95).sum()) + 1]
        change = (getattr(bank, name) - getattr(before, name)).detach()[e]
        assert 0 < len(leading) < what.shape[1]
        assert float(change.norm()) > 1e-6
        assert float((change @ leading.T).norm()) < 1e-5 * float(change.norm())
    for name in ("up_bias", "down_bias"):
        assert torch.equal(getattr(bank, name), getattr(before, name))


def unit_parts(bank, e):
    """Each hidden unit's numbers, as one row: in from each half of ``up``, its biases, out by ``down``."""
    halves = bank.up.shape[1] // bank.down.shape[2]
    up = bank.up[e].unflatten(0, (halves, -1)).transpose(0, 1).flatten(1)
    bias = bank.up_bias[e].unflatten(0, (halves, -1)).T
    return torch.cat([up, bias, bank.down[e].T], 1).detach().clone()


@one_of_each(name=["top2", "soft"], layers=["last", "all"])
def test_unit_writes_one_hidden_unit_of_one_expert(network, data, wrong, make_guard, snapshot, changed, name, layers):
    model = network(name)
    guard, used = make_guard(budget=100.0), dict[int, int]()
    for sample in wrong(model, 3):
        before, state = copy.deepcopy(model), snapshot(model)
        x, y = data.test.images[[sample]], int(data.test.labels[sample])
        if int(model(x).argmax()) == y:
            continue
        update = adapt_one(model, x, y, layers=layers, method="unit", guard=guard)
        assert update.success
        assert update.method == "unit"
        ((layer, e),) = update.touched.items()
        assert layer == TOP
        assert {entry.rsplit("[")[1] for entry in changed(model, state)} == {f"{e}]"}
        bank, old = model.get_submodule(TOP).experts, before.get_submodule(TOP).experts
        moved = (unit_parts(bank, e) != unit_parts(old, e)).any(1).nonzero().flatten().tolist()
        assert moved == [8 + used.get(e, 0)]  # the first spare one that is still free
        assert torch.equal(bank.down_bias, old.down_bias)
        used[e] = used.get(e, 0) + 1
        assert bank.free_units(e) == list(range(8 + used[e], 16))
    assert used


@pytest.mark.parametrize("activation", ["relu", "gelu", "swiglu"])
def test_unit_solves_with_every_activation(activation):
    """A token that stands out from what the expert sees."""
    model, tokens = small(activation, spare=1), torch.randn(200, 5, dtype=torch.float64)
    correction, target = problem_on(model, tokens, length=4.0)
    with correction.weights.trainable(model):
        METHODS["unit"](correction)
    assert int(model(correction.samples).argmax()) == int(correction.labels)
    assert model[0].experts.free_units(target.expert) == []
    assert all(len(model[0].experts.free_units(e)) == 1 for e in range(3) if e != target.expert)


def test_unit_needs_a_free_unit_and_a_bias(network, data, wrong, untouched, user_error):
    tokens = torch.randn(50, 5, dtype=torch.float64)
    for arguments, word in (({"spare": 1, "bias": False}, "no bias"), ({"spare": 0}, "no free hidden unit")):
        correction, target = problem_on(small(**arguments), tokens)
        with user_error(word, "'0'", f"expert {target.expert}", "spare"):
            METHODS["unit"](correction)
    model = network("top2")
    with untouched(model), user_error("guard", "'unit'"):
        adapt_one(model, data.test.images[:1], 3, method="unit")


def test_where_spare_units_are_used_up_other_methods_go_on(network, data, wrong, make_guard, changed, snapshot):
    model = network("top2")
    with torch.no_grad():
        model.get_submodule(TOP).experts.down[:, :, 8:] = 1e-3
    state = snapshot(model)
    i = wrong(model, 1)[0]
    update = adapt_one(
        model, data.test.images[[i]], data.test.labels[[i]], method="unit", guard=make_guard(budget=50.0)
    )
    assert update.success
    assert update.method == "low_rank"
    assert [reason.split(":")[0] for reason in update.tried] == [f"unit in {TOP}"]
    assert "no free hidden unit" in update.tried[0]
    assert changed(model, state) == [f"{TOP}.experts.down[{update.touched[TOP]}]"]


@pytest.mark.parametrize("method", ["null_space", "low_rank", "unit"])
def test_banks_without_hidden_units_are_refused(pooled, untouched, user_error, method):
    model = pooled("modules")
    x = torch.randn(1, 4, 6)
    y = int(model(x).argmin())
    guard = Guard([(torch.randn(30, 4, 6), torch.zeros(30))])
    with untouched(model), user_error("FeedForward", "ModuleExperts", "'second'"):
        adapt_one(model, x, y, method=method, guard=guard)


def test_an_expert_that_reference_data_never_use(user_error):
    model = small(k=1)
    x = torch.randn(1, 5, dtype=torch.float64)
    with torch.no_grad():
        (target,) = find_targets(model, x, ["0"])
        tokens = torch.randn(200, 5, dtype=torch.float64)
        tokens = tokens[gates_by_hand(model, tokens)[:, target.expert] == 0]
    reference = Reference(model, tokens, torch.zeros(len(tokens)).long(), ["0"])
    weights = joined([target])
    correction = Correction(model, x, torch.tensor([0]), x[:0], weights, 5, 1.0, experts=[target], reference=reference)
    for method in ("null_space", "low_rank"):
        with user_error(f"expert {target.expert}", "reference"):
            METHODS[method](correction)


@one_of_each(name=["top1", "soft"], method=METHODS)
def test_most_mistakes_become_right(network, data, wrong, make_guard, name, method):
    model = network(name)
    guard = make_guard(budget=100.0)
    samples, done = wrong(model, 5), 0
    for sample in samples:
        x, y = data.test.images[[sample]], int(data.test.labels[sample])
        update = adapt_one(model, x, y, method=method, guard=guard, lr=2e-2, augment=lambda x: neighbours(x, count=2))
        if update.success:
            assert int(model(x).argmax()) == y
        done += update.success and update.method == method
        update.revert()
    assert done > len(samples) / 2
