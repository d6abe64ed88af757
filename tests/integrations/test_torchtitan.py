"""The contract of torchtitan's router, without torchtitan: three tensors, K experts for every token."""

from __future__ import annotations

import importlib
import sys

import pytest
import torch
from seeds import generator

from spectralmoe import attach, feed, record
from spectralmoe.context import Context
from spectralmoe.integrations.torchtitan import SpectralRouter
from spectralmoe.presets import find_preset

DIM, EXPERTS, K, TOKENS = 12, 6, 2, 7


def built(row, top_k=K):
    return SpectralRouter.Config(row=row, dim=DIM, num_experts=EXPERTS, top_k=top_k).build()


def tokens(seed=0):
    return torch.randn(TOKENS, DIM, generator=generator(seed))


class Layer(torch.nn.Module):
    """The part of torchtitan's layer that meets the router: every expert is a linear map, its tokens are gathered."""

    def __init__(self, row):
        super().__init__()
        self.router, self.experts = built(row), torch.nn.Parameter(torch.randn(EXPERTS, DIM, DIM) / 4)

    def forward(self, x):
        scores, ids, all_scores = self.router(x, None)
        chosen = torch.zeros_like(all_scores, dtype=torch.bool).scatter(-1, ids, True)
        outputs = torch.einsum("td,tkde->tke", x.to(self.experts), self.experts[ids])
        return (scores[..., None] * outputs).sum(1), chosen.sum(0)


@pytest.mark.parametrize("row", ["linear", "sr-moe", "emoe", "l2r", "linear+balanced"])
def test_three_tensors(row, close):
    router, x = built(row), tokens()
    scores, ids, all_scores = router(x)
    routing = router.router(x)
    assert (scores.shape, ids.shape, all_scores.shape) == ((TOKENS, K), (TOKENS, K), (TOKENS, EXPERTS))
    assert (scores.dtype, ids.dtype, all_scores.dtype) == (torch.float32, torch.int64, torch.float32)
    assert int(ids.min()) >= 0
    assert all(len(set(row)) == K for row in ids.tolist())
    for value, name in ((scores, "weights"), (ids, "indices"), (all_scores, "scores")):
        close(value.double(), getattr(routing, name).double(), torch.float32)
    scores.sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in router.parameters())


@pytest.mark.parametrize("row", ["sr-moe", "emoe", "l2r"])
def test_a_tiny_layer_trains_and_its_bias_moves(row):
    layer, target = Layer(row), tokens(1)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.01)
    attach(optimizer, layer)
    losses = []
    for _ in range(20):
        with record(layer) as tape:
            y, counts = layer(tokens())
        assert torch.equal(counts, tape[0].routing.counts())
        losses.append((y - target).square().mean())
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1] < losses[0]
    bias = getattr(layer.router.router.selector, "bias", None)
    assert bias is None or bool(bias.any())
    assert layer.router.terms.keys() == find_preset(row).terms.keys()


@pytest.mark.parametrize("row", ["sr-moe", *(pytest.param(row, marks=pytest.mark.full) for row in ("emoe", "l2r"))])
def test_compiled_and_under_autocast_as_eager(row, close):
    torch.compiler.reset()
    router, x = built(row), tokens().bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = torch.compile(router, backend="aot_eager", fullgraph=True)(x)
    for value, eager in zip(found, router(x), strict=True):
        close(value.double(), eager.double(), torch.float32)
    assert found[0].dtype == torch.float32


def test_built_without_memory_and_drawn_afterwards(close):
    with torch.device("meta"):
        router = built("linear+balanced")
    router.to_empty(device="cpu")
    torch.manual_seed(0)
    router.init_states(buffer_device=None)
    torch.manual_seed(0)
    expected = built("linear+balanced").state_dict()
    for name, value in router.state_dict().items():
        close(value, expected[name])


def test_side_information_comes_by_feed(close):
    router, severity = built({"scorer": "context"}), torch.rand(TOKENS, generator=generator(2))
    with feed(router, context=Context(tokens={"severity": severity})):
        scores, _, _ = router(tokens())
    close(scores, router.router(tokens(), context={"severity": severity}).weights)


@pytest.mark.parametrize("row", [{"scorer": "linear", "selector": "topp", "p": 0.5}, "ermoe-context", "moec"])
def test_a_row_that_leaves_slots_empty_or_brings_experts_is_refused(row, user_error):
    with user_error("torchtitan"):
        built(row)


def test_what_the_dispatch_cannot_take_is_refused(user_error):
    router = built("linear")
    with user_error("load_balance_coeff=None"):
        router(tokens(), torch.zeros(EXPERTS))
    with user_error("top_k = 2"), feed(router, mask=torch.arange(TOKENS) > 2):
        router(tokens())
    with user_error("top_k = 2", "3 slots"):
        built({"scorer": "linear", "selector": {"type": "topk", "k": 3}})(tokens())


def test_megatron_is_asked_for_by_one_line(monkeypatch, user_error):
    monkeypatch.setitem(sys.modules, "megatron", None)
    for name in [name for name in sys.modules if name.startswith(("megatron.", "spectralmoe.integrations.megatron"))]:
        monkeypatch.delitem(sys.modules, name)
    with user_error("pip install spectralmoe[megatron]"):
        importlib.import_module("spectralmoe.integrations.megatron")
