"""Spectral terms against the singular value decomposition, exact and by warm-started power iteration."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, Record, Router, TopK, record
from spectralmoe.linalg import EXACT_LIMIT
from spectralmoe.regularizers import spectral_norm, stable_rank
from spectralmoe.scorers import Scorer

NORMS = {
    "hinge": lambda s: (s - 0.8).clamp_min(0) ** 2,
    "two-sided": lambda s: (s - 0.8) ** 2,
    "square": lambda s: s**2,
    "plain": lambda s: s,
}
RANKS = {
    "deficit": lambda r: 1 - r / 4,
    "inverse": lambda r: 1 / r,
    "target": lambda r: (3.5 - r).clamp_min(0) ** 2,
}
OPTIONS = {"hinge": {"bound": 0.8}, "two-sided": {"bound": 0.8}, "target": {"target": 3.5}}
CASES = [(spectral_norm, form, f) for form, f in NORMS.items()] + [(stable_rank, form, f) for form, f in RANKS.items()]
cases = pytest.mark.parametrize(("term", "form", "equation"), CASES, ids=[f"{t.__name__}-{f}" for t, f, _ in CASES])


def value_of(term, form, item):
    return term(item, form=form, **OPTIONS.get(form, {}))


def record_of(scorer: Scorer) -> Record:
    layer = MoE(Router(scorer, TopK(2)), FeedForward(scorer.num_experts, scorer.dim, 4)).to(next(scorer.parameters()))
    with record(layer) as tape:
        layer(torch.randn(3, scorer.dim).to(next(scorer.parameters())))
    return tape[0]


def linear(matrix: torch.Tensor) -> LinearScorer:
    scorer = LinearScorer(matrix.shape[1], matrix.shape[0]).to(matrix.dtype)
    scorer.weight.data = matrix
    return scorer


@cases
def test_equation(term, form, equation, same):
    scorer = linear(torch.randn(4, 7, dtype=torch.float64))
    singular = torch.linalg.svdvals(scorer.weight)
    argument = singular[0] if term is spectral_norm else singular.square().sum() / singular[0] ** 2
    same(value_of(term, form, record_of(scorer)), equation(argument), [scorer.weight])


@cases
def test_gradcheck(term, form, equation):
    item = record_of(linear(torch.randn(4, 7, dtype=torch.float64)))
    assert gradcheck(lambda *_: value_of(term, form, item), (item.scorer.weight,))


@pytest.mark.parametrize("shape", [(EXACT_LIMIT + 5, EXACT_LIMIT + 30), (EXACT_LIMIT + 30, EXACT_LIMIT + 5)], ids=str)
def test_large_matrices_by_power_iteration(shape, same):
    scorer = linear(torch.randn(shape) / 20)
    u, v = torch.randn(shape[0]), torch.randn(shape[1])
    for _ in range(40):  # an optimizer that turns the matrix
        scorer.weight.data += 0.1 * torch.outer(u, v) / u.norm() / v.norm()
        scorer.after_step([])
    item = record_of(scorer)
    assert scorer.top_direction is not None
    singular = torch.linalg.svdvals(scorer.weight.double())
    rank = singular.square().sum() / singular[0] ** 2
    same(spectral_norm(item, form="plain"), singular[0], [scorer.weight])
    same(spectral_norm(item), (singular[0] - 1).square(), [scorer.weight])
    same(stable_rank(item), 1 - rank / min(shape), [scorer.weight])
    same(stable_rank(item, form="inverse"), 1 / rank, [scorer.weight])


def test_by_hand():
    item = record_of(linear(torch.diag(torch.tensor([3.0, 1.0, 1.0]))))
    assert spectral_norm(item).item() == pytest.approx(4)
    assert spectral_norm(item, bound=5.0).item() == 0
    assert stable_rank(item).item() == pytest.approx(1 - 11 / 27)


def test_orthonormal_rows_cost_nothing(close):
    item = record_of(linear(torch.linalg.qr(torch.randn(9, 4)).Q.T.contiguous()))
    close(spectral_norm(item), 0.0)
    close(stable_rank(item), 0.0)


@pytest.mark.parametrize(("form", "worth"), [("deficit", 1.0), ("inverse", 1.0), ("target", 3.5**2)])
def test_a_zero_matrix_is_defined(form, worth, gradients):
    item = record_of(linear(torch.zeros(4, 7)))
    value = value_of(stable_rank, form, item)
    assert value.item() == worth
    assert not gradients(value, [item.scorer.weight])[0].any()


def test_they_look_at_every_scorers_matrix(make_scorer, scorer_name, close, gradients):
    scorer = make_scorer(scorer_name)
    item = record_of(scorer)
    if scorer.matrix is None:
        return
    close(spectral_norm(item, form="plain"), torch.linalg.svdvals(scorer.matrix.detach())[0])
    assert any(g.any() for g in gradients(spectral_norm(item, form="plain"), scorer.parameters()))


class Blind(LinearScorer):
    matrix = None


@pytest.mark.parametrize("term", [spectral_norm, stable_rank])
def test_mistakes_are_named(term, user_error):
    with user_error("Blind", "no routing matrix"):
        term(record_of(Blind(4, 3)))
    with user_error(term.__name__, "'cubic'", "known"):
        term(record_of(LinearScorer(4, 3)), form="cubic")
    if term is stable_rank:
        with user_error("target="):
            stable_rank(record_of(LinearScorer(4, 3)), form="target")
