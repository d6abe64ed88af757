"""Likeness of experts: the definition as loops."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import FeedForward
from spectralmoe.diagnostics.similarity import output_similarity


def test_definition():
    bank, x = FeedForward(4, 6, 5, bias=True).double(), torch.randn(20, 6, dtype=torch.float64)
    for among in (None, [0, 2, 3]):
        chosen = range(4) if among is None else among
        squares = []
        for token in x:
            outputs = [bank.expert(token[None], e)[0].detach() for e in chosen]
            for i, a in enumerate(outputs):
                squares += [float((a @ b) ** 2 / (a @ a) / (b @ b)) for b in outputs[:i]]
        assert output_similarity(bank, x, among=among) == pytest.approx(sum(squares) / len(squares), rel=1e-6)


def test_independent_experts_come_to_one_over_the_width():
    bank = FeedForward(8, 64, 32)
    assert output_similarity(bank, torch.randn(200, 64)) == pytest.approx(1 / 64, rel=0.3)


def test_silent_experts_count_as_unlike():
    bank = FeedForward(2, 6, 5)
    bank.down.data[1] = 0
    assert output_similarity(bank, torch.randn(9, 6)) == 0.0


def test_too_few_to_compare_is_no_number():
    bank = FeedForward(3, 6, 5)
    assert math.isnan(output_similarity(bank, torch.randn(9, 6), among=[1]))
    assert math.isnan(output_similarity(bank, torch.randn(0, 6)))


def test_an_expert_that_is_not_there_is_refused(user_error):
    with user_error("output_similarity", "7", "3"):
        output_similarity(FeedForward(3, 6, 5), torch.randn(9, 6), among=[0, 7])
