"""Noisy top-k: noise in training, for the choice only."""

from __future__ import annotations

import pytest
import torch
from seeds import shifted

from spectralmoe import LinearScorer, NoisyTopK, Router, TopK


def test_the_choice_is_top_k_of_the_noisy_logits():
    logits = torch.randn(40, 6)
    torch.manual_seed(shifted(3))
    indices = NoisyTopK(2, noise_std=0.7).choose(logits)
    torch.manual_seed(shifted(3))
    noisy = logits + 0.7 * torch.randn(40, 6)
    assert indices.tolist() == [sorted(range(6), key=lambda e: -row[e])[:2] for row in noisy.tolist()]
    assert not torch.equal(indices, TopK(2).choose(logits))


def test_the_noise_is_one_over_the_experts_by_default():
    logits = torch.zeros(20_000, 2)
    logits[:, 0] = 0.5  # a lead of one standard deviation; the difference of two draws has sqrt(2) of it
    share = float((NoisyTopK(1).choose(logits) == 1).float().mean())
    assert share == pytest.approx(0.2398, abs=0.01)  # Phi(-1/sqrt(2))


def test_evaluation_is_plain_top_k():
    logits = torch.randn(40, 6)
    assert torch.equal(NoisyTopK(2, noise_std=9.0).eval().choose(logits), TopK(2).choose(logits))


def test_weights_and_scores_never_see_the_noise(close):
    router = Router(LinearScorer(8, 6), NoisyTopK(2, noise_std=9.0))
    routing = router(torch.randn(40, 8))
    close(routing.scores, routing.logits.softmax(-1))
    close(routing.weights, routing.logits.softmax(-1).gather(1, routing.indices))


def test_by_hand():
    selector = NoisyTopK(1, noise_std=0.0)
    assert selector.choose(torch.tensor([[0.1, 3.0, 2.0]])).tolist() == [[1]]
    assert selector.weigh(torch.zeros(1, 4), torch.tensor([[2]])).tolist() == [[0.25]]


def test_mistakes_are_named(user_error):
    with user_error("NoisyTopK", "noise_std", "-1"):
        NoisyTopK(2, noise_std=-1)
    with user_error("NoisyTopK", "k=1", "normalize"):
        NoisyTopK(1, normalize=True)
    with user_error("NoisyTopK", "at least 1", "0"):
        NoisyTopK(0)
    with user_error("NoisyTopK", "k=5", "E=4"):
        Router(LinearScorer(8, 4), NoisyTopK(5))
