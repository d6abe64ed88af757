"""Convolutional experts against sums over channels and kernel positions."""

from __future__ import annotations

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe.experts import ConvExperts

COUNTS = torch.tensor([2, 0, 3])


def convolved(x, weight, bias):
    """One map (C, H, W): the sum over input channels and the neighbours that lie inside."""
    (out, channels, size, _), (_, height, width) = weight.shape, x.shape
    rows = []
    for o in range(out):
        for i in range(height):
            for j in range(width):
                total = bias[o]
                for c in range(channels):
                    for a in range(size):
                        for b in range(size):
                            u, v = i + a - size // 2, j + b - size // 2
                            if 0 <= u < height and 0 <= v < width:
                                total = total + weight[o, c, a, b] * x[c, u, v]
                rows.append(total)
    return torch.stack(rows).view(out, height, width)


def slow(bank, x, counts):
    maps, start = [], 0
    for e, count in enumerate(counts.tolist()):
        for one in x[start : start + count]:
            hidden = convolved(one, bank.up[e], bank.up_bias[e])
            hidden = hidden * (1 + torch.erf(hidden / math.sqrt(2))) / 2
            maps.append(convolved(hidden, bank.down[e], bank.down_bias[e]))
        start += count
    return torch.stack(maps)


def test_equation(same):
    bank = ConvExperts(3, channels=2, hidden=2).double()
    x = torch.randn(5, 2, 3, 4, dtype=torch.float64, requires_grad=True)
    same(bank(x, COUNTS), slow(bank, x, COUNTS), [x, *bank.parameters()])
    same(torch.cat([bank.expert(x[:2], 0), bank.expert(x[2:], 2)]), bank(x, COUNTS), [x, *bank.parameters()])


def test_an_expert_without_maps_has_a_gradient_of_zero():
    bank = ConvExperts(3, channels=2, hidden=2)
    bank(torch.randn(5, 2, 3, 4), COUNTS).sum().backward()
    assert not bank.up.grad[1].any()
    assert bank.up.grad[0].any()


@pytest.mark.parametrize("size", [1, 3])
def test_costs_are_what_runs(size):
    bank = ConvExperts(3, channels=2, hidden=4, kernel_size=size)
    with FlopCounterMode(display=False) as counter:
        bank.expert(torch.randn(1, 2, 5, 6), 1)
    assert bank.costs((2, 5, 6)).tolist() == [counter.get_total_flops()] * 3
    assert bank.costs().tolist() == [2.0 * 2 * 2 * 4 * size**2] * 3


def test_misuse(user_error):
    with user_error("kernel_size", "odd", "2"):
        ConvExperts(3, 2, 4, kernel_size=2)
    with user_error("channels", "0"):
        ConvExperts(3, 0, 4)
