"""Grouped GEMM: each row times its own expert's matrix, by both forms of the operation."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck, gradgradcheck

from spectralmoe.experts.grouped_gemm import _grouped_gemm, grouped_linear, row_experts, supports_grouped_mm

COUNTS = {"even": [3, 3, 3], "empty-block": [4, 0, 5], "ends-empty": [0, 9, 0], "nothing": [0, 0, 0]}
loads = pytest.mark.parametrize("counts", COUNTS.values(), ids=COUNTS)


def slow(x, weight, counts):
    """One row at a time, in float64."""
    experts = [e for e, count in enumerate(counts) for _ in range(count)]
    rows = [weight[e].double() @ x[t].double() for t, e in enumerate(experts)]
    return torch.stack(rows) if rows else x.double() @ weight[0].double().T


@loads
@pytest.mark.parametrize("widths", [(8, 4), (7, 5)], ids=["aligned", "odd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_rows_meet_their_experts_matrix(counts, widths, dtype, same):
    dim, hidden = widths
    x = torch.randn(sum(counts), dim, dtype=dtype, requires_grad=True)
    weight = (torch.randn(3, hidden, dim) / dim**0.5).to(dtype).requires_grad_()
    y = grouped_linear(x, weight, torch.tensor(counts))
    assert y.dtype == dtype
    same(y, slow(x, weight, counts), [x, weight])


def test_both_forms_are_under_test():
    assert supports_grouped_mm(torch.randn(3, 8), torch.randn(3, 4, 8))
    assert not supports_grouped_mm(torch.randn(3, 7), torch.randn(3, 5, 7))
    assert not supports_grouped_mm(torch.randn(3, 8).double(), torch.randn(3, 4, 8))
    assert not supports_grouped_mm(torch.randn(0, 8), torch.randn(3, 4, 8))


@pytest.mark.parametrize("check", [gradcheck, gradgradcheck])
@loads
def test_derivatives_of_the_operator(check, counts):
    if sum(counts) == 0:
        return
    x = torch.randn(sum(counts), 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(3, 2, 3, dtype=torch.float64, requires_grad=True)
    assert check(lambda x, w: _grouped_gemm(x, w, torch.tensor(counts)), (x, weight))


def test_the_operator_keeps_the_rules_of_torch():
    x, weight = torch.randn(9, 7, requires_grad=True), torch.randn(3, 5, 7, requires_grad=True)
    torch.library.opcheck(_grouped_gemm, (x, weight, torch.tensor([4, 0, 5])))


@pytest.mark.parametrize("widths", [(8, 4), (7, 5)], ids=["aligned", "odd"])
def test_inputs_may_lie_anyhow_in_memory(widths, close):
    dim, hidden = widths
    x, weight = torch.randn(dim, 9).T, torch.randn(3, dim, hidden).mT
    counts = [4, 0, 5]
    close(grouped_linear(x, weight, torch.tensor(counts)), slow(x, weight, counts))


def test_expanded_gradients_are_taken(close, gradients):
    x, weight = torch.randn(9, 8), torch.randn(3, 4, 8, requires_grad=True)
    counts = [4, 0, 5]
    one = gradients(grouped_linear(x, weight, torch.tensor(counts)).sum(), [weight])[0]  # expanded from a scalar
    close(one, gradients(slow(x, weight, counts).sum(), [weight])[0])


@loads
def test_row_experts(counts):
    expected = [e for e, count in enumerate(counts) for _ in range(count)]
    assert row_experts(torch.tensor(counts), sum(counts) + 2).tolist() == [*expected, 3, 3]
