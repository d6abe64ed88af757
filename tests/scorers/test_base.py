"""What all scorers share: derivatives, affine form, Lipschitz constant, state, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, after_step, record
from spectralmoe.linalg import EXACT_LIMIT
from spectralmoe.regularizers import spectral_norm
from spectralmoe.scorers import SCORERS, Scorer

LARGE = EXACT_LIMIT + 20


def test_gradcheck(make_scorer, scorer_name):
    scorer = make_scorer(scorer_name, 6, 4).double()
    x = torch.randn(3, 6, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda x, *_: scorer(x), (x, *scorer.parameters()))


def test_softmax_of_the_affine_form_is_the_routing(make_scorer, scorer_name, same):
    scorer = make_scorer(scorer_name).double()
    if (form := scorer.affine()) is None:
        return
    x = torch.randn(30, 12, dtype=torch.float64, requires_grad=True)
    slope, shift = form
    same(scorer(x).softmax(-1), (x @ slope.T + shift).softmax(-1), [x, *scorer.parameters()])


def test_softmax_is_half_as_steep_as_the_lipschitz_constant(make_scorer, scorer_name):
    scorer = make_scorer(scorer_name).double()
    if (bound := scorer.lipschitz()) is None:
        return
    for x in 2 * torch.randn(100, 12, dtype=torch.float64):
        jacobian = torch.autograd.functional.jacobian(lambda x: scorer(x[None])[0].softmax(-1), x)
        assert float(torch.linalg.matrix_norm(jacobian, 2)) <= bound / 2 * (1 + 1e-12)


def test_lipschitz_is_the_slope_of_the_centred_logits(make_scorer, scorer_name):
    scorer = make_scorer(scorer_name).double()
    if (bound := scorer.lipschitz()) is None:
        return
    x = torch.randn(12, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: (s := scorer(x[None])[0]) - s.mean(), x)
    slope = float(torch.linalg.matrix_norm(jacobian, 2))
    assert slope <= bound * (1 + 1e-6)
    if scorer.affine() is not None:  # then it is the same everywhere
        assert slope == pytest.approx(bound)


def test_all_state_is_in_the_state_dict(make_scorer, scorer_name):
    scorer = make_scorer(scorer_name, LARGE + 10, LARGE)
    layer = MoE(Router(scorer, TopK(1)), FeedForward(LARGE, LARGE + 10, 1))
    before = [name for name, _ in layer.named_buffers()]
    with record(layer) as tape:
        layer(torch.randn(4, LARGE + 10))
    if scorer.matrix is not None:
        spectral_norm(tape[0]).backward()
    after_step(layer, tape)
    assert [name for name, _ in layer.named_buffers()] == before
    assert set(before) <= layer.state_dict().keys()


def test_a_scorer_may_have_no_matrix():
    scorer = Scorer(4, 2)
    scorer.after_step()
    assert scorer.matrix is scorer.affine() is scorer.lipschitz() is None


@pytest.mark.parametrize(("dim", "experts", "word"), [(0, 4, "dim"), (4, 0, "num_experts"), (-1, 4, "dim")])
def test_sizes_below_one_are_refused(user_error, dim, experts, word):
    with user_error("LinearScorer", word, "0" if 0 in (dim, experts) else "-1"):
        LinearScorer(dim, experts)


def test_temperatures_must_be_positive(user_error):
    for name, arguments in (("cosine", {}), ("prototype", {}), ("eigenbasis", {"rank": 2})):
        with user_error(SCORERS[name].__name__, "temperature", "-0.5"):
            SCORERS[name](4, 2, temperature=-0.5, **arguments)
