"""Every dispatch equals the loop: in output and in the gradient of tokens, router and experts."""

from __future__ import annotations

import copy
from functools import partial

import pytest
import torch
from grids import one_of_each
from small_parts import make_bank
from torch import nn

from spectralmoe import (
    EigenExperts,
    Experts,
    FeedForward,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    Selector,
    Soft,
    TopK,
)
from spectralmoe.dispatch import DISPATCHES, Dense, Grouped, pick_dispatch
from spectralmoe.dispatch.base import combine, sort_slots, spread
from spectralmoe.experts import EXPERTS, Answer, ConfidentExperts, ModulatedExperts

E = 4  # experts of the banks; routers know two more, which are zero experts


class Fixed(Selector):
    """Chooses what it was told."""

    def __init__(self, indices):
        super().__init__()
        self.indices = indices

    def choose(self, logits, *, mask=None, context=None):
        return self.indices


class Gained(FeedForward):
    """A bank with a gain."""

    def __init__(self, dim, hidden):
        super().__init__(E, dim, hidden)
        self.scale = nn.Parameter(torch.randn(dim))

    def answer(self, x, e):
        return Answer(super().expert(x, e), (x @ self.scale.to(x.dtype)).sigmoid())

    expert, forward, mix = Experts.expert, Experts.forward, Experts.mix


def confident(dim, hidden):
    bank = ConfidentExperts(FeedForward(E, dim, hidden))
    nn.init.normal_(bank.direction)
    nn.init.normal_(bank.bias)
    return bank


BANKS = {
    **{name: (8, partial(make_bank, name, 8, E)) for name, cls in EXPERTS.items() if cls.row_dims in (None, 1)},
    "relu-bias-odd": (7, lambda: FeedForward(E, 7, 5, activation="relu", bias=True)),
    "swiglu": (8, lambda: FeedForward(E, 8, 12, activation="swiglu")),
    "swiglu-bias": (8, lambda: FeedForward(E, 8, 12, activation="swiglu", bias=True)),
    "gelu-bias-odd": (7, lambda: FeedForward(E, 7, 5, bias=True)),
    "eigen-odd": (7, lambda: EigenExperts(E, 7, 3)),
    "gain": (8, lambda: Gained(8, 12)),
    "gain-odd": (7, lambda: Gained(7, 5)),
    "confident": (8, lambda: confident(8, 12)),
    "modulated-odd": (7, lambda: ModulatedExperts(E, 7)),
    "vectors": (8, lambda: ModulatedExperts(E, 8, form="vector")),
}


def distinct(n, experts, k=2):
    """k different ones of ``experts`` for each token."""
    rows = [[experts[i] for i in torch.randperm(len(experts))[:k]] for _ in range(n)]
    return torch.tensor(rows, dtype=torch.int64).reshape(n, k)


def with_holes(indices):
    indices = indices.masked_fill(torch.rand(indices.shape) < 0.3, -1)
    indices[3] = -1
    return indices


CHOICES = {
    "even": lambda: distinct(23, range(E)),
    "empty-expert": lambda: distinct(23, [0, 1, 3]),
    "one-token": lambda: distinct(1, range(E)),
    "no-token": lambda: distinct(0, range(E)),
    "collapse": lambda: torch.full((23, 1), 2),
    "zero-experts": lambda: distinct(23, range(E + 2)),
    "zero-experts-only": lambda: distinct(23, [E, E + 1]),
    "empty-slots": lambda: with_holes(distinct(23, range(E + 2), 3)),
    "nothing": lambda: torch.full((23, 2), -1),
    "all-experts": lambda: distinct(23, range(E), E),
}

OTHERS = [name for name in DISPATCHES if name != "loop"]


def tokens(bank, indices, dim):
    """Random tokens, none so near the kink of a ReLU that rounding to bf16 decides on which side it lies."""
    many = torch.randn(100 * len(indices), dim)
    if getattr(bank, "activation", None) == "relu":
        hidden = torch.einsum("nd,ehd->neh", many, bank.up.float()) + bank.up_bias.float()[None]
        many = many[(hidden.abs() > 0.02).all(-1).all(-1)]
    assert len(many) >= len(indices)
    return many[: len(indices)]


@pytest.fixture
def check(close, gradients):
    """Compare the output and the gradient in tokens and parameters with the loop in (at least) fp32."""

    def run(layer, x, direction):
        x = x.clone().requires_grad_()
        y = layer(x)
        return [y, *gradients((y * direction).sum(), [x, *layer.parameters()])]

    def check(bank, choice, dispatch, dtype, autocast=False):
        dim, make_bank = BANKS[bank]
        indices = CHOICES[choice]()
        layer = MoE(Router(LinearScorer(dim, E + 2, bias=True), Fixed(indices)), make_bank()).to(dtype)
        wide = torch.promote_types(dtype, torch.float32)
        reference = copy.deepcopy(layer).to(wide)
        reference.dispatch, layer.dispatch = "loop", dispatch
        x, direction = tokens(reference.experts, indices, dim).to(dtype), torch.randn(len(indices), dim).to(dtype) / 4
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            results = run(layer, x, direction)
        arithmetic = torch.bfloat16 if autocast else dtype
        assert results[0].dtype == arithmetic
        for one, two in zip(results, run(reference, x.to(wide), direction.to(wide)), strict=True):
            close(one.to(wide), two, arithmetic)

    return check


class InFloat(nn.Linear):
    """A module that ends in another dtype than its rows: in float32, as a norm does under autocast."""

    def forward(self, x):
        return super().forward(x).float()


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16", "autocast"])
@pytest.mark.parametrize("k", [1, 2, E])
@pytest.mark.parametrize("tokens", [0, 9])
def test_outputs_have_the_dtype_of_the_rows(autocast, k, tokens, close, gradients):
    bank = ConfidentExperts if k == 2 else lambda inner: inner
    modules = ModuleExperts([InFloat(8, 8) for _ in range(E)])
    modules.dim = 8
    layer = MoE(Router(LinearScorer(8, E), TopK(k) if k < E else Soft()), bank(modules))
    x = torch.randn(tokens, 8)
    layer, x = (layer, x) if autocast else (layer.bfloat16(), x.bfloat16())
    found = []
    for dispatch in ("auto", "loop", "dense", "grouped"):
        layer.dispatch, rows = dispatch, x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            y = layer(rows)
        assert y.dtype == torch.bfloat16
        found.append([y, *gradients(y.float().square().sum(), [rows, *layer.parameters()])])
    for others in found[1:]:
        for one, two in zip(others, found[1], strict=True):
            close(one.float(), two.float(), torch.bfloat16)


@pytest.mark.grid(bank=BANKS, choice=CHOICES, dispatch=OTHERS, dtype=[torch.float32, torch.float64])
def test_equals_the_loop(bank, choice, dispatch, dtype, check):
    check(bank, choice, dispatch, dtype)


@one_of_each(bank=BANKS, choice=CHOICES, dispatch=DISPATCHES)
def test_autocast_stays_near_the_fp32_loop(bank, choice, dispatch, check):
    check(bank, choice, dispatch, torch.float32, autocast=True)


@one_of_each(bank=BANKS, choice=CHOICES, dispatch=DISPATCHES)
def test_bf16_stays_near_the_fp32_loop(bank, choice, dispatch, check):
    check(bank, choice, dispatch, torch.bfloat16)


@pytest.mark.gpu
@pytest.mark.grid(bank=BANKS, dispatch=OTHERS, autocast=[False, True])
def test_on_a_gpu_it_is_near_the_loop_and_repeats_itself(bank, dispatch, autocast, close):
    dim, make_bank = BANKS[bank]
    indices, x = CHOICES["empty-slots"](), torch.randn(23, dim)
    layer = MoE(Router(LinearScorer(dim, E + 2), Fixed(indices)), make_bank(), dispatch="loop")
    expected = layer(x)
    layer = layer.cuda()
    layer.dispatch, layer.router.selector.indices = dispatch, indices.cuda()
    with torch.autocast("cuda", torch.bfloat16, enabled=autocast):
        one, two = layer(x.cuda()), layer(x.cuda())
    assert torch.equal(one, two)
    close(one.float().cpu(), expected, torch.bfloat16 if autocast else torch.float32)


@pytest.mark.parametrize("dispatch", DISPATCHES)
def test_by_hand(dispatch):
    class Scale(nn.Module):
        def __init__(self, factor):
            super().__init__()
            self.factor = factor

        def forward(self, x):
            return self.factor * x

    layer = MoE(
        Router(LinearScorer(1, 3), Fixed(torch.tensor([[1, 0], [2, 1], [-1, -1]]))),
        ModuleExperts([Scale(1.0), Scale(10.0)]),
    )
    layer.dispatch = dispatch
    layer.router.scorer.weight.data.zero_()  # every weight is 1/3; expert 2 is a zero expert
    y = layer(torch.tensor([[3.0], [6.0], [9.0]]))
    assert y.flatten().tolist() == pytest.approx([11.0, 20.0, 0.0])


@pytest.mark.parametrize("choice", CHOICES)
def test_sorted_slots_undo_each_other(choice, close):
    indices = CHOICES[choice]()
    router = Router(LinearScorer(8, E + 2), Fixed(indices))
    x = torch.randn(len(indices), 8)
    routing = router(x)
    slots = sort_slots(routing, E)
    flat = indices.flatten().tolist()
    expected = sorted((s for s, e in enumerate(flat) if 0 <= e < E), key=lambda s: (flat[s], s))
    assert slots.order.tolist() == expected
    assert slots.counts.tolist() == [flat.count(e) for e in range(E)]
    rows = spread(x, slots)
    assert torch.equal(rows, x[[s // indices.shape[1] for s in expected]])
    close(combine(rows, routing.weights, slots), x * routing.gates()[:, :E].sum(-1, keepdim=True))


def test_soft_routing_is_mixed_and_the_rest_is_sorted():
    bank, x = FeedForward(E, 8, 8), torch.randn(5, 8)
    assert isinstance(pick_dispatch(Router(LinearScorer(8, E), Soft())(x), bank), Dense)
    assert isinstance(pick_dispatch(Router(LinearScorer(8, E), TopK(2))(x), bank), Grouped)
