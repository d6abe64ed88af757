"""Saturated inner products: z_ia = phi(|q|) psi(|k_ia|) cos(q, k_ia), s_i = log sum_a exp z_ia, q = W x."""

from __future__ import annotations

import math

import pytest
import torch
from seeds import generator

from spectralmoe import LinearScorer, Router, SaturatedScorer, TopK
from spectralmoe.diagnostics import routing_radius

D, E = 10, 6


def lively(dim=D, num_experts=E, **options):
    """A scorer in float64 whose anchors have norms far apart, gain and beta off their start."""
    scorer = SaturatedScorer(dim, num_experts, rank=4, gain=1.7, **options).double()
    with torch.no_grad():
        scorer.keys *= torch.rand(num_experts, scorer.anchors, 1, dtype=torch.float64) * 6 + 0.1
        scorer.projection *= 1.5
        if scorer.log_beta is not None:
            scorer.log_beta += 0.4
    return scorer


def tokens(n, size=1.0):
    return size * torch.randn(n, D, dtype=torch.float64)


FORMS = pytest.mark.parametrize("saturation", ["tanh", "affine"])


@FORMS
@pytest.mark.parametrize("anchors", [1, 3])
def test_equation(saturation, anchors, same):
    scorer = lively(anchors=anchors, saturation=saturation)
    x, rows = tokens(5).requires_grad_(), []
    gain = scorer.log_gain[0].exp()
    for token in x:
        query = torch.stack([(w * token).sum() for w in scorer.projection])
        norm, row = query.square().sum().sqrt(), []
        phi = gain * norm.tanh() if saturation == "tanh" else gain * (1 + scorer.log_beta[0].exp() * norm.tanh())
        for expert in scorer.keys:
            sizes = [k.square().sum().sqrt() for k in expert]
            cosines = [(query * k).sum() / (norm * n) for k, n in zip(expert, sizes, strict=True)]
            row.append(sum((phi * (1 + (n - 1) / 4) * c).exp() for n, c in zip(sizes, cosines, strict=True)).log())
        rows.append(torch.stack(row))
    same(scorer(x), torch.stack(rows), [x, *scorer.parameters()])


def test_by_hand(close):
    scorer = SaturatedScorer(2, 2, rank=2, gain=2.0)
    scorer.projection.data = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    scorer.keys.data = torch.tensor([[[3.0, 0.0]], [[0.0, 1.0]]])  # psi is 1.5 and 1
    x = torch.tensor([[3.0, 2.0], [0.3, 0.2]])  # q is (3, 4), of norm 5, and a tenth of that
    factors = [2 * math.tanh(5.0), 2 * math.tanh(0.5)]
    close(scorer(x), [[f * 1.5 * 0.6, f * 0.8] for f in factors])
    affine = SaturatedScorer(2, 2, rank=2, gain=2.0, saturation="affine")
    affine.load_state_dict(scorer.state_dict(), strict=False)
    close(affine(x), [[(2 + f) * 1.5 * 0.6, (2 + f) * 0.8] for f in factors])


@FORMS
def test_with_one_anchor_it_chooses_what_its_linear_rows_choose(saturation):
    scorer, x = lively(saturation=saturation), torch.cat([tokens(2000, 10.0**p) for p in range(-3, 3)])
    linear = LinearScorer(D, E).double()
    sizes = scorer.keys[:, 0].norm(dim=1, keepdim=True)
    linear.weight.data = (1 + (sizes - 1) / 4) * (scorer.keys[:, 0] / sizes) @ scorer.projection
    torch.testing.assert_close(scorer.matrix, linear.weight)
    ours, theirs = (s(x).topk(E).indices for s in (scorer, linear))
    assert torch.equal(ours, theirs)  # the whole order, not the first alone
    radii = [routing_radius(Router(s, TopK(2)), x[:50]) for s in (scorer, linear)]
    torch.testing.assert_close(*radii, rtol=1e-9, atol=1e-12)


@FORMS
def test_scale_changes_the_weights_and_not_the_choice(saturation):
    scorer, x = lively(saturation=saturation), tokens(200, 0.2)
    for scale in (1e-3, 0.5, 1.5, 1e3):
        assert torch.equal(scorer(scale * x).argmax(-1), scorer(x).argmax(-1))
        assert not torch.allclose(scorer(scale * x).softmax(-1), scorer(x).softmax(-1), rtol=1e-3, atol=0)
    ceiling = scorer.log_gain.exp() * (1 + (scorer.keys.norm(dim=-1).max() - 1) / 4)
    if saturation == "tanh":
        assert (scorer(1e8 * x).abs() <= ceiling * (1 + 1e-9)).all()


@FORMS
def test_equal_anchors_are_one_anchor_and_log_a(saturation, close):
    one, many = lively(saturation=saturation), lively(anchors=5, saturation=saturation)
    many.load_state_dict(one.state_dict() | {"keys": one.keys.detach().expand(E, 5, -1)})
    x = tokens(50)
    close(many(x), one(x) + math.log(5))
    close(many(x).softmax(-1), one(x).softmax(-1))


@pytest.mark.parametrize("anchors", [1, 3])
def test_no_pair_of_tokens_exceeds_the_lipschitz_bound(anchors):
    scorer, largest = lively(anchors=anchors), 0.0
    bound = scorer.lipschitz()
    draw = generator(0)
    for size in (1e-4, 1e-2, 0.1, 1.0, 10.0, 1e3):
        x, step = size * torch.randn(2, 10_000, D, dtype=torch.float64, generator=draw)
        for share in (1e-3, 1.0):
            ratio = (scorer(x + share * step) - scorer(x)).norm(dim=1) / (share * step).norm(dim=1)
            largest = max(largest, float(ratio.detach().max()))
    assert 0.2 * bound < largest <= bound * (1 + 1e-9)


def test_the_bound_is_the_slope_at_zero_where_the_projection_is_orthogonal():
    scorer = SaturatedScorer(D, E, rank=4, gain=0.7).double()
    scorer.projection.data = 3 * torch.linalg.qr(torch.randn(D, 4, dtype=torch.float64)).Q.T
    slope = torch.autograd.functional.jacobian(lambda x: scorer(x[None])[0], torch.full((D,), 1e-9).double())
    assert float(torch.linalg.matrix_norm(slope, 2)) == pytest.approx(scorer.lipschitz(), rel=1e-6)


def test_the_affine_form_has_no_bound_since_it_jumps_at_zero(user_error):
    scorer = SaturatedScorer(4, 3, rank=2, saturation="affine")
    assert scorer.lipschitz() is None
    assert scorer.rounding(torch.zeros(1, 4), torch.float32) is None
    tiny = torch.tensor([[1e-8, 0, 0, 0], [-1e-8, 0, 0, 0]])
    one, two = scorer(tiny).detach()
    assert math.dist(one, two) > 1e6 * 2e-8
    with user_error("SaturatedScorer", "no bound"):
        routing_radius(Router(SaturatedScorer(4, 3, anchors=2, saturation="affine"), TopK(1)), torch.randn(2, 4))


@FORMS
@pytest.mark.parametrize("size", [0.0, 1e-30, 1e-10, 1e10])
def test_tokens_of_any_size_have_finite_logits_and_gradients(saturation, size):
    scorer, x = SaturatedScorer(D, E, anchors=2, saturation=saturation), size * torch.ones(3, D)
    x.requires_grad_()
    logits = scorer(x)
    logits.square().sum().backward()
    assert all(t.isfinite().all() for t in (logits, x.grad, *(p.grad for p in scorer.parameters())))
    assert size or not (logits - math.log(2)).any()


def test_the_matrix_of_one_anchor_trains_projection_and_keys(gradients):
    scorer = SaturatedScorer(D, E, rank=4)
    assert all(g.any() for g in gradients(scorer.matrix.square().sum(), (scorer.projection, scorer.keys)))
    assert SaturatedScorer(D, E, anchors=2).matrix is None


def test_the_experts_that_are_left_keep_their_logits(close):
    scorer, x = lively(anchors=3), tokens(7)
    close(scorer.select([4, 1])(x), scorer(x)[:, [4, 1]])


def test_a_typical_token_starts_unsaturated():
    scorer = SaturatedScorer(512, 8)
    norm = (torch.randn(200, 512) @ scorer.projection.detach().T).norm(dim=1)
    assert 0.6 < float(norm.tanh().mean()) < 0.9


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 0}, ("rank", "0")),
        ({"anchors": 0}, ("anchors", "0")),
        ({"gain": 0.0}, ("gain", "positive")),
        ({"gain": float("nan")}, ("gain", "nan")),
        ({"saturation": "tan"}, ("saturation", "'tan'", "did you mean 'tanh'", "affine")),
    ],
)
def test_misuse(options, words, user_error):
    with user_error("SaturatedScorer", *words):
        SaturatedScorer(D, E, **options)
