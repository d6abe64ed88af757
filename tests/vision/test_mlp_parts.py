"""Gated MLPs are stacked where the gate is SiLU, however their layers are named and packed."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from spectralmoe import FeedForward, LinearScorer, ModuleExperts, Router, TopK
from spectralmoe.vision import BranchSpec, replace_mlp
from spectralmoe.vision.mlp_parts import parts_of


class Gated(nn.Module):
    """Llama's: gate_proj, up_proj, down_proj; with ``order`` the other way round."""

    def __init__(self, act=F.silu, bias=False, hidden=12, swapped=False, dropout=0.0):
        super().__init__()
        self.gate_proj, self.up_proj = nn.Linear(8, hidden, bias=bias), nn.Linear(8, hidden, bias=bias)
        self.down_proj, self.act = nn.Linear(hidden, 8, bias=bias), act
        self.swapped, self.dropout = swapped, dropout

    def forward(self, x):
        gate, up = self.gate_proj(x), self.up_proj(x)
        h = self.act(up) * gate if self.swapped else self.act(gate) * up
        return F.dropout(self.down_proj(h), self.dropout, self.training)


class Packed(nn.Module):
    """One layer of 2H rows, and no module for the activation."""

    def __init__(self, last=False, bias=True, conv=False):
        super().__init__()
        kind = (lambda a, b: nn.Conv2d(a, b, 1, bias=bias)) if conv else (lambda a, b: nn.Linear(a, b, bias=bias))
        self.w12, self.w3, self.last, self.dim = kind(8, 24), kind(12, 8), last, 1 if conv else -1

    def forward(self, x):
        one, two = self.w12(x).chunk(2, self.dim)
        return self.w3(one * F.silu(two) if self.last else F.silu(one) * two)


class Norm(Gated):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(8)

    def forward(self, x):
        return self.norm(super().forward(x))


class TwoInputs(Gated):
    def forward(self, x, y):
        return super().forward(x + y)


STACKED = {
    "llama": Gated,
    "biases": lambda: Gated(bias=True),
    "swapped": lambda: Gated(swapped=True),
    "square": lambda: Gated(hidden=8),
    "square swapped": lambda: Gated(hidden=8, bias=True, swapped=True),
    "module": lambda: Gated(act=nn.SiLU()),
    "packed": Packed,
    "packed last": lambda: Packed(last=True, bias=False),
    "packed convolution": lambda: Packed(conv=True),
}
MODULES = {
    "geglu": lambda: Gated(act=F.gelu),
    "reglu": lambda: Gated(act=F.relu),
    "bilinear": lambda: Gated(act=lambda x: x),
    "quick": lambda: Gated(act=lambda x: x * torch.sigmoid(1.702 * x)),
    "dropout": lambda: Gated(dropout=0.5),
    "norm": Norm,
}


def model_of(mlp):
    model = nn.Module()
    model.blocks = nn.ModuleList([nn.Module()])
    model.blocks[0].mlp = mlp
    return model


def spec(experts=3):
    return BranchSpec(
        router=lambda d, e: Router(LinearScorer(d, e), TopK(2, normalize=True)), experts=experts, blocks="all"
    )


@pytest.mark.parametrize("name", [*STACKED, *MODULES])
def test_what_is_stacked_computes_the_same(name, close):
    mlp = (STACKED | MODULES)[name]().double().eval()
    x = torch.randn(2, 8, 3, 5).double() if "convolution" in name else torch.randn(2, 5, 8).double()
    expected = mlp(x)
    layer = replace_mlp(model_of(mlp), spec()).blocks[0].mlp
    close(layer(x), expected)
    assert isinstance(layer.experts, FeedForward if name in STACKED else ModuleExperts)
    if name in STACKED:
        assert (layer.experts.activation, layer.experts.width) == ("swiglu", mlp_width(mlp))


def mlp_width(mlp):
    return (mlp.down_proj if isinstance(mlp, Gated) else mlp.w3).weight.shape[1]


def test_a_gate_that_is_nearly_closed_is_read_by_its_form():
    """The reading does not depend on the weights that are there: gate and value may be zero, or alike."""
    mlp = Gated(swapped=True)
    nn.init.zeros_(mlp.gate_proj.weight)
    state = torch.get_rng_state()
    parts = parts_of(mlp)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(parts.up, torch.cat([mlp.up_proj.weight, mlp.gate_proj.weight]))


def test_what_takes_more_than_tokens_is_no_mlp():
    assert parts_of(TwoInputs()) is None
    assert parts_of(nn.Sequential(nn.Linear(8, 12), nn.Linear(12, 8))) is None


def test_a_llama_of_transformers_becomes_stacked_experts():
    pytest.importorskip("transformers")
    from dense_models import dense_model, ids

    model, expected = dense_model("llama")
    replace_mlp(model.model, spec(4))
    banks = [layer.mlp.experts for layer in model.model.layers]
    assert all(isinstance(bank, FeedForward) and bank.activation == "swiglu" for bank in banks)
    torch.testing.assert_close(model(ids()).logits, expected, atol=1e-5, rtol=1e-5)
