"""Principal-direction gate: the equation, what follows the tokens, and that the basis stays itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from seeds import generator

from spectralmoe import FeedForward, MoE, PrincipalScorer, Router, TopK, after_step, attach, param_groups, record

D = 12


def layer(num_experts=8, **options):
    return MoE(Router(PrincipalScorer(D, num_experts, **options), TopK(1)), FeedForward(num_experts, D, 8))


def correlated(n, seed=0, d=D):
    draw = generator(seed)
    mixing = torch.randn(d, d, generator=generator(99))
    return torch.randn(n, d, generator=draw) @ mixing + 2.0


def follow(moe, *batches):
    """One optimizer step's worth of statistics for each batch, without an optimizer."""
    for x in batches:
        with record(moe) as tape:
            moe(x)
        after_step(moe, tape)


@pytest.mark.parametrize(("experts", "rank"), [(6, 3), (4, 5), (5, 3)])
def test_equation(same, experts, rank):
    scorer = PrincipalScorer(7, experts, rank=rank, temperature=0.3).double()
    scorer.mean.normal_()
    scorer.spread.uniform_(0.5, 2.0)
    x = torch.randn(6, 7, dtype=torch.float64, requires_grad=True)
    rows = []
    for token in x:
        squares = []
        for j in range(rank):
            z = scorer.basis[:, j] @ (token - scorer.mean)
            for side, value in enumerate((z, -z)):
                positive = value if value > 0 else 0 * value
                squares.append((positive / scorer.spread[2 * j + side]) ** 2)
        total = sum(squares) + 1e-6
        shares = [[s / total for h, s in enumerate(squares) if h % experts == k] for k in range(experts)]
        rows.append(torch.stack([sum(mine) / 0.3 for mine in shares]))
    same(scorer(x), torch.stack(rows), [x, scorer.basis])


def test_by_hand(close):
    scorer = PrincipalScorer(3, 4, temperature=1.0)
    scorer.basis.data = torch.eye(3, 2)
    scorer.mean = torch.tensor([1.0, 0.0, 5.0])
    scorer.spread = torch.tensor([1.0, 2.0, 1.0, 1.0])
    x = torch.tensor([[-3.0, 2.0, 7.0]])  # z = (-4, 2): 4/2 on the other side of axis 0, 2/1 on this side of axis 1
    close(scorer(x), torch.tensor([[0.0, 0.5, 0.5, 0.0]]))


def test_the_basis_starts_at_the_principal_directions_of_the_first_tokens():
    moe, x = layer(), correlated(500)
    moe.train()
    follow(moe, x)
    values, vectors = np.linalg.eigh(np.cov(x.double().numpy().T))
    overlap = np.abs(vectors[:, ::-1][:, :4].T @ moe.router.scorer.basis.detach().double().numpy())
    assert np.allclose(overlap, np.eye(4), atol=1e-3)
    assert np.allclose(moe.router.scorer.mean, x.mean(0), atol=1e-4)
    expected = np.sqrt(values[::-1][:4] / (2 * math.pi)).repeat(2)  # the mean of max(z, 0) for a Gaussian z
    assert np.allclose(moe.router.scorer.spread, expected, rtol=1e-2)


def test_mean_and_spread_follow_the_tokens(close):
    moe = layer(momentum=0.3)
    scorer = moe.router.scorer
    batches = [correlated(40, seed) for seed in range(6)]
    follow(moe, batches[0])
    mean, spread = scorer.mean.clone(), scorer.spread.clone()
    for step, x in enumerate(batches[1:], 2):
        weight = max(1 / step, 0.3)
        z = (x - mean) @ scorer.basis.detach()
        sides = torch.stack([z, -z], -1).flatten(1).clamp_min(0).mean(0)
        spread = spread + weight * (sides - spread)
        mean = mean + weight * (x.mean(0) - mean)
        follow(moe, x)
        close(scorer.mean, mean)
        close(scorer.spread, spread)


def test_micro_batches_count_as_one_batch(close):
    whole, parts = layer(), layer()
    parts.load_state_dict(whole.state_dict())
    for seed in range(3):
        x = correlated(60, seed)
        follow(whole, x)
        tapes = []
        for part in x.split([10, 50]):
            with record(parts) as tape:
                parts(part)
            tapes.append(tape)
        after_step(parts, *tapes)
    close(parts.router.scorer.mean, whole.router.scorer.mean)
    close(parts.router.scorer.spread, whole.router.scorer.spread)
    close(parts.router.scorer.basis, whole.router.scorer.basis, torch.bfloat16)  # two eigendecompositions


def test_padding_and_evaluation_do_not_count(close):
    moe, x = layer(), correlated(50)
    mask = torch.arange(50) < 30
    with record(moe) as tape:
        moe(torch.where(mask[:, None], x, torch.nan), mask=mask)
    after_step(moe, tape)
    close(moe.router.scorer.mean, x[:30].mean(0))
    moe.eval()
    follow(moe, x)
    assert int(moe.router.scorer.updates) == 1
    close(moe.router.scorer.mean, x[:30].mean(0))


def test_a_frozen_router_stays_bit_by_bit():
    moe = layer()
    follow(moe, correlated(50))
    moe.router.requires_grad_(False)
    before = {name: value.clone() for name, value in moe.router.state_dict().items()}
    follow(moe, correlated(50, seed=1))
    assert all(torch.equal(value, before[name]) for name, value in moe.router.state_dict().items())


def test_a_batch_that_is_not_finite_does_not_count(close):
    moe, x = layer(), correlated(50)
    follow(moe, torch.full_like(x, torch.nan))
    assert int(moe.router.scorer.updates) == 0
    follow(moe, x)
    close(moe.router.scorer.mean, x.mean(0))


def test_a_first_batch_of_few_tokens_starves_nobody():
    moe = layer()
    follow(moe, correlated(3))
    assert int((moe.router(correlated(1000, seed=1)).load() > 0).sum()) >= 4


def test_every_expert_gets_tokens_of_any_covariance():
    moe = layer()
    follow(moe, *(correlated(400, seed) ** 3 for seed in range(30)))  # heavy tails
    moe.eval()
    load = moe.router(correlated(4000, seed=50) ** 3).load()
    assert float(load.min()) > 1 / 32, load
    raw = Router(PrincipalScorer(D, 8), TopK(1)).eval()  # the same without what follows the tokens
    assert float(raw(correlated(4000, seed=50) ** 3).load().min()) < float(load.min())


def test_routing_ignores_the_scale_around_the_mean(close):
    scorer = PrincipalScorer(D, 6).double()
    scorer.mean.normal_()
    x = torch.randn(50, D, dtype=torch.float64)
    close(scorer(scorer.mean + 1e3 * x), scorer(scorer.mean + 1e4 * x))


@pytest.mark.full
def test_no_column_flips_in_a_thousand_steps():
    moe = layer()
    optimizer = torch.optim.AdamW(param_groups(moe, 0.05), lr=5e-4)
    attach(optimizer, moe)
    scorer, flips, worst = moe.router.scorer, 0, 0.0
    x, target = correlated(64), torch.randn(64, D)
    for step in range(1000):
        before = scorer.basis.detach().clone()
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 0):
            y = moe(x)
        (y.float() - target).square().mean().backward()
        optimizer.step()
        flips += int(step > 0 and ((before * scorer.basis).sum(0) < 0.9).sum())
        worst = max(worst, float((scorer.basis.T @ scorer.basis - torch.eye(4)).detach().abs().max()))
    assert flips == 0
    assert worst < 1e-5


def test_flip_distance_is_a_lower_bound_and_near_where_sides_meet():
    scorer = PrincipalScorer(D, 8).double()
    scorer.spread.uniform_(0.5, 2.0)
    x = torch.randn(300, D, dtype=torch.float64)
    order = scorer(x).argsort(-1, descending=True)
    over, under = order[:, :1], order[:, 1:2]
    bound = scorer.flip_distance(x, over, under)
    z = torch.stack([x @ scorer.basis, -(x @ scorer.basis)], -1).flatten(1).detach()
    m = scorer.spread
    exact = torch.minimum(  # to where the winner's side ends, or to where both sides tie
        z.gather(1, over),
        (z.gather(1, over) / m[over] - z.gather(1, under) / m[under]) / (m[over] ** -2 + m[under] ** -2).sqrt(),
    )
    assert (bound <= exact * (1 + 1e-6)).all()
    both = z.gather(1, under) > 0
    assert torch.allclose(bound[both], exact[both])


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"rank": 3}, ("rank", "E/2=4", "D=12", "3")),
        ({"rank": 13}, ("rank", "13")),
        ({"temperature": 0.0}, ("temperature", "0.0")),
        ({"momentum": 0.0}, ("momentum", "0.0")),
    ],
)
def test_what_does_not_fit_is_refused(user_error, options, words):
    with user_error("PrincipalScorer", *words):
        PrincipalScorer(D, 8, **options)
