"""Eigenbasis gate: energy shares along orthonormal directions (core.md 2.2 and 9.3, item 4)."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import EigenbasisScorer


def test_equation(same):
    scorer = EigenbasisScorer(5, 4, rank=3, temperature=0.2, eps=0.01).double()
    torch.nn.init.normal_(scorer.gain)
    torch.nn.init.normal_(scorer.bias)
    x = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x:
        z = [scorer.basis[:, j] @ token for j in range(3)]
        total = sum(v**2 for v in z) + 0.01
        e = [v**2 / total for v in z]
        pi = [m.exp() / m.exp().sum() for m in scorer.mask_logits]  # a softmax over experts for each direction
        s = [sum(scorer.gain[j] * pi[j][k] * e[j] for j in range(3)) + scorer.bias[k] for k in range(4)]
        rows.append(torch.stack(s) / 0.2)
    slow = torch.stack(rows)
    same(scorer(x), slow, [x, *scorer.parameters()])


def test_by_hand(close):
    scorer = EigenbasisScorer(3, 2, rank=2, eps=0.0)
    scorer.basis.data = torch.eye(3, 2)
    scorer.mask_logits.data = torch.tensor([[math.log(3.0), 0.0], [0.0, 0.0]])  # masks (3/4, 1/4), (1/2, 1/2)
    scorer.gain.data = torch.tensor([1.0, 2.0])
    scorer.bias.data = torch.tensor([0.0, 0.5])
    x = torch.tensor([[3.0, 1.0, 9.0]])  # shares (0.9, 0.1); the third axis is outside the basis
    close(scorer.energies(x), torch.tensor([[0.9, 0.1]]))
    close(scorer(x), torch.tensor([[0.9 * 0.75 + 0.1, 0.9 * 0.25 + 0.1 + 0.5]]))


def test_energies_are_shares(close):
    scorer = EigenbasisScorer(12, 6, rank=5, eps=1e-12).double()
    energies = scorer.energies(torch.randn(50, 12, dtype=torch.float64))
    assert (energies >= 0).all()
    close(energies.sum(-1), torch.ones(50))
    assert not scorer.energies(torch.zeros(1, 12, dtype=torch.float64)).any()


@pytest.mark.parametrize("scale", [-1.0, 100.0, -0.1])
def test_routing_ignores_scale_and_sign(scale, close):
    scorer = EigenbasisScorer(12, 6, rank=5, eps=1e-13).double()
    x = torch.randn(50, 12, dtype=torch.float64)
    close(scorer(scale * x), scorer(x))


def test_the_map_from_energies_to_logits_is_the_matrix(close):
    scorer = EigenbasisScorer(12, 6, rank=5, temperature=0.3)
    torch.nn.init.normal_(scorer.gain)
    x = torch.randn(20, 12)
    close(scorer(x), scorer.energies(x) @ scorer.matrix.T / 0.3 + scorer.bias / 0.3)
    close(scorer.matrix.sum(0), scorer.gain)  # each direction's mask sums to 1


def test_a_penalty_on_the_retracted_basis_is_inert(gradients):
    scorer = EigenbasisScorer(64, 8, rank=16)
    scorer.basis.data += 0.1 * torch.randn(64, 16)
    scorer.after_step()
    defect = (scorer.basis.T @ scorer.basis - torch.eye(16)).square().sum()
    assert float(gradients(defect, [scorer.basis])[0].abs().max()) < 1e-6


def test_no_column_flips_in_a_thousand_steps():
    scorer = EigenbasisScorer(32, 6, rank=8, temperature=0.1)
    optimizer = torch.optim.AdamW(scorer.parameters(), lr=5e-4, weight_decay=0.0)
    x, target = torch.randn(64, 32), torch.randint(6, (64,))
    start, flips = scorer.basis.detach().clone(), 0
    for _ in range(1000):
        before = scorer.basis.detach().clone()
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(scorer(x), target).backward()
        optimizer.step()
        scorer.after_step()
        flips += int(((before * scorer.basis).sum(0) < 0.9).sum())
    assert flips == 0
    assert float((scorer.basis - start).detach().norm()) > 0.1  # it did move
    assert float((scorer.basis.T @ scorer.basis - torch.eye(8)).detach().abs().max()) < 1e-5


@pytest.mark.parametrize("rank", [0, 5])
def test_a_rank_that_does_not_fit_is_refused(user_error, rank):
    with user_error("EigenbasisScorer", "rank", "D=4", str(rank)):
        EigenbasisScorer(4, 2, rank=rank)
