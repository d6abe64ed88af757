"""What all scorers share: derivatives, affine form, Lipschitz constant, spectrum of large matrices, errors."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import gradcheck

from spectralmoe import LinearScorer
from spectralmoe.linalg import EXACT_LIMIT, sigma_max
from spectralmoe.scorers import SCORERS, Scorer

LARGE = EXACT_LIMIT + 20


def leading(matrix: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svd(matrix.detach().double()).Vh[0].float()


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


def test_small_matrices_need_no_kept_direction(make_scorer, scorer_name):
    scorer = make_scorer(scorer_name)
    scorer.after_step()
    assert scorer.spectral_direction() is None
    assert "top_direction" not in scorer.state_dict()


def test_a_large_matrix_starts_exact(close):
    scorer = LinearScorer(LARGE + 10, LARGE)
    v = scorer.spectral_direction()
    close(sigma_max(scorer.weight, v).detach(), torch.linalg.svdvals(scorer.weight.detach())[0])
    assert "top_direction" not in scorer.state_dict()


def test_the_kept_direction_follows_the_optimizer(close):
    scorer = LinearScorer(LARGE + 10, LARGE)
    spike = torch.outer(torch.randn(LARGE), torch.randn(LARGE + 10)) / LARGE
    for _ in range(60):
        scorer.weight.data += 0.2 * spike
        scorer.after_step()
    v = scorer.spectral_direction()
    close((v @ leading(scorer.weight)).abs(), 1.0)
    close(sigma_max(scorer.weight, v).detach(), torch.linalg.svdvals(scorer.weight.detach())[0])


@pytest.mark.parametrize("experts", [LARGE, LARGE + 40], ids=["wide", "tall"])
def test_a_matrix_that_was_zero_is_found_again(close, experts):
    scorer = LinearScorer(LARGE + 10, experts)
    weight = scorer.weight.detach().clone()
    weight[:, -1] = 0  # a feature that is never on
    scorer.weight.data.zero_()
    assert not sigma_max(scorer.weight, scorer.spectral_direction()).detach()
    scorer.after_step()
    scorer.weight.data.copy_(weight)
    scorer.after_step()
    close(sigma_max(weight, scorer.spectral_direction()), torch.linalg.svdvals(weight)[0])


def test_rows_that_sum_to_zero_are_seen(close):
    hadamard = torch.ones(1, 1)
    while len(hadamard) <= LARGE:
        hadamard = torch.cat([torch.cat([hadamard, hadamard], 1), torch.cat([hadamard, -hadamard], 1)])
    scorer = LinearScorer(len(hadamard), LARGE)
    scorer.weight.data.copy_(hadamard[1 : LARGE + 1])
    close(sigma_max(scorer.weight, scorer.spectral_direction()).detach(), len(hadamard) ** 0.5)


def test_a_scorer_without_matrix_has_no_spectrum():
    scorer = Scorer(4, 2)
    scorer.after_step()
    assert scorer.matrix is scorer.affine() is scorer.lipschitz() is scorer.spectral_direction() is None


@pytest.mark.parametrize(("dim", "experts", "word"), [(0, 4, "dim"), (4, 0, "num_experts"), (-1, 4, "dim")])
def test_sizes_below_one_are_refused(user_error, dim, experts, word):
    with user_error("LinearScorer", word, "0" if 0 in (dim, experts) else "-1"):
        LinearScorer(dim, experts)


def test_temperatures_must_be_positive(user_error):
    for name, arguments in (("cosine", {}), ("prototype", {}), ("eigenbasis", {"rank": 2})):
        with user_error(SCORERS[name].__name__, "temperature", "-0.5"):
            SCORERS[name](4, 2, temperature=-0.5, **arguments)
