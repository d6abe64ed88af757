"""Orthonormality: |M M' - I| of the rows, or of the columns where there are fewer of them."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
from spectralmoe.regularizers import orthonormality


def record_of(matrix):
    layer = MoE(Router(LinearScorer(matrix.shape[1], matrix.shape[0]), TopK(2)), FeedForward(2, matrix.shape[1], 4))
    layer = layer.to(matrix.dtype)
    layer.router.scorer.weight.data = matrix
    with record(layer) as tape:
        layer(torch.randn(3, matrix.shape[1], dtype=matrix.dtype))
    return tape[0]


@pytest.mark.parametrize("form", ["square", "l1"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)], ids=str)
def test_equation(form, shape, same):
    item = record_of(torch.randn(shape, dtype=torch.float64))
    vectors = item.matrix if shape[0] <= shape[1] else item.matrix.T
    slow = torch.zeros((), dtype=torch.float64)
    for i, a in enumerate(vectors):
        for j, b in enumerate(vectors):
            defect = sum(x * y for x, y in zip(a, b, strict=True)) - float(i == j)
            slow = slow + (defect**2 if form == "square" else defect.abs())
    same(orthonormality(item, form=form), slow, [item.scorer.weight])


@pytest.mark.parametrize("form", ["square", "l1"])
@pytest.mark.parametrize("shape", [(4, 7), (7, 4)], ids=str)
def test_gradcheck(form, shape):
    item = record_of(torch.randn(shape, dtype=torch.float64))
    assert gradcheck(lambda *_: orthonormality(item, form=form), (item.scorer.weight,))


def test_by_hand():
    item = record_of(torch.tensor([[2.0, 0.0], [1.0, 1.0]]))  # Gram (4, 2; 2, 2)
    assert orthonormality(item).item() == 9 + 4 + 4 + 1
    assert orthonormality(item, form="l1").item() == 3 + 2 + 2 + 1


@pytest.mark.parametrize("form", ["square", "l1"])
def test_orthonormal_rows_cost_nothing(form, close):
    rows = torch.linalg.qr(torch.randn(9, 4, dtype=torch.float64)).Q.T.contiguous()
    close(orthonormality(record_of(rows), form=form), 0.0)


def test_mistakes_are_named(user_error):
    with user_error("orthonormality", "'cubic'", "square", "l1"):
        orthonormality(record_of(torch.eye(3)), form="cubic")
    item = record_of(torch.eye(3))
    item.scorer.__class__ = type("Blind", (LinearScorer,), {"matrix": None})
    with user_error("no routing matrix"):
        orthonormality(item)
