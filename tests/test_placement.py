"""Placement: the router's experts and the bank's places; everything but the dispatch speaks of experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from spectralmoe import (
    Balanced,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Placement,
    Router,
    Soft,
    TopK,
    attach,
    load,
    record,
    save,
)
from spectralmoe.adaptation.targets import expert_target, find_targets
from spectralmoe.diagnostics import watch
from spectralmoe.placement import arrival
from spectralmoe.spec import build, describe

D, E = 8, 5

TABLES = {  # of five experts on a bank of six places
    "moved": [[3], [0], [5], [1], [2]],
    "merged": [[0], [1], [0], [2], [1]],
    "zero": [[], [4], [0], [], [1]],
    "replicated": [[0], [1, 5], [2, 3, 4], [], [5]],
}


def layer_of(table, selector=None, **options):
    placement = None if table is None else Placement(table)
    return MoE(
        Router(LinearScorer(D, E), selector or TopK(2)),
        FeedForward(6, D, 12, bias=True),
        placement=placement,
        **options,
    )


def slow(layer, x, mask=None):
    """y_t = sum_j w_tj E_s(x_t), s the places of expert i_tj in turn."""
    taken, rows = [0] * E, []
    routing = layer.router(x, mask=mask)
    for t, chosen in enumerate(routing.indices.tolist()):
        y = torch.zeros_like(x[t])
        for j, e in enumerate(chosen):
            places = [s for s in layer.placement.table[e].tolist() if s >= 0] if e >= 0 else []
            if places:
                y = y + routing.weights[t, j] * layer.experts.expert(x[t : t + 1], places[taken[e] % len(places)])[0]
            if e >= 0:
                taken[e] += 1
        rows.append(y)
    return torch.stack(rows)


@pytest.mark.grid(
    table=list(TABLES), dispatch=["auto", "loop", "dense", "grouped"], k=[1, 2, None], masked=[False, True]
)
def test_definition(table, dispatch, k, masked, same):
    layer = layer_of(TABLES[table], TopK(k) if k else Soft(), dispatch=dispatch).double()
    x = torch.randn(30, D, dtype=torch.float64, requires_grad=True)
    mask = torch.arange(30) % 3 > 0 if masked else None
    same(layer(x, mask=mask), slow(layer, x, mask), [x, *layer.parameters()])


def test_by_hand():
    """Experts that multiply by their place: tokens of expert 1 go to places 1 and 2 in turn, those of 2 nowhere."""
    bank = nn.ModuleList([nn.Linear(2, 2, bias=False) for _ in range(3)])
    for place, module in enumerate(bank):
        module.weight.data = (place + 1) * torch.eye(2)
    layer = MoE(Router(LinearScorer(2, 3), TopK(1)), ModuleExperts(list(bank)), placement=Placement([[0], [1, 2], []]))
    layer.router.scorer.weight.data = torch.tensor([[50.0, 0.0], [0.0, 50.0], [-50.0, -50.0]])
    x = torch.tensor([[0.0, 1.0], [1.0, 0.0], [0.0, 1.0], [-1.0, -1.0], [0.0, 1.0]])
    assert layer(x).tolist() == [[0.0, 2.0], [1.0, 0.0], [0.0, 3.0], [0.0, 0.0], [0.0, 2.0]]


def test_replicas_share_the_load_evenly():
    layer = layer_of(TABLES["replicated"])
    for n in (0, 1, 40, 101):
        routing = layer.router(torch.randn(n, D))
        places, counts = layer.placement(routing).indices, routing.counts()
        for e, row in enumerate(TABLES["replicated"]):
            loads = [int(((routing.indices == e) & (places == place)).sum()) for place in row]
            assert not row or (max(loads) - min(loads) <= 1 and sum(loads) == int(counts[e]))


def test_arrival_counts_earlier_slots():
    indices = torch.tensor([[2, 0], [-1, 2], [0, 1], [2, -1]])
    seen, turns = [0, 0, 0], []
    for e in indices.flatten().tolist():
        turns.append(seen[e] if e >= 0 else None)
        seen[e] += e >= 0
    found = arrival(indices, 3).flatten().tolist()
    assert [turn for turn, want in zip(found, turns, strict=True) if want is not None] == [
        want for want in turns if want is not None
    ]


def test_the_identity_changes_no_bit():
    plain = MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 12))
    placed = copy.deepcopy(plain)
    placed.placement = Placement([[e] for e in range(E)])
    x = torch.randn(20, D)
    assert plain.placement is None
    assert torch.equal(plain(x), placed(x))


class Operators(TorchDispatchMode):
    """Collects the operators that run."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.append(func.name())
        return func(*args, **(kwargs or {}))


def test_the_fast_path_stays_and_a_table_of_one_column_costs_a_gather():
    x, names = torch.randn(20, D), {}
    for table in (None, [[e] for e in range(E)], TABLES["replicated"]):
        layer = layer_of(table) if table else MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 12))
        with Operators() as operators:
            layer(x)
        assert operators.names.count("spectralmoe::fused_experts") == 1
        names[str(table)] = operators.names
    none, identity, replicas = (len(each) for each in names.values())
    assert none < identity <= none + 6 < replicas


def test_records_and_selection_biases_speak_of_experts():
    layer = layer_of(TABLES["merged"], Balanced(2))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attachment = attach(optimizer, layer)
    x = torch.randn(40, D)
    with record(layer, keep=("input", "output")) as tape:
        y = layer(x)
    (item,) = tape
    assert item.routing.num_experts == E
    assert torch.equal(item.routing.counts(), layer.router(x).counts())
    weights = item.routing.weights.flatten()[item.order, None]
    by_hand = torch.zeros_like(x).index_add(0, item.order // 2, weights * item.output)
    torch.testing.assert_close(y, by_hand, rtol=1e-5, atol=1e-5)
    y.square().mean().backward()
    optimizer.step()
    attachment.remove()
    assert layer.router.selector.bias.shape == (E,)
    assert layer.router.selector.bias.any()


def test_kept_tensors_do_not_change_the_sum(close):
    for table in TABLES.values():
        layer, x = layer_of(table), torch.randn(30, D)
        with record(layer, keep=("hidden",)):
            y = layer(x)
        close(y, layer(x))


@pytest.mark.parametrize("table", TABLES)
def test_saved_and_copied(table, tmp_path):
    layer, x = layer_of(TABLES[table]).eval(), torch.randn(20, D)
    spec = describe(layer)
    assert describe(build(spec)) == spec
    assert not [name for name in layer.state_dict() if "placement" in name]
    save(layer, tmp_path)
    for twin in (copy.deepcopy(layer), load(tmp_path)):
        assert torch.equal(twin(x), layer(x))
        assert torch.equal(twin.placement.table, layer.placement.table)


def test_another_placement_is_another_layer(tmp_path, user_error):
    save(layer_of(TABLES["moved"]), tmp_path)
    with user_error("other MoE layers"):
        load(tmp_path, into=layer_of(TABLES["merged"]))


@pytest.mark.parametrize("table", ["zero", "replicated"])
def test_compiled_in_one_graph(table, close):
    torch.compiler.reset()
    layer = layer_of(TABLES[table])
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for n in (20, 33, 1):
        x = torch.randn(n, D)
        y, found = layer(x), compiled(x)
        close(found, y)
        grads = [torch.autograd.grad(out.square().sum(), list(layer.parameters())) for out in (found, y)]
        for one, two in zip(*grads, strict=True):
            close(one, two)
    torch.compiler.reset()


def test_transforms_of_functions(close):
    layer, x = layer_of(TABLES["replicated"]).eval(), torch.randn(3, 10, D)
    with torch.no_grad():
        close(torch.func.vmap(layer)(x), torch.stack([layer(part) for part in x]))


def test_autocast(close):
    layer, x = layer_of(TABLES["replicated"]), torch.randn(40, D)
    with torch.autocast("cpu", torch.bfloat16):
        y = layer(x)
    close(y.float(), layer(x), torch.bfloat16)


def test_instruments_see_experts(close):
    layer, x = layer_of(TABLES["replicated"]), torch.randn(9, D)
    with watch(layer) as seen:
        (watched,) = seen.layers
        layer(x)
        (call,) = seen.drain()
    assert watched.num_experts == E
    assert call.routing.num_experts == E
    close(watched.expert(x, 2), layer.experts.expert(x, 2))
    assert not watched.expert(x, 3).any()
    assert torch.equal(watched.expert_weights(4), watched.expert_weights(4))
    assert len(watched.expert_weights(3)) == 0


def test_one_expert_is_found_in_its_slot(user_error):
    layer = layer_of(TABLES["moved"], TopK(1))
    x = torch.randn(1, D)
    e = int(layer.router(x).indices)
    (target,) = find_targets(layer, x, [""])
    assert (target.expert, target.place) == (e, TABLES["moved"][e][0])
    assert target.views["up"].data_ptr() == layer.experts.up[target.place].data_ptr()
    for table, expert in (("merged", 0), ("replicated", 2), ("replicated", 1)):
        with user_error("layer 'x'", f"expert {expert}", "adapted alone"):
            expert_target("x", layer_of(TABLES[table]), expert)


def test_a_zero_expert_is_no_target():
    layer = layer_of(TABLES["zero"], TopK(1))
    layer.router.scorer.weight.data.zero_()
    layer.router.scorer.weight.data[0] = 9.0
    x = torch.ones(1, D)
    assert layer.router(x).indices.tolist() == [[0]]
    assert find_targets(layer, x, [""]) == []


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([], ["one row an expert"]),
        ([0, 1], ["one row an expert"]),
        ([[0], [-2]], ["from 0 on", "expert 1"]),
        ([[0], [1.5]], ["from 0 on", "expert 1"]),
        ([[-1, 0]], ["before any -1", "expert 0"]),
        ([[2], [3, 3]], ["once each", "expert 1"]),
        ([[], [-1]], ["no expert has a place"]),
    ],
)
def test_tables_of_another_form_are_refused(table, words, user_error):
    with user_error("Placement", *words):
        Placement(table)


def test_sizes_must_fit(user_error):
    with user_error("4 rows", "E=5"):
        layer_of([[0]] * 4)
    with user_error("place 6", "holds 6"):
        layer_of([[0], [1], [2], [3], [6]])
    with user_error("placement", "list"):
        MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(6, D, 12), placement=[[0]] * 5)


def test_zero_experts_leave_slots_empty(close):
    """The router fills all slots, and as many experts as places; yet not every slot has a row."""
    layer = MoE(
        Router(LinearScorer(D, E), TopK(2)),
        FeedForward(E, D, 12),
        placement=Placement(TABLES["zero"]),
        dispatch="grouped",
    )
    x = torch.randn(20, D)
    routing = layer.router(x)
    assert routing.full
    assert not layer.placement(routing).full
    assert Placement(TABLES["merged"])(routing).full
    with record(layer, keep=("output",)) as tape:  # the composed form
        y = layer(x)
    assert len(tape[0].output) == int((layer.placement(routing).indices >= 0).sum())
    close(y, layer(x))
