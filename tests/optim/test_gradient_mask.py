"""mask_gradient: one draw a step, all or nothing; mask_central around the optimizer of a row."""

import copy

import pytest
import torch
from seeds import generator, shifted
from torch import nn
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

from spectralmoe import LinearScorer, MoE, Router, TopK
from spectralmoe.experts import ConfidentExperts, FeedForward, MPOExperts
from spectralmoe.optim import mask_central, mask_gradient


def draws(count, keep, seed):
    generator = torch.Generator().manual_seed(seed)
    return [bool(torch.rand((), generator=generator) < keep) for _ in range(count)]


def test_each_step_keeps_the_whole_gradient_or_none_of_it_by_one_draw():
    """Several backward passes a step add up as without a mask, or to nothing."""
    core = nn.Parameter(torch.zeros(3))
    handle = mask_gradient(core, 0.4, generator=torch.Generator().manual_seed(5))
    optimizer, kept = torch.optim.SGD([core], lr=1.0), []
    for step in range(40):
        for _ in range(1 + step % 3):
            (core * torch.tensor([1.0, 2.0, -3.0])).sum().backward()
        kept.append(bool(core.grad.any()))
        assert core.grad.tolist() == [(1 + step % 3) * kept[-1] * each for each in (1.0, 2.0, -3.0)]
        optimizer.step()
        optimizer.zero_grad()
    assert kept == draws(40, 0.4, 5)
    handle.remove()
    core.sum().backward()
    assert core.grad.tolist() == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("keep", [0.0, 1.0])
def test_never_and_always(keep):
    bank = MPOExperts(3, 8, 8)
    for core in bank.central:
        mask_gradient(core, keep)
    twin = copy.deepcopy(bank)  # a copy has no hooks
    x, counts = torch.randn(5, 8), torch.tensor([2, 0, 3])
    for each in (bank, twin):
        each(x, counts).square().sum().backward()
    for (name, ours), theirs in zip(bank.named_parameters(), twin.parameters(), strict=True):
        assert torch.equal(ours.grad, theirs.grad * (keep if "central" in name else 1.0)), name


def layer_of(seed=0):
    torch.manual_seed(shifted(seed))
    return MoE(Router(LinearScorer(8, 4), TopK(2)), ConfidentExperts(MPOExperts(4, 8, 8)))


def steps(layer, optimizer, batches):
    """Which central cores move at each step."""
    moved = []
    for x in batches:
        before = [core.detach().clone() for core in layer.experts.experts.central]
        optimizer.zero_grad()
        layer(x).square().mean().backward()
        optimizer.step()
        moved += [not torch.equal(b, core) for b, core in zip(before, layer.experts.experts.central, strict=True)]
    return moved


def test_around_an_optimizer_cores_move_one_step_in_e_and_each_by_its_own_draws():
    layer, batches = layer_of(), torch.randn(60, 9, 8, generator=generator(1))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    mask_central(optimizer, layer, seed=3)
    moved = steps(layer, optimizer, batches)
    assert [moved[0::2], moved[1::2]] == [draws(60, 1 / 4, 6), draws(60, 1 / 4, 7)]


def test_a_run_that_goes_on_from_a_checkpoint_goes_on_with_its_draws():
    batches, runs = torch.randn(12, 9, 8, generator=generator(1)), []
    for stops in (False, True):
        layer = layer_of()
        optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
        mask_central(optimizer, layer, keep=0.5)
        moved = steps(layer, optimizer, batches[:5])
        if stops:
            weights, state = layer.state_dict(), copy.deepcopy(optimizer.state_dict())
            layer = layer_of(7)
            layer.load_state_dict(weights)
            optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
            mask_central(optimizer, layer, keep=0.5)
            optimizer.load_state_dict(state)
        runs.append((moved + steps(layer, optimizer, batches[5:]), layer.experts.experts.up.central))
    assert runs[0][0] == runs[1][0]
    assert torch.equal(runs[0][1], runs[1][1])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_distributed_checkpoints_keep_the_draws(tmp_path):
    batches, layers = torch.randn(12, 9, 8, generator=generator(1)), [layer_of(), layer_of(7)]
    optimizers = [torch.optim.AdamW(layer.parameters(), lr=0.1) for layer in layers]
    for optimizer, layer in zip(optimizers, layers, strict=True):
        mask_central(optimizer, layer, keep=0.5)
    steps(layers[0], optimizers[0], batches[:5])
    dcp.save({"optimizer": get_optimizer_state_dict(layers[0], optimizers[0])}, checkpoint_id=tmp_path)
    read = {"optimizer": get_optimizer_state_dict(layers[1], optimizers[1])}
    dcp.load(read, checkpoint_id=tmp_path)
    layers[1].load_state_dict(layers[0].state_dict())
    set_optimizer_state_dict(layers[1], optimizers[1], read["optimizer"])
    one, two = (steps(*each, batches[5:]) for each in zip(layers, optimizers, strict=True))
    assert one == two
    assert torch.equal(*(layer.experts.experts.up.central for layer in layers))


def test_mistakes_are_named(user_error):
    core = nn.Parameter(torch.ones(2))
    for keep in (-0.1, 1.5):
        with user_error("mask_gradient", "between 0 and 1", str(keep)):
            mask_gradient(core, keep)
    for tensor in (2 * core, core.detach()):
        with user_error("mask_gradient", "no gradient"):
            mask_gradient(tensor, 0.5)
    bank = FeedForward(2, 4, 4)
    with user_error("mask_central", "no central core", '"mpo"'):
        mask_central(torch.optim.SGD(bank.parameters(), lr=0.1), bank)


@pytest.mark.parametrize("fused", [False, True])
def test_a_fused_optimizer_draws_at_every_step_too(fused):
    """It changes parameters without a trace, so steps are counted."""
    bank, kept = MPOExperts(4, 8, 8), []
    optimizer = torch.optim.AdamW(bank.parameters(), lr=1e-3, fused=fused)
    mask_central(optimizer, bank, keep=0.5, seed=3)
    for _ in range(30):
        optimizer.zero_grad()
        bank(torch.ones(4, 8), torch.tensor([1, 1, 1, 1])).square().sum().backward()
        kept.append(bool(bank.up.central.grad.any()))
        optimizer.step()
    assert kept == draws(30, 0.5, 6)


def test_a_mask_after_the_checkpoint_was_loaded_goes_on_with_its_draws():
    one, two = MPOExperts(4, 8, 8), MPOExperts(4, 8, 8)
    first, second = (torch.optim.SGD(bank.parameters(), lr=0.1) for bank in (one, two))
    mask_central(first, one, keep=0.5)

    def kept(bank, optimizer):
        optimizer.zero_grad()
        bank(torch.ones(4, 8), torch.tensor([1, 1, 1, 1])).square().sum().backward()
        found = bool(bank.up.central.grad.any())
        optimizer.step()
        return found

    for _ in range(7):
        kept(one, first)
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    mask_central(second, two, keep=0.5)
    assert [kept(two, second) for _ in range(20)] == [kept(one, first) for _ in range(20)]
