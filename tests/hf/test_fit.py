"""Scorers fitted to the logits of another router: what can be reached is, and nothing else moves."""

from __future__ import annotations

import copy

import pytest
import torch
from small_parts import NOT_ALONE

from spectralmoe import Balanced, EigenbasisScorer, LinearScorer, PrincipalScorer, PrototypeScorer, TopK
from spectralmoe.hf.routers.fit import fit_scorer
from spectralmoe.linalg import is_orthonormal
from spectralmoe.scorers import SCORERS, BasisScorer, ContextScorer

D, E, N = 12, 6, 600


def problem(scale=2.0):
    """Tokens that vary more in some directions than in others, and what a linear gate says of them."""
    tokens = torch.randn(N, D) * torch.logspace(0.3, -0.7, D) + torch.randn(D)
    return tokens, tokens @ (scale * torch.randn(D, E))


def choosing(selector):
    selector.bind(E)
    return selector


def shares(scorer, tokens, logits):
    """The share of tokens whose two largest logits are the same, one token at a time."""
    pairs = zip(scorer(tokens).tolist(), logits.tolist(), strict=True)
    best = [[set(sorted(range(E), key=lambda e: -row[e])[:2]) for row in pair] for pair in pairs]
    return sum(one == two for one, two in best) / len(best)


@pytest.mark.parametrize("cls", [LinearScorer, PrototypeScorer])
def test_what_is_linear_reaches_a_linear_gate(cls):
    tokens, logits = problem()
    scorer = cls(D, E)
    before = shares(scorer, tokens, logits)
    agreement = fit_scorer(scorer, tokens, logits, choosing(TopK(2)))
    assert agreement.before == pytest.approx(before)
    assert agreement.after == pytest.approx(shares(scorer, tokens, logits))
    assert agreement.after > 0.97
    assert agreement.before < 0.7


def divergence(scorer, tokens, logits):
    p, q = logits.double().log_softmax(-1), scorer(tokens).double().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean().detach())


def test_every_scorer_comes_nearer(make_scorer):
    tokens, logits = problem(1.0)
    for name in sorted(SCORERS.keys() - NOT_ALONE):
        scorer = make_scorer(name, D, E)
        started = copy.deepcopy(scorer)  # the first step may throw a lucky start away: bases begin at the tokens' own
        fit_scorer(started, tokens, logits, choosing(TopK(2)), steps=1)
        fit_scorer(scorer, tokens, logits, choosing(TopK(2)), steps=100)
        assert divergence(scorer, tokens, logits) < divergence(started, tokens, logits), name
        assert all(parameter.grad is None and parameter.requires_grad for parameter in scorer.parameters()), name


def test_a_router_of_its_own_kind_is_found_again():
    tokens, _ = problem()
    teacher = EigenbasisScorer(D, E, rank=4, temperature=0.05)
    student = copy.deepcopy(teacher)
    with torch.no_grad():
        student.basis += 0.1 * torch.randn(D, 4)
        student.mask_logits += 0.3 * torch.randn(4, E)
    student.retract()
    before, after = fit_scorer(student, tokens, teacher(tokens), choosing(TopK(2)))
    assert after > 0.9 > before
    assert is_orthonormal(student.basis).all()


def test_statistics_follow_the_tokens(close):
    tokens, logits = problem()
    scorer = PrincipalScorer(D, E)
    fit_scorer(scorer, tokens, logits, choosing(TopK(2)), steps=20)
    close(scorer.mean, tokens.mean(0))
    assert int(scorer.updates) == 20
    assert is_orthonormal(scorer.basis).all()


def test_sigmoid_scores_are_matched_themselves():
    """A softmax forgets what is added to all logits of a token, sigmoids do not, and they meet the selection bias."""
    tokens, logits = problem(1.0)
    logits = logits + tokens[:, :1]
    selector, scorer = choosing(Balanced(2)), LinearScorer(D, E)
    selector.bias.copy_(torch.randn(E) / 5)
    assert fit_scorer(scorer, tokens, logits, selector).after > 0.97
    assert (scorer(tokens).sigmoid() - logits.sigmoid()).abs().max() < 0.05


def test_the_same_call_gives_the_same_result():
    tokens, logits = problem()
    start = EigenbasisScorer(D, E, rank=4)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        twins = [copy.deepcopy(start) for _ in range(2)]
        results = [fit_scorer(twin, tokens, logits, choosing(TopK(2)), steps=10) for twin in twins]
    assert results[0] == results[1]
    for one, two, before in zip(*(twin.parameters() for twin in twins), start.parameters(), strict=True):
        assert torch.equal(one, two)
        assert not torch.equal(one, before)


def test_frozen_parameters_and_the_random_state_stay():
    tokens, logits = problem()
    scorer = LinearScorer(D, E, bias=True)
    scorer.bias.requires_grad_(False).fill_(0.5)
    state = torch.get_rng_state()
    fit_scorer(scorer, tokens, logits, choosing(TopK(2)), steps=10)
    assert torch.equal(torch.get_rng_state(), state)
    assert (scorer.bias == 0.5).all()
    assert not scorer.bias.requires_grad


def test_mistakes_are_named(user_error):
    (tokens, logits), selector = problem(), choosing(TopK(2))
    cases = [
        (LinearScorer(D, E), tokens[:, 1:], logits, (f"(N, {D})", f"[{N}, {D - 1}]")),
        (LinearScorer(D, E), tokens[:0], logits[:0], ("N > 0",)),
        (LinearScorer(D, E), tokens, logits[:, 1:], (f"({N}, {E})", f"[{N}, {E - 1}]")),
        (LinearScorer(D, E), tokens, logits / 0, ("not finite",)),
        (ContextScorer(D, E, width=3), tokens, logits, ("ContextScorer", "reads")),
        (BasisScorer(D, E, score="energy"), tokens, logits, ("BasisScorer", "no parameters")),
        (LinearScorer(D, E).requires_grad_(False), tokens, logits, ("LinearScorer", "unfreeze")),
    ]
    for scorer, x, y, words in cases:
        with user_error(*words):
            fit_scorer(scorer, x, y, selector)
