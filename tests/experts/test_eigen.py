"""The bank in eigen-form against its equation as a float64 loop, and its bases over many steps."""

from __future__ import annotations

import copy

import pytest
import torch

from spectralmoe import BasisScorer, EigenExperts, LinearScorer, MoE, Router, TopK, attach, load, param_groups, save
from spectralmoe.experts import ConfidentExperts
from spectralmoe.linalg import orthonormality_error
from spectralmoe.spec import build, describe

COUNTS = torch.tensor([3, 0, 4])


def expert(bank, x, e):
    """U_e diag(s_e) V_e' x for one row x, one direction at a time, in float64."""
    left, scale, right = (p[e].double() for p in (bank.left, bank.scale, bank.right))
    return sum(left[:, r] * scale[r] * (right[:, r] * x.double()).sum() for r in range(bank.rank))


def rows_of(bank, x):
    experts = [e for e, count in enumerate(COUNTS.tolist()) for _ in range(count)]
    return torch.stack([expert(bank, row, e) for row, e in zip(x, experts, strict=True)])


@pytest.fixture(params=[(8, 4), (7, 3), (5, 5)], ids=str)
def bank(request):
    bank = EigenExperts(3, *request.param)
    bank.scale.data += 0.3 * torch.randn_like(bank.scale)
    return bank


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_sorted_by_expert(bank, dtype, same):
    bank = bank.to(dtype)
    x = torch.randn(7, bank.dim, dtype=dtype, requires_grad=True)
    same(bank(x, COUNTS), rows_of(bank, x), [x, *bank.parameters()])


def test_one_expert_alone_and_the_dense_form(bank, same):
    bank = bank.double()
    x = torch.randn(4, bank.dim, dtype=torch.float64, requires_grad=True)
    for e in range(3):
        same(bank.expert(x, e), torch.stack([expert(bank, row, e) for row in x]), [x, *bank.parameters()])
    weights = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    rows = [sum(w[e] * expert(bank, row, e) for e in range(3)) for row, w in zip(x, weights, strict=True)]
    same(bank.mix(x, weights), torch.stack(rows), [x, weights, *bank.parameters()])


def test_materialised_matrices_give_the_same(bank, close):
    matrices = bank.left @ bank.scale.diag_embed() @ bank.right.mT
    x = torch.randn(7, bank.dim)
    close(bank(x, COUNTS), torch.cat([x[:3] @ matrices[0].T, x[3:] @ matrices[2].T]))


def test_hidden_are_the_coordinates(bank, close):
    x = torch.randn(7, bank.dim)
    hidden = bank.hidden(x, COUNTS)
    close(hidden, torch.cat([x[:3] @ bank.right[0], x[3:] @ bank.right[2]]))
    assert torch.equal(bank.project(hidden, COUNTS), bank(x, COUNTS))


def test_by_hand():
    bank = EigenExperts(1, 2, 1)
    bank.left.data = torch.tensor([[[0.0], [1.0]]])
    bank.right.data = torch.tensor([[[1.0], [0.0]]])
    bank.scale.data = torch.tensor([[3.0]])
    assert bank(torch.tensor([[2.0, 5.0]]), torch.tensor([1])).tolist() == [[0.0, 6.0]]


def test_bases_start_orthogonal_to_each_other(close):
    bank = EigenExperts(4, 13, 3)
    for bases in (bank.left, bank.right):
        joined = bases.transpose(0, 1).flatten(1)
        close(joined.T @ joined, torch.eye(12))
    crowded = EigenExperts(5, 6, 4)
    assert float(orthonormality_error(crowded.right).max()) < 1e-5


def test_a_rank_outside_its_range_is_refused(user_error):
    for rank in (0, 9):
        with user_error("EigenExperts", "rank R", "D=8", str(rank)):
            EigenExperts(2, 8, rank)


def test_the_mean_of_matrices_is_kept_in_eigen_form(close):
    """Of experts within a common space of R directions the mean is exact; else it is the nearest of rank R."""
    bank = EigenExperts(3, 6, 2).double()
    bank.scale.data = torch.rand(3, 2, dtype=torch.float64) + 0.5
    bank.left.data[1], bank.right.data[1] = bank.left[0].data.flip(1), bank.right[0].data
    matrices = (bank.left @ bank.scale.diag_embed() @ bank.right.mT).detach()
    mean = bank.averaged([[0, 1], [0, 2], [2]], [[1, 3], [1, 1], [1]])
    found = (mean.left @ mean.scale.diag_embed() @ mean.right.mT).detach()
    close(found[0], 0.25 * matrices[0] + 0.75 * matrices[1])
    both = torch.linalg.svdvals((matrices[0] + matrices[2]) / 2)
    close(torch.linalg.matrix_norm(found[1] - (matrices[0] + matrices[2]) / 2), both[2:].norm())
    assert torch.equal(mean.right[2], bank.right[2])
    for bases in (mean.left, mean.right):
        assert float(orthonormality_error(bases[:2]).max()) < 1e-12


def layer_of(*, scorer="basis", dim=16, experts=4, rank=4):
    bank = EigenExperts(experts, dim, rank)
    gate = BasisScorer(dim, experts, bank=bank, score="energy") if scorer == "basis" else LinearScorer(dim, experts)
    return MoE(Router(gate, TopK(2)), bank)


@pytest.mark.parametrize("autocast", [pytest.param(False, marks=pytest.mark.full), True], ids=["fp32", "bf16"])
def test_bases_stay_orthonormal_over_a_thousand_steps(autocast):
    layer = layer_of(dim=12, rank=3)
    optimizer = torch.optim.AdamW(param_groups(layer, 0.1), lr=1e-2)
    attach(optimizer, layer)
    x, target = torch.randn(32, 12), torch.randn(32, 12)
    start = layer.experts.right.detach().clone()
    for step in range(1000):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = (layer(x).float() - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for bases in (layer.experts.left, layer.experts.right) if step % 100 == 99 else ():
            assert float(orthonormality_error(bases).max()) < 1e-5
    assert float((layer.experts.right - start).detach().abs().max()) > 0.1


def test_no_column_flips():
    """Momentum keeps its meaning: each column stays within half a turn of where it was a step before."""
    layer = layer_of(dim=12, rank=3)
    optimizer = torch.optim.AdamW(param_groups(layer, 0.0), lr=3e-2)
    attach(optimizer, layer)
    for x in torch.randn(50, 32, 12):
        before = layer.experts.right.detach().clone()
        (layer(x) - x.flip(1)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        assert ((before * layer.experts.right).sum(1) > 0).all()


def test_inside_a_wrapper_bases_are_retracted_too():
    layer = MoE(Router(LinearScorer(16, 4), TopK(2)), ConfidentExperts(EigenExperts(4, 16, 4)))
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.5)
    attach(optimizer, layer)
    layer(torch.randn(50, 16)).square().sum().backward()
    optimizer.step()
    assert float(orthonormality_error(layer.experts.experts.right).max()) < 1e-5


def test_costs_are_two_thin_products():
    assert EigenExperts(3, 8, 2).costs().tolist() == [2 * 2 * 8 * 2] * 3


def test_saved_copied_and_described(tmp_path):
    layer = layer_of(scorer="linear").eval()
    save(layer, tmp_path)
    x = torch.randn(10, 16)
    assert torch.equal(load(tmp_path)(x), layer(x))
    assert torch.equal(copy.deepcopy(layer)(x), layer(x))
    assert describe(layer.experts) == {"type": "eigen", "num_experts": 4, "dim": 16, "rank": 4}
    assert build(describe(layer.experts)).right.shape == layer.experts.right.shape
