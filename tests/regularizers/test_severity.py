"""Severity balance against its equation, one token and one expert at a time, and where it is least."""

from __future__ import annotations

import pytest
import torch

from spectralmoe import Context, ContextScorer, FeedForward, MoE, Router, Routing, TopK, record
from spectralmoe.regularizers import load_balance, severity_balance

D, E, REAL, B, S = 5, 6, 4, 3, 7


@pytest.fixture
def layer():
    return MoE(Router(ContextScorer(D, E, width=2, token=True), TopK(2)), FeedForward(REAL, D, 4)).double()


def slow(routing, severity, floor=0.05):
    """E sum_i f_i mean_t alpha_ti p_ti, one number at a time; ``severity`` (B, P) of the samples."""
    real = [t for t in range(B * S) if routing.mask is None or routing.mask[t]]
    slots = [int(e) for t in real for e in routing.indices[t]]
    total = 0.0
    for i in range(E):
        share = 0.0
        for t in real:
            s = max(float(severity[t // S].mean()), floor)
            share = share + (1.0 if i < REAL else s) * routing.scores[t, i] / len(real)
        total = total + slots.count(i) / len(slots) * share
    return E * total


@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_equation(layer, masked, same, close):
    x, severity = torch.randn(B, S, D, dtype=torch.float64), torch.rand(B, 2, dtype=torch.float64)
    severity[0] = 0.01
    mask = torch.arange(B * S).view(B, S) % 3 > 0 if masked else None
    with record(layer) as tape:
        layer(x, mask=mask, context=Context(samples={"severity": severity}))
    value = severity_balance(tape[0], "severity", num_real=REAL)
    same(value, slow(tape[0].routing, severity), layer.router.parameters())
    close(value, severity_balance(tape[0].routing, severity, num_real=REAL))
    rows = severity.repeat_interleave(S, 0)
    if masked:
        rows[~mask.reshape(-1)] = torch.nan
    same(severity_balance(tape[0].routing, rows, num_real=REAL), value, layer.router.parameters())
    close(severity_balance(tape[0].routing, 1.0, num_real=REAL), load_balance(tape[0]))


@pytest.mark.parametrize(("s", "zeros"), [(1.0, 0.11), (0.5, 0.20), (0.1, 0.56), (0.0, 0.71)])
def test_it_is_least_where_shares_go_with_one_over_alpha(s, zeros, gradients):
    """At f = p = shares, no logit may move p for the better; 32 real and 4 zero experts, severities not below 0.05."""
    wanted = torch.tensor([1.0] * 32 + [1 / max(s, 0.05)] * 4, dtype=torch.float64)
    wanted = wanted / wanted.sum()
    assert float(wanted[32:].sum()) == pytest.approx(zeros, abs=0.006)
    logits = wanted.log()[None].requires_grad_()
    counts = (wanted / wanted.min() * 20).round().long()  # 1 / s is a whole number of ranks
    indices = torch.repeat_interleave(torch.arange(36), counts)[:, None]
    routing = Routing(logits.expand(len(indices), -1), torch.ones_like(indices, dtype=torch.float64), indices)
    (slope,) = gradients(severity_balance(routing, s, num_real=32), [logits])
    assert float(slope.abs().max()) < 1e-12
    even = Routing(torch.zeros(36, 36).double().requires_grad_(), torch.ones(36, 1), torch.arange(36)[:, None])
    (slope,) = gradients(severity_balance(even, s, num_real=32), [even.logits])
    assert bool((slope[:, 32:] < 0).all()) == (s < 1)  # from an even load, descent goes to the zero experts


def test_mistakes_are_named(user_error):
    routing = Router(ContextScorer(D, E), TopK(2))(
        torch.randn(B, S, D), context=Context(samples={"severity": torch.rand(B)})
    )
    with user_error("num_real must be 1 to E=6, got 7"):
        severity_balance(routing, 1.0, num_real=7)
    with user_error("floor must be positive, got 0"):
        severity_balance(routing, 1.0, num_real=REAL, floor=0)
    with user_error("shape (4,)", "21 tokens", "3 samples"):
        severity_balance(routing, torch.rand(4), num_real=REAL)
    with user_error("holds nothing of the context", "'severity'"):
        severity_balance(routing, "severity", num_real=REAL)
