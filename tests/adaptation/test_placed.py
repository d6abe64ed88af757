"""Corrections of layers whose experts lie in other places of the bank."""

from __future__ import annotations

import copy

import pytest
import torch

from spectralmoe import Placement
from spectralmoe.adaptation import Guard, adapt_one
from spectralmoe.adaptation.update import apply_update
from spectralmoe.compression import replicate

TABLE = [[2], [0], [1]]
HOLDS = [1, 2, 0]  # place -> expert


@pytest.fixture
def moved(pooled):
    """A model, and the same function with its experts in other places; in float64, since steps make rounding grow."""
    model = pooled(k=1).double()
    placed = copy.deepcopy(model)
    for layer in (placed.first, placed.second):
        layer.experts, layer.placement = layer.experts.select(HOLDS), Placement(TABLE)
    return model, placed


@pytest.mark.parametrize("method", ["sgd", "margin", "unit"])
def test_the_expert_is_written_in_its_place(moved, method, snapshot, changed, close, tmp_path):
    model, placed = moved
    samples, candidates = torch.randn(60, 4, 6).double(), torch.randn(20, 1, 4, 6).double()
    with torch.no_grad():
        close(placed(samples), model(samples))
        guard = Guard([(samples, model(samples).argmax(-1))], budget=100.0)
        wanted = [int(model(x)[0].topk(2).indices[1]) for x in candidates]
    before, state = copy.deepcopy(placed), snapshot(placed)
    for x, y in zip(candidates, wanted, strict=True):  # the first that this method corrects
        update, twin = (adapt_one(one, x, y, method=method, lr=0.1, guard=guard) for one in (model, placed))
        assert update.touched == twin.touched
        if twin.success:
            break
    assert twin.success
    ((layer, expert),) = twin.touched.items()
    names = changed(placed, state)
    assert names
    assert all(name.startswith(f"{layer}.experts.") and name.endswith(f"[{TABLE[expert][0]}]") for name in names)
    torch.testing.assert_close(placed(samples), model(samples), rtol=1e-5, atol=1e-5)
    twin.save(tmp_path / "update.safetensors")
    apply_update(before, tmp_path / "update.safetensors")
    assert torch.equal(before(x), placed(x))


def test_replicas_are_refused(pooled, user_error):
    many = replicate(pooled(), {"second": [2, 2, 2]})
    with torch.no_grad():
        x = torch.randn(1, 4, 6)
        y = int(many(x).argmin())
    with user_error("layer 'second'", "replicated or merged"):
        adapt_one(many, x, y)
