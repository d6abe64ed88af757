"""The fused operator against the composed form and its own equations; ``test_dispatch`` has it against the loop."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck, gradgradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.dispatch import Grouped, Loop, fused, pick_dispatch
from spectralmoe.dispatch.base import combine, sort_slots, spread
from spectralmoe.dispatch.blocks import cut_blocks, lay_out, rows_at_most, sort_by_expert
from spectralmoe.routing import Routing

E, D, H = 5, 8, 12
ACTIVATIONS = ["gelu", "relu", "swiglu"]
SIZES = (1, 900, 2**22)  # blocks of rows, of parts, and the whole
small_blocks = pytest.mark.parametrize("size", SIZES, ids=["rows", "parts", "whole"])


def composed(x, routing, bank):
    """The form in parts, on any bank."""
    slots = sort_slots(routing, bank.num_experts)
    return combine(bank(spread(x, slots), slots.counts), routing.weights.to(x.dtype), slots)


def make(activation="gelu", bias=False, k=2, dtype=torch.float32, hidden=H, tokens=40):
    """A layer whose router knows a zero expert, tokens of which some are empty and masked, and what they are."""
    layer = MoE(Router(LinearScorer(D, E + 1), TopK(k)), FeedForward(E, D, hidden, activation=activation, bias=bias))
    x = torch.randn(tokens, D)
    mask = torch.rand(tokens) < 0.8
    x[~mask] = torch.nan
    return layer.to(dtype), x.to(dtype), mask


def results(layer, dispatch, x, mask, direction):
    layer.dispatch, x = dispatch, x.clone().requires_grad_()
    layer.zero_grad()
    y = layer(x, mask)
    (y * direction).sum().backward()
    return [y, x.grad, *(p.grad for p in layer.parameters())]


@pytest.mark.grid(
    dtype=[torch.float32, torch.float64, torch.bfloat16],
    activation=ACTIVATIONS,
    size=SIZES,
    bias=[False, True],
    hidden=[H, D // 2],
    recompute=[False, True],
)
def test_equals_the_loop_however_it_is_cut(dtype, activation, bias, size, hidden, recompute, close, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", size)
    layer, x, mask = make(activation, bias, dtype=dtype, hidden=hidden)
    direction = torch.randn(40, D).to(dtype) / 4
    wide = torch.promote_types(dtype, torch.float32)
    expected = results(copy.deepcopy(layer).to(wide), "loop", x.to(wide), mask, direction.to(wide))
    found = results(layer, Grouped(recompute=recompute), x, mask, direction)
    for one, two in zip(found, expected, strict=True):
        close(one.to(wide), two, dtype)


@small_blocks
@pytest.mark.parametrize("hidden", [H, D // 2], ids=["wide", "bottleneck"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_large_experts_in_16_bits_are_filled_up_and_equal_the_loop(dtype, size, hidden, close, monkeypatch):
    monkeypatch.setattr(fused, "_BLOCK", size)
    layer, x, mask = make(bias=True, dtype=dtype, hidden=hidden, tokens=300)
    direction = torch.randn(300, D).to(dtype) / 16
    expected = results(copy.deepcopy(layer).float(), "loop", x.float(), mask, direction.float())
    assert layer.router(x.nan_to_num()).indices.flatten().bincount().max() > 96
    for one, two in zip(results(layer, "grouped", x, mask, direction), expected, strict=True):
        close(one.float(), two, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("broken", [torch.inf, torch.nan])
def test_a_broken_expert_changes_nothing_for_the_others(broken, dtype):
    """Chosen by some tokens or by none."""
    bank, x = FeedForward(4, D, H).to(dtype), torch.randn(38, D, dtype=dtype, requires_grad=True)
    indices = torch.cat([torch.arange(26) % 2, torch.full([12], 2)])[torch.randperm(38), None]
    with torch.no_grad():
        bank.down[2:] = broken
    routing = Routing(torch.zeros(38, 4), torch.ones(38, 1), indices, torch.zeros(38, 4))
    y, sound = Grouped()(x, routing, bank), indices[:, 0] != 2
    y[sound].square().sum().backward()
    for found in (y[sound], x.grad[sound], bank.up.grad[:2], bank.down.grad[:2]):
        assert found.isfinite().all()
    assert bank.up.grad[3].count_nonzero() == 0


class Doubled(FeedForward):
    """A bank that is not what it inherits from."""

    def forward(self, x, counts):
        return 2 * super().forward(x, counts)


@pytest.mark.parametrize("bank", [FeedForward, Doubled])
def test_recomputation_keeps_no_hidden_layer(bank, close):
    layer, x = MoE(Router(LinearScorer(D, E), TopK(2)), bank(E, D, H)), torch.randn(40, D)
    expected, saved = results(layer, Grouped(), x, None, torch.ones(40, D)), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        found = results(layer, Grouped(recompute=True), x, None, torch.ones(40, D))
    assert not any(t.shape == (80, H) for t in saved)
    for one, two in zip(found, expected, strict=True):
        close(one, two)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_equals_the_composed_form_and_repeats_itself(activation, close):
    layer, x, mask = make(activation, bias=True)
    direction = torch.randn(40, D)
    one, again, other = (results(layer, form, x, mask, direction) for form in (Grouped(), Grouped(), composed))
    assert all(torch.equal(a, b) for a, b in zip(one, again, strict=True))
    for a, b in zip(one, other, strict=True):
        close(a, b)


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_derivatives_of_the_operator(activation, bias, check):
    bank = FeedForward(3, 3, 2, activation=activation, bias=bias).double()
    indices = torch.tensor([[0, 2], [2, -1], [0, 2], [3, 0], [-1, -1]])
    x, weights = (torch.randn(5, d, dtype=torch.float64, requires_grad=True) for d in (3, 2))
    parts = [bank.up, bank.down, *([bank.up_bias, bank.down_bias] if bias else [])]

    def run(x, weights, *parts):
        biases = () if bias else (None, None)
        return fused._forward(x, weights, indices, *parts, *biases, activation, True)[0]

    assert check(run, (x, weights, *parts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_operator_keeps_the_rules_of_torch(dtype):
    layer = make(dtype=dtype)[0]
    x, weights = torch.randn(7, D, dtype=dtype, requires_grad=True), torch.rand(7, 2, requires_grad=True)
    bank, indices = layer.experts, torch.randint(0, E, (7, 2))
    torch.library.opcheck(fused._forward, (x, weights, indices, bank.up, bank.down, None, None, "gelu", True))


@pytest.mark.parametrize("frozen", ["x", "experts", "router"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_the_same(frozen, close):
    layer, x, _ = make(bias=True)
    x = x.nan_to_num()
    expected = results(layer, "loop", x, None, torch.ones(40, D))
    layer.dispatch = "grouped"
    layer.zero_grad()
    if frozen != "x":
        getattr(layer, frozen).requires_grad_(False)
    x.requires_grad_(frozen != "x")
    layer(x).sum().backward()
    found = [x.grad, *(p.grad for p in layer.parameters())]
    assert sum(grad is None for grad in found) == {"x": 1, "router": 1, "experts": 4}[frozen]
    for one, two in zip(found, expected[1:], strict=True):
        if one is not None:
            close(one, two)


def test_the_backward_pass_keeps_one_hidden_layer_and_the_outputs_and_a_forward_without_gradient_nothing():
    layer, x, _ = make()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        layer(x.nan_to_num())
    assert sum(t.numel() for t in saved if t.dim() == 2 and t.shape[0] == 80) == 80 * (H + D)
    indices, weights = torch.zeros(40, 1, dtype=torch.int64), torch.ones(40, 1)
    bank = layer.experts
    assert fused._forward(x, weights, indices, bank.up, bank.down, None, None, "gelu", False)[3].numel() == 0


def test_only_a_plain_bank_without_hooks_is_fused(close):
    layer, x, _ = make()
    bank, x = layer.experts, x.nan_to_num()
    assert fused.can_fuse(bank, x)
    assert not fused.can_fuse(Doubled(E, D, H), x)
    expected, seen = layer(x), []
    handle = bank.register_forward_hook(lambda _, args, __: seen.append(args))
    assert not fused.can_fuse(bank, x)
    close(layer(x), expected)
    assert len(seen) == 1
    handle.remove()
    assert fused.can_fuse(bank, x)


def graphs_for(layer, batches, **options):
    """How many graphs ``torch.compile`` makes for these batches."""
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    torch.compiler.reset()
    compiled = torch.compile(layer, backend=backend, fullgraph=True, **options)
    for x in batches:
        compiled(x)
    torch.compiler.reset()
    return len(graphs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_serves_every_load(dtype):
    batches = [scale * torch.randn(40, D, dtype=dtype) for scale in (1.0, 100.0, 0.0)]
    assert graphs_for(make(dtype=dtype)[0], batches) == 1


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_single_token_is_decoded_expert_by_expert(activation, close):
    layer, x, _ = make(activation)
    x = x.nan_to_num()[:1]
    routing = layer.router(x)
    large = FeedForward(64, D, 1024)
    assert isinstance(pick_dispatch(routing, layer.experts), Loop)
    assert isinstance(pick_dispatch(routing, large), Grouped)
    with torch.no_grad():
        assert isinstance(pick_dispatch(routing, large), Loop)
        assert isinstance(pick_dispatch(routing, layer.experts), Loop)
        close(layer(x), composed(x, routing, layer.experts))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_one_graph_serves_every_number_of_tokens(dtype):
    batches = [torch.randn(n, D, dtype=dtype) for n in (3, 2, 40, 300)]
    assert graphs_for(make(dtype=dtype)[0], batches, dynamic=True) == 1


@pytest.mark.parametrize("n", [1, 2])
def test_a_token_without_an_expert_has_gradients_of_zero(n):
    layer, _, _ = make()
    layer(torch.randn(n, D), torch.zeros(n, dtype=torch.bool)).sum().backward()
    assert all(p.grad is not None and not p.grad.any() for p in layer.experts.parameters())


@pytest.mark.parametrize("grad", [False, True])
def test_a_single_token_meets_the_bank_as_it_is(grad, close):
    layer, x, _ = make()
    x = x.nan_to_num()[:1]
    layer.experts = Doubled(E, D, H)
    with torch.set_grad_enabled(grad):
        close(layer(x), composed(x, layer.router(x), layer.experts))
        layer.experts, seen = FeedForward(E, D, H), []
        layer.experts.register_forward_hook(lambda _, args, __: seen.append(args))
        layer(x)
    assert len(seen) == 1


loads = st.lists(st.integers(0, 30) | st.integers(0, 200), min_size=1, max_size=9)


@given(loads, st.integers(1, 60))
def test_blocks_hold_every_row_once_and_not_many_more_than_asked(counts, most):
    blocks = cut_blocks(counts, most)
    assert [block.start for block in blocks] == [sum(b.size for b in blocks[:i]) for i in range(len(blocks))]
    assert all(block.size == sum(block.sizes) and 0 < block.size <= 1.5 * most for block in blocks)
    pieces = [piece for block in blocks for piece in zip(block.experts, block.sizes, block.begins, strict=True)]
    assert [sum(size for e, size, _ in pieces if e == own) for own in range(len(counts))] == counts
    assert [e for e, _, begins in pieces if begins] == [e for e, count in enumerate(counts) if count]
    assert [e for e, _, _ in pieces] == sorted(e for e, _, _ in pieces)


@given(loads, st.integers(1, 60), st.sampled_from([torch.float32, torch.bfloat16, torch.float16]))
def test_a_layout_holds_every_slot_once_and_fills_up_with_slots_of_the_same_expert(counts, most, dtype):
    slots = sum(counts)
    order = torch.randperm(slots)
    layout = lay_out(order, torch.tensor(counts), most, dtype)
    assert layout.slots[layout.real].tolist() == order.tolist()
    assert len(layout.slots) == sum(block.size for block in layout.blocks) <= rows_at_most(slots, len(counts), dtype)
    assert rows_at_most(slots, len(counts), dtype) <= (2 * slots if dtype != torch.float32 else slots)
    pieces = [piece for block in layout.blocks for piece in zip(block.experts, block.sizes, strict=True)]
    own = iter(layout.slots.split([size for _, size in pieces]))
    of = dict(zip(order.tolist(), torch.repeat_interleave(torch.tensor(counts)).tolist(), strict=True))
    assert all(of[slot] == e for e, _ in pieces for slot in next(own).tolist())
    weights = torch.rand(slots) + 1
    assert layout.scale(weights).sum() == pytest.approx(weights.sum().item())
    assert layout.scale(weights)[layout.real, 0].equal(weights[order])


@given(loads)
def test_in_16_bits_few_shapes_serve_all_loads(counts):
    layout = lay_out(torch.arange(sum(counts)), torch.tensor(counts), 64, torch.bfloat16)
    shapes = {size for block in layout.blocks for size in block.sizes}
    assert shapes <= {1, 2, 4, 8, 16, *range(32, 129, 32)}


@given(st.lists(st.lists(st.integers(-1, 6), min_size=2, max_size=2), max_size=12))
def test_slots_are_sorted_stably_and_those_without_an_expert_lie_behind(rows):
    indices = torch.tensor(rows, dtype=torch.int64).reshape(-1, 2)
    order, counts = sort_by_expert(indices, E)
    flat = [e if 0 <= e < E else E for row in rows for e in row]
    assert order.tolist() == sorted(range(len(flat)), key=lambda slot: flat[slot])
    assert counts.tolist() == [flat.count(e) for e in range(E)]
