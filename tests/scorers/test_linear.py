"""Linear gate: s_i = w_i . x + b_i."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import LinearScorer


@pytest.mark.parametrize("bias", [False, True], ids=["plain", "bias"])
def test_equation(bias, same):
    scorer = LinearScorer(5, 3, bias=bias).double()
    if bias:
        torch.nn.init.normal_(scorer.bias)
    x = torch.randn(4, 5, dtype=torch.float64, requires_grad=True)
    slow = torch.zeros(4, 3, dtype=torch.float64)
    for t in range(4):
        for i in range(3):
            slow[t, i] = sum(scorer.weight[i, d] * x[t, d] for d in range(5)) + (scorer.bias[i] if bias else 0)
    same(scorer(x), slow, [x, *scorer.parameters()])


def test_by_hand(close):
    scorer = LinearScorer(2, 2, bias=True)
    scorer.weight.data = torch.tensor([[1.0, 2.0], [3.0, -1.0]])
    scorer.bias.data = torch.tensor([0.5, 0.0])
    close(scorer(torch.tensor([[1.0, 1.0]])), torch.tensor([[3.5, 2.0]]))


def test_tokens_of_unit_variance_start_with_logits_of_unit_variance():
    logits = LinearScorer(256, 64)(torch.randn(500, 256))
    assert float(logits.detach().std()) == pytest.approx(1, abs=0.1)
