"""Cosine gate: s_i = cos(P x, k_i) / tau."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import CosineScorer


@pytest.mark.parametrize("proj_dim", [None, 2], ids=["identity", "projected"])
def test_equation(proj_dim, same):
    scorer = CosineScorer(4, 3, proj_dim=proj_dim, temperature=0.3).double()
    x = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x:
        query = token if proj_dim is None else torch.stack([p @ token for p in scorer.projection])
        norm = query.square().sum().sqrt()
        rows.append(torch.stack([(query @ k) / (norm * k.square().sum().sqrt()) / 0.3 for k in scorer.keys]))
    slow = torch.stack(rows)
    same(scorer(x), slow, [x, *scorer.parameters()])


def test_by_hand(close):
    scorer = CosineScorer(2, 3, temperature=0.5)
    scorer.keys.data = torch.tensor([[7.0, 0.0], [0.0, 1.0], [-2.0, 0.0]])
    close(scorer(torch.tensor([[3.0, 4.0]])), 2 * torch.tensor([[0.6, 0.8, -0.6]]))


@pytest.mark.parametrize("scale", [1e-3, 0.5, 1e3])
def test_scale_of_tokens_and_keys_does_not_matter(scale, close):
    scorer = CosineScorer(12, 6)
    x = torch.randn(8, 12)
    close(scorer(scale * x), scorer(x))
    before = scorer(x)
    scorer.keys.data *= scale
    close(scorer(x), before)


def test_logits_are_bounded_and_a_zero_token_has_none():
    scorer = CosineScorer(12, 6, temperature=0.07)
    assert float(scorer(100 * torch.randn(50, 12)).detach().abs().max()) <= 1 / 0.07 * (1 + 1e-5)
    assert not scorer(torch.zeros(1, 12)).any()


def test_the_spectral_terms_see_the_keys_as_the_cosine_does(close):
    matrix = CosineScorer(12, 6, proj_dim=5).matrix
    assert matrix.shape == (6, 5)
    close(matrix.norm(dim=1), torch.ones(6))


def test_it_is_neither_affine_nor_lipschitz():
    scorer = CosineScorer(4, 2)
    assert scorer.affine() is None
    assert scorer.lipschitz() is None
    tiny = torch.tensor([[1e-9, 0, 0, 0], [-1e-9, 0, 0, 0]])
    one, two = scorer(tiny).detach()
    assert math.dist(one, two) > 1e6 * 2e-9  # the jump at zero


def test_a_projection_of_no_width_is_refused(user_error):
    with user_error("CosineScorer", "proj_dim", "0"):
        CosineScorer(4, 2, proj_dim=0)
