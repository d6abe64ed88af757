"""Experts of unequal cost: what they cost, that only the chosen run, and what stays said of them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe import LinearScorer, ModuleExperts, MoE, Router, TopK, load, save
from spectralmoe.experts import FrequencyMixer, HeterogeneousExperts, PatchMixer
from spectralmoe.experts.flops import count_flops
from spectralmoe.units import Sample

C, E, SIZE = 4, 3, 6


def mixers(costs=None):
    return HeterogeneousExperts([PatchMixer(C, rank, window) for rank, window in ((2, 2), (3, 3), (4, 6))], costs=costs)


def images(bank, dispatch="auto", k=1):
    return MoE(Router(LinearScorer(C, E), TopK(k)), bank, unit=Sample(), dispatch=dispatch)


@pytest.mark.parametrize("k", [1, 2])
def test_running_the_chosen_alone_is_running_all_and_masking(k, same):
    layer = images(mixers(), k=k).double()
    x = torch.randn(7, C, SIZE, SIZE, dtype=torch.float64, requires_grad=True)
    all_of_them = torch.stack([layer.experts.expert(x, e) for e in range(E)], 1)
    gates = layer.router(x.mean((2, 3))).gates()
    same(layer(x), (all_of_them * gates[..., None, None, None]).sum(1), [x, *layer.parameters()])


@pytest.mark.parametrize("gradients", [False, True])
def test_each_chosen_module_runs_once_on_its_maps_alone(gradients):
    bank, seen = mixers(), {}
    for e, module in enumerate(bank.experts):
        module.register_forward_hook(lambda _, given, out, e=e: seen.setdefault(e, []).append(len(given[0])))
    with torch.set_grad_enabled(gradients):
        bank(torch.randn(5, C, SIZE, SIZE), torch.tensor([2, 0, 3]))
    assert seen == ({0: [2], 1: [0], 2: [3]} if gradients else {0: [2], 2: [3]})


def test_nothing_to_do_is_nothing():
    with torch.no_grad():
        assert mixers()(torch.randn(0, C, SIZE, SIZE), torch.zeros(E, dtype=torch.int64)).shape == (0, C, SIZE, SIZE)


def test_costs_are_what_runs_on_the_row():
    kernels = [
        nn.Sequential(nn.Conv2d(C, r, k, padding=k // 2), nn.BatchNorm2d(r), nn.Conv2d(r, C, 1))
        for r, k in ((2, 1), (8, 3))
    ]
    before = kernels[1][1].running_mean.clone()
    bank = HeterogeneousExperts(kernels)
    with FlopCounterMode(display=False) as counter:
        kernels[1].eval()(torch.randn(1, C, 5, 7))
    assert bank.costs((C, 5, 7))[1] == counter.get_total_flops() == 2 * 35 * (C * 8 * 9 + 8 * C)
    assert bank.costs().tolist() == [2.0 * (C * 2 + 2 * C), 2.0 * (C * 8 * 9 + 8 * C)]
    assert kernels[0].training
    assert torch.equal(kernels[1][1].running_mean, before)
    assert ModuleExperts(kernels).costs((C, 5, 7)).tolist() == bank.costs((C, 5, 7)).tolist()


def test_transforms_count():
    """Of n numbers 5 n log2 n, or half of it: one over a real 4 x 8 map, there and back, and products between."""
    products = 4 * 5 * 2 * (2 * 2) ** 2 * 2  # 4 x 5 frequencies, two matrices of 4 x 4, for two channels
    assert count_flops(FrequencyMixer(2), (2, 4, 8)) == products + 2 * 2.5 * 64 * 5
    assert count_flops(nn.Identity(), (3,)) == 0
    reach = [count_flops(PatchMixer(C, 2, window), (C, 8, 8)) for window in (1, 2, 4, 8)]
    transforms = [3 * 2.5 * 2 * 64 * bits for bits in (0, 2, 4, 6)]
    assert [cost - reach[0] for cost in reach] == transforms


def test_given_costs_go_with_their_experts(tmp_path):
    bank = mixers([1.0, 2.0, 4.0])
    assert bank.costs((C, SIZE, SIZE)).tolist() == bank.costs().tolist() == [1, 2, 4]
    assert bank.select([2, 0]).costs().tolist() == [4, 1]
    assert bank.averaged([[1], [2]]).costs().tolist() == [2, 4]
    assert mixers().select([2]).costs().tolist() == [2.0 * (8 * C + 4 * 12 + 4 * C)]
    layer = images(bank).eval()
    save(layer, tmp_path)
    again, x = load(tmp_path), torch.randn(3, C, SIZE, SIZE)
    assert again.experts.costs().tolist() == [1, 2, 4]
    assert torch.equal(again(x), layer(x))


def test_misuse(user_error):
    for costs in ([1.0, 2.0], [1.0, 2.0, 0.0], [1.0, 2.0, float("nan")]):
        with user_error("HeterogeneousExperts", "one positive number", "3 modules", str(costs[-1])):
            mixers(costs)


def test_attention_counts():
    """Four maps of 16 x 16 and a network of 32 for each of 10 positions, scores and sums of 10 x 10 x 16."""
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    projections, networks, scores = 4 * 10 * 16 * 16, 2 * 10 * 16 * 32, 2 * 10 * 10 * 16
    assert count_flops(layer, (10, 16)) == 2 * (projections + networks + scores)
