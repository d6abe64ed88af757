"""Any modules as experts, and the defaults that every bank inherits."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from spectralmoe import Experts, ModuleExperts


@pytest.fixture
def bank():
    return ModuleExperts([nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 4)), nn.Identity()])


@pytest.mark.parametrize("counts", [[2, 3, 1], [0, 6, 0], [0, 0, 6]], ids=str)
def test_rows_go_to_their_module(bank, counts, close):
    x = torch.randn(6, 4)
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [bank.experts[e](row) for row, e in zip(x, experts, strict=True)]
    close(bank(x, torch.tensor(counts)), torch.stack(rows))


def test_no_rows(bank):
    assert bank(torch.randn(0, 4), torch.tensor([0, 0, 0])).shape == (0, 4)


def test_rows_behind_the_last_block_are_left_zero(bank):
    y = bank(torch.randn(6, 4), torch.tensor([2, 1, 1]))
    assert not y[4:].any()


def test_mixing(bank, close):
    x, weights = torch.randn(5, 4), torch.randn(5, 3)
    rows = [sum(w[e] * bank.experts[e](row) for e in range(3)) for row, w in zip(x, weights, strict=True)]
    close(bank.mix(x, weights), torch.stack(rows))


def test_expert_parameters_belong_to_one_module(bank):
    assert bank.expert_parameters(1)["0.weight"] is bank.experts[1][0].weight
    assert bank.expert_parameters(2) == {}


def test_a_bank_has_nothing_to_show_unless_it_says_so():
    bank = Experts(2)
    assert bank.hidden(torch.zeros(1, 4), torch.tensor([1, 0])) is None
    assert bank.expert_parameters(0) == {}


def test_an_empty_bank_is_refused(user_error):
    with user_error("ModuleExperts", "num_experts", "0"):
        ModuleExperts([])


def test_a_module_that_takes_no_zero_rows_is_named(user_error):
    class Viewed(nn.Linear):
        def forward(self, x):
            return super().forward(x.view(len(x), -1))

    class Broken(nn.Module):
        def forward(self, x):
            raise KeyError("mine")

    bank = ModuleExperts([nn.Identity(), Viewed(4, 4), Broken()])
    with user_error("expert 1 (Viewed)", "zero rows", "(0, 4)", "reshape"):
        bank(torch.randn(5, 4), torch.tensor([5, 0, 0]))
    with torch.no_grad():
        assert bank(x := torch.randn(5, 4), torch.tensor([5, 0, 0])).equal(x)
    with pytest.raises(KeyError, match="mine"):
        bank(torch.randn(5, 4), torch.tensor([0, 3, 2]))


def test_an_idle_expert_is_recomputed():
    bank, x = ModuleExperts([nn.Linear(4, 4) for _ in range(3)]), torch.randn(5, 4)
    for counts in ([5, 0, 0], [0, 0, 5]):  # recomputation ends early, which torch does by an exception
        checkpoint(bank, x, torch.tensor(counts), use_reentrant=False).square().sum().backward()
    assert all(p.grad is not None for p in bank.parameters())


def test_an_idle_expert_has_a_zero_gradient():
    bank = ModuleExperts([torch.nn.Linear(4, 4) for _ in range(3)])
    bank(torch.randn(5, 4), torch.tensor([2, 0, 3])).sum().backward()
    assert all(p.grad is not None for p in bank.parameters())
    assert not any(p.grad.any() for p in bank.experts[1].parameters())
