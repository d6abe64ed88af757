"""Modulated experts: F_e(b) = gamma_e(b) * b + beta_e(b), one pass for any weights, and the block around them."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Soft, TopK, attach, load, save
from spectralmoe.experts import ModulatedExperts
from spectralmoe.models import ModulatedBlock

D, E = 6, 4
COUNTS = torch.tensor([3, 0, 4, 1])
FORMS = pytest.mark.parametrize("form", ["linear", "vector"])


def make_block(experts=E, form="linear", selector=None, dim=D):
    return ModulatedBlock(
        MoE(Router(LinearScorer(dim, experts), selector or TopK(2)), ModulatedExperts(experts, dim, form=form))
    )


def modulated(bank, row, e):
    """The equation for one row (D,), one number at a time."""
    values = []
    for d in range(D):
        gamma, beta = bank.bias[e, d], bank.bias[e, D + d]
        if bank.form == "linear":
            gamma = gamma + (bank.weight[e, d] * row).sum()
            beta = beta + (bank.weight[e, D + d] * row).sum()
        values.append(gamma * row[d] + beta)
    return torch.stack(values)


@FORMS
def test_equation(form, same):
    bank = ModulatedExperts(E, D, form=form).double()
    x = torch.randn(8, D, dtype=torch.float64, requires_grad=True)
    experts = [e for e, count in enumerate(COUNTS.tolist()) for _ in range(count)]
    rows = torch.stack([modulated(bank, row, e) for row, e in zip(x, experts, strict=True)])
    same(bank(x, COUNTS), rows, [x, *bank.parameters()])
    weights = torch.randn(8, E, dtype=torch.float64, requires_grad=True)
    mixed = [sum(w * modulated(bank, row, e) for e, w in enumerate(each)) for row, each in zip(x, weights, strict=True)]
    same(bank.mix(x, weights), torch.stack(mixed), [x, weights, *bank.parameters()])


def test_by_hand():
    bank = ModulatedExperts(1, 2)
    bank.weight.data = torch.tensor([[[0.0, 1.0], [0.0, 0.0], [0.0, 0.0], [2.0, 0.0]]])
    bank.bias.data = torch.tensor([[1.0, 3.0, 0.5, 0.0]])
    # gamma = (1 + x_1, 3), beta = (0.5, 2 x_0)
    assert bank(torch.tensor([[2.0, 5.0]]), torch.tensor([1])).tolist() == [[12.5, 19.0]]


@FORMS
def test_mixed_outputs_are_the_output_of_mixed_parameters(form, close):
    bank, share = ModulatedExperts(E, D, form=form), torch.tensor([0.1, 0.4, 0.3, 0.2])
    x, mean = torch.randn(5, D), bank.averaged([range(E)], [share.tolist()])
    close(bank.mix(x, share.expand(5, E)), mean.expert(x, 0))


@FORMS
def test_with_scale_one_and_shift_zero_all_experts_are_the_identity(form):
    bank, x = ModulatedExperts(E, D, form=form), torch.randn(5, D)
    with torch.no_grad():
        for parameter in bank.parameters():
            parameter.zero_()
        bank.bias[:, :D] = 1
    assert all(torch.equal(bank.expert(x, e), x) for e in range(E))


def test_numbers_and_costs():
    bank, vector = ModulatedExperts(E, D), ModulatedExperts(E, D, form="vector")
    assert sum(p.numel() for p in bank.parameters()) == 2 * E * (D * D + D)
    assert sum(p.numel() for p in vector.parameters()) == 2 * E * D
    numbers = {name: p.numel() for name, p in make_block().named_parameters() if p.dim() > 1}
    biases, gate = numbers.pop("moe.experts.bias"), numbers.pop("moe.router.scorer.weight")
    assert (sum(numbers.values()), biases, gate) == (2 * E * D * D + 10 * D * D, 2 * E * D, E * D)
    with FlopCounterMode(display=False) as counter:
        bank.expert(torch.randn(1, D), 1)
    assert bank.costs().tolist() == [counter.get_total_flops() + 2 * D] * E
    assert vector.costs().tolist() == [2 * D] * E


@pytest.mark.parametrize("selector", [TopK(2), Soft()], ids=["topk", "soft"])
def test_the_block_is_its_equation(selector, same):
    block = make_block(selector=selector).double()
    x, rows = torch.randn(2, 3, D, dtype=torch.float64, requires_grad=True), []
    gelu = torch.nn.functional.gelu
    for token in x.flatten(0, 1):
        centred = token - token.mean()
        normal = centred / (centred.square().mean() + 1e-5).sqrt() * block.norm.weight + block.norm.bias
        b = gelu(block.gate.weight @ normal) * (block.value.weight @ normal)
        routing, mixed = block.moe.router(b[None]), 0
        for weight, e in zip(routing.weights[0], routing.indices[0].tolist(), strict=True):
            mixed = mixed + weight * modulated(block.moe.experts, b, e)
        rows.append(token + block.down.weight @ gelu(block.up.weight @ mixed))
    same(block(x), torch.stack(rows).view(2, 3, D), [x, *block.parameters()])


@FORMS
def test_the_block_learns_and_is_saved(form, tmp_path):
    block = make_block(form=form)
    optimizer = torch.optim.Adam(block.parameters(), lr=1e-2)
    attach(optimizer, block)
    x, losses = torch.randn(32, D), []
    for _ in range(30):
        loss = (block(x) - x.flip(1)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    save(block.eval(), tmp_path)
    for twin in (load(tmp_path), copy.deepcopy(block)):
        assert torch.equal(twin(x), block(x))


def test_without_its_residual_path_it_says_what_it_adds(close):
    whole, x = make_block(), torch.randn(5, D)
    bare = ModulatedBlock(whole.moe, residual=False)
    bare.load_state_dict({n: v for n, v in whole.state_dict().items() if not n.startswith("norm.")})
    close(x + bare(whole.norm(x)), whole(x))


def test_an_expert_costs_less_than_a_network_of_its_own():
    def numbers(module):
        return sum(p.numel() for p in module.parameters())

    for experts, share in ((4, 0.6), (16, 0.35)):
        assert numbers(make_block(experts, dim=32)) < share * numbers(FeedForward(experts, 32, 4 * 32))


def test_misuse(user_error):
    with user_error("ModulatedExperts", "'lines'", "linear"):
        ModulatedExperts(2, 4, form="lines")
    with user_error("ModulatedExperts", "width D", "0"):
        ModulatedExperts(2, 0)
    with user_error("ModulatedBlock", "expansion", "0"):
        ModulatedBlock(make_block().moe, expansion=0)
