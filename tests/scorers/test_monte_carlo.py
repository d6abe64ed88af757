"""Passes with dropout: the equations, what is plain, that draws follow the steps alone, and what uncertainty sees."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch
from seeds import shifted
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    BasisScorer,
    ContextScorer,
    EigenExperts,
    FeedForward,
    LinearScorer,
    MoE,
    PrincipalScorer,
    Router,
    TopK,
    attach,
    load,
    record,
    save,
)
from spectralmoe.diagnostics import routing_radius
from spectralmoe.scorers import MonteCarlo

D, E = 8, 5
FORMS = pytest.mark.parametrize("form", ["shrink", "whiten"])


def made(form="shrink", passes=4, dropout=0.3, **options):
    return MonteCarlo(LinearScorer(D, E, bias=True), passes=passes, dropout=dropout, form=form, **options).double()


def factors_of(scorer):
    """What each pass multiplies each coordinate with (M, D), from logits that are the tokens."""
    twin = copy.deepcopy(scorer)
    twin.scorer = LinearScorer(D, D).double()
    twin.scorer.weight.data = torch.eye(D, dtype=torch.float64)
    return twin._logits(torch.ones(1, D, dtype=torch.float64), None)[:, 0].detach()


@FORMS
def test_equation(form, same):
    scorer = made(form)
    factors = factors_of(scorer)
    x, rows = torch.randn(6, D, dtype=torch.float64, requires_grad=True), []
    for token in x:
        logits = [scorer.scorer((token * factor)[None])[0] for factor in factors]
        scores = [s.exp() / s.exp().sum() for s in logits]
        mean = sum(scores) / len(scores)
        variance = sum((r - mean) ** 2 for r in scores) / (len(scores) - 1)
        if form == "shrink":
            level = sum(s.exp().sum().log() for s in logits) / len(logits)
            rows.append((mean / (1 + variance / variance.mean())).log() + level)
        else:
            plain = scorer.scorer(token[None])[0].softmax(0)
            z = (plain - mean) / variance.sqrt()
            rows.append(z / z.square().sum().sqrt())
    torch.testing.assert_close(scorer(x), torch.stack(rows), rtol=1e-6, atol=1e-6)  # the variance has a floor
    probe = torch.randn(6, E, dtype=torch.float64)
    for one, two in zip(
        *(torch.autograd.grad((y * probe).sum(), [x, *scorer.parameters()]) for y in (scorer(x), torch.stack(rows))),
        strict=True,
    ):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_by_hand(close):
    """Two passes that see one coordinate each: scores (a, 1 - a) and (1 - a, a), which spread alike."""
    scorer = MonteCarlo(LinearScorer(2, 2), passes=2, dropout=0.5)
    scorer.scorer.weight.data = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    seed = next(s for s in range(1000) if _seen(scorer, s) == [[2.0, 0.0], [0.0, 2.0]])
    scorer.seed.fill_(seed)
    x = torch.tensor([[1.5, 1.5]])
    level = math.log(math.exp(3.0) + 1)
    close(scorer(x), [[math.log(0.5) - math.log(2) + level] * 2])
    mean, variance = scorer.moments(x)
    a = math.exp(3.0) / (math.exp(3.0) + 1)
    close(mean, [[0.5, 0.5]])
    close(variance, [[2 * (a - 0.5) ** 2] * 2])


def _seen(scorer, seed):
    scorer.seed.fill_(seed)
    return scorer._logits(torch.ones(1, 2), None)[:, 0].tolist()


@FORMS
def test_without_dropout_and_in_evaluation_it_is_the_plain_scorer(form):
    x = torch.randn(20, D, dtype=torch.float64)
    for scorer in (made(form, dropout=0.0), made(form).eval()):
        assert torch.equal(scorer(x), scorer.scorer(x))
        router, plain = Router(scorer, TopK(2)), Router(scorer.scorer, TopK(2))
        assert torch.equal(routing_radius(router, x), routing_radius(plain, x))
        assert (scorer.lipschitz(), scorer.matrix is scorer.scorer.weight) == (scorer.scorer.lipschitz(), True)


def test_passes_that_agree_give_the_plain_logits(close, user_error):
    """Logits and not scores alone, so that sigmoids and thresholds mean what they mean without passes."""
    scorer, x = made(dropout=1e-12), torch.randn(20, D, dtype=torch.float64)
    close(scorer(x), scorer.scorer(x))
    with user_error("MonteCarlo", "no bound"):
        routing_radius(Router(scorer, TopK(2)), x)
    with user_error("MonteCarlo", "no lipschitz() bound"):
        routing_radius(Router(scorer, Balanced(2, score="softmax")), x)


@FORMS
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e3, 1e8])
def test_logits_and_gradients_are_finite_where_nothing_varies(form, size):
    scorer, x = MonteCarlo(LinearScorer(D, E), form=form), (size * torch.randn(7, D)).requires_grad_()
    logits = scorer(x)
    (logits * torch.randn(7, E)).sum().backward()
    assert all(t.isfinite().all() for t in (logits, x.grad, scorer.scorer.weight.grad))
    assert scorer(x[:0]).shape == (0, E)


def test_scores_that_spread_more_than_usual_count_less():
    scorer, x = made(), torch.randn(200, D, dtype=torch.float64)
    mean, variance = scorer.moments(x)
    shrunk = (scorer(x).softmax(-1) / mean).detach()
    most, least = variance.argmax(-1, keepdim=True), variance.argmin(-1, keepdim=True)
    assert (shrunk.gather(1, most) < shrunk.gather(1, least)).all()


def layer_of(**options):
    return MoE(Router(MonteCarlo(LinearScorer(D, E), dropout=0.4, **options), TopK(2)), FeedForward(E, D, 6))


@FORMS
def test_draws_are_those_of_the_step(form):
    torch.manual_seed(shifted(3))
    layer, x = layer_of(form=form), torch.randn(9, D)
    optimizer = torch.optim.SGD(layer.router.parameters(), lr=0.0)
    attach(optimizer, layer)
    scorer, seen = layer.router.scorer, []
    for _ in range(5):
        first = scorer(x)
        layer(x).sum().backward()
        assert torch.equal(scorer(x), first)
        seen.append(first.detach())
        optimizer.step()
    assert all(not torch.equal(one, two) for one, two in itertools.pairwise(seen))
    again, copied = layer_of(form=form).router.scorer, copy.deepcopy(scorer)
    again.load_state_dict(scorer.state_dict())
    assert torch.equal(again(x), scorer(x))
    assert torch.equal(copied(x), scorer(x))
    assert not torch.equal(layer_of(form=form).router.scorer.seed, scorer.seed)


def test_coordinates_are_dropped_at_their_rate():
    scorer, dropped = made(passes=50), 0
    for _ in range(40):
        dropped += int((factors_of(scorer) == 0).sum())
        scorer.after_step()
    share = dropped / (40 * 50 * D)
    assert abs(share - 0.3) < 6 * (0.3 * 0.7 / (40 * 50 * D)) ** 0.5


@pytest.mark.parametrize("reentrant", [False, True])
def test_a_recomputed_forward_draws_the_same(reentrant):
    layer, x = layer_of(), torch.randn(9, D, requires_grad=True)
    gradients = []
    for forward in (layer, lambda t: checkpoint(layer, t, use_reentrant=reentrant)):
        layer.zero_grad()
        (forward(x) * x.detach().flip(0)).sum().backward()
        gradients.append([p.grad.clone() for p in layer.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*gradients, strict=True))


def test_in_training_it_compiles_and_replays(close):
    torch.compiler.reset()
    layer, x = layer_of(), torch.randn(20, D)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    close(compiled(x), layer(x))
    layer.router.scorer.after_step()
    close(compiled(x), layer(x))  # the draws are no constants of the graph
    with record(layer) as tape:
        layer(x)
    again = layer.router(x, replay=tape[0].routing)
    assert torch.equal(again.weights, tape[0].routing.weights)
    torch.compiler.reset()


def test_it_goes_around_scorers_that_read_more_than_tokens(tmp_path):
    x = torch.randn(12, D)
    severity = torch.rand(12, 1)
    known = MonteCarlo(ContextScorer(D, E, token=True))
    assert known(x, context={"severity": severity}).isfinite().all()
    bank = EigenExperts(E, D, 1)
    bases = MoE(Router(MonteCarlo(BasisScorer(D, E, score="energy")), TopK(2)), bank)
    assert bases(x).isfinite().all()
    followed = MoE(Router(MonteCarlo(PrincipalScorer(D, 4)), TopK(2)), FeedForward(4, D, 6))
    optimizer = torch.optim.SGD(followed.parameters(), lr=0.1)
    attach(optimizer, followed)
    inner = followed.router.scorer.scorer
    before = inner.mean.clone()
    followed(x + 1).square().sum().backward()
    optimizer.step()
    assert not torch.equal(inner.mean, before)
    save(followed.eval(), tmp_path)
    assert torch.equal(load(tmp_path)(x), followed(x))


def test_ambiguous_tokens_are_more_uncertain():
    """Between two experts' directions the variance is larger than on one of them."""
    scorer = MonteCarlo(LinearScorer(32, 2), passes=200, dropout=0.1)
    directions = torch.zeros(2, 32)
    directions[0, :16], directions[1, 16:] = 1.0, 1.0
    scorer.scorer.weight.data = directions
    _, variance = scorer.moments(torch.stack([directions[0], directions.sum(0)]))
    assert variance[1].sum() > 10 * variance[0].sum()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"passes": 1}, ("passes", "2", "1")),
        ({"dropout": 1.0}, ("dropout", "[0, 1)", "1.0")),
        ({"form": "shrunk"}, ("form", "did you mean 'shrink'")),
    ],
)
def test_misuse(options, words, user_error):
    with user_error("MonteCarlo", *words):
        MonteCarlo(LinearScorer(D, E), **options)


def test_it_goes_around_a_scorer(user_error):
    with user_error("MonteCarlo", "scorer", "TopK"):
        MonteCarlo(TopK(1))
