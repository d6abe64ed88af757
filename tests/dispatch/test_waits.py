"""How often the grouped dispatch asks the device for a number: the host then waits until all work before is done.

Here on a CPU, selector by selector; tests/test_device.py has a stand-in for a device, and all that a layer is made of.
"""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from spectralmoe import FeedForward, LinearScorer, MoE, Router
from spectralmoe.placement import Placement

E, D = 6, 16
KNOWN = {"topk", "noisy_topk", "balanced", "soft", "soft_balanced", "group_limited", "entmax", "unweighted"}
"""Selectors that fill every slot of a real token."""


class Composed(FeedForward):
    """A bank that the operator for a CPU does not know, so that the form of a device runs."""

    def forward(self, x, counts):
        return super().forward(x, counts)


class Asked(TorchDispatchMode):
    """Counts the numbers that are read from tensors."""

    def __init__(self):
        super().__init__()
        self.times = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times += func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default)
        return func(*args, **(kwargs or {}))


def layer_of(selector, zero_experts=0):
    bank = Composed(E - zero_experts, D, 32)
    return MoE(Router(LinearScorer(D, E), selector), bank, dispatch="grouped")


def asked(layer, **options):
    x = torch.randn(20, D, requires_grad=True)
    with Asked() as mode:
        layer(x, **options).square().sum().backward()
    return mode.times


def test_nobody_asks_where_all_slots_are_known_to_be_filled(make_selector, selector_name):
    layer = layer_of(make_selector(selector_name))
    assert layer.router.selector.fills == (selector_name in KNOWN)
    assert asked(layer) == (selector_name not in KNOWN)


def test_a_mask_a_replay_or_a_zero_expert_may_leave_slots_without_rows(make_selector):
    layer = layer_of(make_selector("topk"))
    assert asked(layer, mask=torch.ones(20, dtype=torch.bool)) == 1
    x = torch.randn(20, D)
    routing = layer.router(x)
    assert routing.full
    assert not layer.router(x, replay=routing).full
    assert asked(layer_of(make_selector("topk"), zero_experts=2)) == 1


@pytest.mark.parametrize(
    ("table", "times"),
    [([[5], [4], [3], [2], [1], [0]], 0), ([[0, 5], [1], [2], [3], [4], [0]], 0), ([[0], [1], [], [3], [4], [5]], 1)],
    ids=["moved", "replicas", "zero expert"],
)
def test_placed_experts(make_selector, table, times, same):
    router = Router(LinearScorer(D, E), make_selector("topk"))
    layer = MoE(router, Composed(E, D, 32), dispatch="grouped", placement=Placement(table))
    assert asked(layer) == times
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    y = layer.double()(x)
    layer.dispatch = "loop"
    same(y, layer(x), [x, *layer.parameters()])


@pytest.mark.parametrize("zero_experts", [0, 2])
def test_the_sum_is_that_of_the_loop(make_selector, selector_name, zero_experts, same):
    layer = layer_of(make_selector(selector_name), zero_experts).double().eval()
    x = torch.randn(20, D, dtype=torch.float64, requires_grad=True)
    y = layer(x)
    layer.dispatch = "loop"
    same(y, layer(x), [x, *layer.parameters()])
