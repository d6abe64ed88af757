"""Spectral terms against the singular value decomposition, of small and of large matrices."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.autograd import gradcheck

from spectralmoe import FeedForward, LinearScorer, MoE, Record, Router, Routing, TopK, record
from spectralmoe.linalg import EXACT_LIMIT
from spectralmoe.regularizers import spectral_norm, stable_rank
from spectralmoe.regularizers.spectral import spectral_penalty
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


def value_of(term, form, item, matrix="router"):
    return term(item, form=form, matrix=matrix, **OPTIONS.get(form, {}))


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
def test_large_matrices_are_read_as_they_are_now(shape, same):
    scorer = LinearScorer(shape[1], shape[0])
    item = record_of(scorer)
    scorer.after_step()
    spectral_norm(item)
    u, v = torch.randn(shape[0]), torch.randn(shape[1])
    turned = torch.randn(shape) / 20 + 4 * torch.outer(u, v) / u.norm() / v.norm()
    scorer.load_state_dict({"weight": turned})
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


def gated(logits: torch.Tensor, mask: torch.Tensor | None = None) -> Record:
    """A record of tokens whose gates are softmax(logits), the masked ones broken."""
    layer = MoE(Router(LinearScorer(2, logits.shape[1]), TopK(1)), FeedForward(logits.shape[1], 2, 4))
    probs = logits.softmax(-1) if mask is None else torch.where(mask[:, None], logits.softmax(-1), torch.nan)
    indices = logits.argmax(-1, keepdim=True)
    return Record("layer", layer, Routing(logits, probs.gather(1, indices), indices, probs, mask))


def gates(logits: torch.Tensor, mask: torch.Tensor | None = None) -> torch.Tensor:
    """W = P sqrt(E / N) of the real tokens, one gate at a time."""
    real = [n for n in range(len(logits)) if mask is None or mask[n]]
    experts = range(logits.shape[1])
    rows = [[logits[n, e].exp() / sum(logits[n, i].exp() for i in experts) for e in experts] for n in real]
    return torch.stack([torch.stack(row) for row in rows]) * (len(experts) / len(real)) ** 0.5


MASK = torch.tensor([True, False, True, True, True, False, True, True, True])


@cases
@pytest.mark.parametrize("mask", [None, MASK], ids=["all", "masked"])
def test_equation_of_the_gates(term, form, equation, mask, same):
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    singular = torch.linalg.svdvals(gates(logits, mask))
    argument = singular[0] if term is spectral_norm else singular.square().sum() / singular[0] ** 2
    same(value_of(term, form, gated(logits, mask), "gates"), equation(argument), [logits])


@cases
def test_gradcheck_of_the_gates(term, form, equation):
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    assert gradcheck(lambda logits: value_of(term, form, gated(logits), "gates"), (logits,))


GATES_BY_HAND = {
    "undecided": (torch.zeros(8, 4), 1, 1),
    "one expert for all": (torch.tensor([[1e3, 0.0, 0.0, 0.0]]).expand(8, 4), 4, 1),
    "each its own": (1e3 * torch.eye(4).repeat(2, 1), 1, 4),
    "two of four": (1e3 * torch.eye(4)[:2].repeat(4, 1), 2, 2),
    "fewer tokens than experts": (1e3 * torch.eye(4)[:2], 2, 2),
}


@pytest.mark.parametrize("case", GATES_BY_HAND)
def test_gates_by_hand(case, close):
    logits, size, rank = GATES_BY_HAND[case]
    item = gated(logits)
    close(spectral_norm(item, form="square", matrix="gates"), size)
    close(spectral_norm(item, matrix="gates"), (size**0.5 - 1) ** 2)
    close(stable_rank(item, form="inverse", matrix="gates"), 1 / rank)
    close(stable_rank(item, matrix="gates"), 1 - rank / 4)


@given(tokens=st.integers(1, 12), experts=st.integers(1, 6), seed=st.integers(0, 1000))
def test_gates_have_no_order_and_stay_within_their_bounds(tokens, experts, seed, close):
    torch.manual_seed(seed)
    logits = 3 * torch.randn(tokens, experts, dtype=torch.float64)
    shuffled = logits[torch.randperm(tokens)][:, torch.randperm(experts)]
    for term, form in ((spectral_norm, "square"), (stable_rank, "inverse")):
        value, again = (term(gated(rows), form=form, matrix="gates") for rows in (logits, shuffled))
        close(value, again)
        size = float(value) if term is spectral_norm else 1 / float(value)
        assert 1 - 1e-12 <= size <= experts * (1 + 1e-12)


@pytest.mark.parametrize("tokens", [0, 3])
@cases
def test_without_a_real_token_the_gates_are_a_zero_matrix(term, form, equation, tokens, gradients):
    logits = torch.randn(tokens, 4, requires_grad=True)
    item = gated(logits, torch.zeros(tokens, dtype=torch.bool) if tokens else None)
    value = value_of(term, form, item, "gates")
    sigma_of_zero = {"two-sided": 0.8**2, "hinge": 0.0, "square": 0.0, "plain": 0.0}
    rank_of_zero = {"deficit": 1.0, "inverse": 1.0, "target": 3.5**2}
    assert value.item() == pytest.approx((sigma_of_zero | rank_of_zero)[form])
    assert not gradients(value, [logits])[0].any()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_a_matrix_of_your_own(dtype, same):
    item = record_of(LinearScorer(4, 3))
    own = torch.randn(5, 7).to(dtype).requires_grad_()
    wide = own.to(torch.promote_types(dtype, torch.float32))
    singular = torch.linalg.svdvals(wide)
    same(spectral_norm(item, form="square", matrix=lambda _: own), singular[0] ** 2, [own])
    same(stable_rank(item, matrix=lambda _: own), 1 - singular.square().sum() / singular[0] ** 2 / 5, [own])
    norms = [spectral_norm(item, matrix=m) for m in ("router", lambda item: item.scorer.weight)]
    assert torch.equal(*norms)


def test_the_gates_reach_the_router_and_the_tokens(gradients):
    layer = MoE(Router(LinearScorer(6, 4), TopK(2)), FeedForward(4, 6, 4))
    x = torch.randn(9, 6, requires_grad=True)
    with record(layer) as tape:
        layer(x)
    for term in (spectral_norm, stable_rank):
        found = gradients(term(tape[0], matrix="gates"), [x, layer.router.scorer.weight])
        assert all(g.any() and g.isfinite().all() for g in found)


@pytest.mark.parametrize(
    "matrix", ["router", "gates", lambda item: item.routing.logits], ids=["router", "gates", "own"]
)
def test_both_parts_at_once_are_their_sum(matrix, same):
    logits = torch.randn(9, 4, dtype=torch.float64, requires_grad=True)
    item = gated(logits, MASK if matrix == "gates" else None)
    both = spectral_penalty(item, norm=0.3, rank=0.7, bound=0.5, matrix=matrix)
    parts = 0.3 * spectral_norm(item, bound=0.5, matrix=matrix) + 0.7 * stable_rank(item, matrix=matrix)
    same(both, parts, [logits, item.scorer.weight])


@pytest.mark.parametrize("terms", [(spectral_norm, stable_rank), (spectral_penalty,)], ids=["two", "one"])
@pytest.mark.parametrize("matrix", ["router", "gates"])
def test_a_term_decomposes_one_small_gram_matrix(terms, matrix, monkeypatch):
    layer = MoE(Router(LinearScorer(20, 8), TopK(2)), FeedForward(8, 20, 4))
    with record(layer) as tape:
        layer(torch.randn(50, 20))
    seen, eigh = [], torch.linalg.eigh
    monkeypatch.setattr(torch.linalg, "eigh", lambda gram: seen.append(tuple(gram.shape)) or eigh(gram))
    sum(term(tape[0], matrix=matrix) for term in terms).backward()
    layer.router.scorer.after_step()
    assert seen == [(8, 8)] * len(terms)


class Blind(LinearScorer):
    matrix = None


@pytest.mark.parametrize("term", [spectral_norm, stable_rank])
def test_mistakes_are_named(term, user_error):
    with user_error("Blind", "no routing matrix"):
        term(record_of(Blind(4, 3)))
    with user_error(term.__name__, "'cubic'", "known"):
        term(record_of(LinearScorer(4, 3)), form="cubic")
    with user_error("matrix", "'gate'", "gates", "router"):
        term(record_of(LinearScorer(4, 3)), matrix="gate")
    with user_error("must return a matrix", "(3,)"):
        term(record_of(LinearScorer(4, 3)), matrix=lambda _: torch.ones(3))
    if term is stable_rank:
        with user_error("target="):
            stable_rank(record_of(LinearScorer(4, 3)), form="target")
