"""Firmness of the choice: by hand, and against the certificate."""

from __future__ import annotations

import math

import pytest
import torch

from spectralmoe import LinearScorer, Router, TopK
from spectralmoe.diagnostics import routing_radius
from spectralmoe.diagnostics.stability import changed_by_noise


def gate(dim=6, experts=5, k=2):
    return Router(LinearScorer(dim, experts), TopK(k))


def test_only_tokens_within_reach_change():
    router, x = gate(), torch.randn(500, 6)
    for noise in (0.02, 0.1, 0.5):
        reach = float((routing_radius(router, x) < noise * x.norm(dim=-1)).float().mean())
        assert 0 < changed_by_noise(router, x, noise=noise) <= reach


def test_the_order_of_the_chosen_does_not_count():
    router = gate(dim=2, experts=2, k=2)
    assert changed_by_noise(router, torch.randn(50, 2), noise=10.0) == 0.0


def test_half_of_all_tokens_change_when_only_noise_is_left():
    router = gate(dim=2, experts=2, k=1)
    x = torch.randn(2000, 2)
    assert changed_by_noise(router, x, noise=1000.0) == pytest.approx(0.5, abs=0.05)
    assert changed_by_noise(router, x, noise=0.3, seed=1) == changed_by_noise(router, x, noise=0.3, seed=1)


def test_no_tokens_no_number_and_negative_noise_is_refused(user_error):
    assert math.isnan(changed_by_noise(gate(), torch.randn(0, 6)))
    with user_error("changed_by_noise", "-1"):
        changed_by_noise(gate(), torch.randn(3, 6), noise=-1)
