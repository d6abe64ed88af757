"""Networks of several views: both imputers by their equations, and what a missing view touches."""

from __future__ import annotations

import pytest
import torch
from seeds import generator, shifted

from spectralmoe import LinearScorer, Router, TopK, load, record, save
from spectralmoe.data.imputation import PoolImputer
from spectralmoe.models import SparseCrossImputer, views_moe

B, V, D = 5, 3, 8
PRESENT = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()


def test_the_pool_fills_what_is_missing_and_leaves_the_rest():
    pool, x, present = torch.randn(20, 2, 3), torch.randn(B, 2, 3), PRESENT[:, 1]
    before = torch.get_rng_state()
    imputer = PoolImputer(pool, samples=4)
    assert imputer(x, torch.ones(B, dtype=torch.bool)) is x
    assert torch.equal(before, torch.get_rng_state())  # nothing was drawn
    filled = imputer(x, present, generator(1))
    assert torch.equal(filled[present], x[present])
    triples = torch.cartesian_prod(*[torch.arange(20)] * 4)
    triples = triples[(triples.diff(dim=1) > 0).all(1)]
    means = pool[triples].mean(1)  # of all sets of four
    for row in filled[~present]:
        assert (means - row).abs().amax((1, 2)).min() < 1e-5
    assert len(filled[~present].unique(dim=0)) > 1  # each draws its own
    assert torch.equal(filled, imputer(x, present, generator(1)))


def test_all_of_a_pool_are_its_mean(close):
    pool = torch.randn(6, 4)
    filled = PoolImputer(pool, samples=6)(torch.zeros(2, 4), torch.tensor([False, True]))
    close(filled, torch.stack([pool.mean(0), torch.zeros(4)]))


@pytest.mark.parametrize("keep", [1, 2, 3])
def test_a_missing_token_is_filled_from_the_few_that_fit_best(keep, same):
    imputer = SparseCrossImputer(D, keep).double()
    tokens = torch.randn(B, V, D, dtype=torch.float64, requires_grad=True)
    rows = []
    for b in range(B):
        for v in range(V):
            t, there = tokens[b, v], PRESENT[b].nonzero().flatten().tolist()
            if v not in there:
                keys = [imputer.key.weight @ tokens[b, j] for j in there]
                fits = [(imputer.query.weight @ t) @ key / D**0.5 for key in keys]
                total = sum(fit.exp() for fit in fits)
                shares = sorted(
                    ((fit.exp() / total, key) for fit, key in zip(fits, keys, strict=True)), key=lambda p: -p[0]
                )
                t = imputer.norm(t + sum((share * key for share, key in shares[:keep]), torch.zeros_like(t)))
            rows.append(t)
    got = imputer(tokens, PRESENT)
    assert torch.equal(got[PRESENT], tokens[PRESENT])
    same(got, torch.stack(rows).view(B, V, D), [tokens, *imputer.parameters()])


def test_where_all_are_there_the_imputer_has_no_say():
    imputer, tokens = SparseCrossImputer(D, 1), torch.randn(B, V, D)
    filled = imputer(tokens, torch.ones(B, V, dtype=torch.bool))
    assert torch.equal(filled, tokens)
    assert not filled.requires_grad or not any(
        grad.any() for grad in torch.autograd.grad(filled.sum(), list(imputer.parameters()))
    )


def make_network(keep=1):
    return views_moe(
        4, (2, 3, 5), router=lambda dim, e: Router(LinearScorer(dim, e), TopK(2)), width=D, heads=2, num_experts=4,
        hidden=6, keep=keep,
    )  # fmt: skip


def test_experts_see_views_that_are_there_alone(tmp_path):
    network = make_network().eval()
    inputs = torch.cat([torch.randn(B, 10), PRESENT.float()], 1)
    with record(network) as tape:
        logits = network(inputs)
    assert logits.shape == (B, 4)
    assert logits.isfinite().all()
    for item in tape:
        assert torch.equal(item.routing.mask.view(B, V), PRESENT)
        assert int(item.routing.counts().sum()) == 2 * int(PRESENT.sum())
    save(network, tmp_path / "one")
    assert torch.equal(load(tmp_path / "one")(inputs), logits)


def test_networks_with_and_without_the_second_stage_start_alike():
    states = []
    for keep in (0, 1):
        torch.manual_seed(shifted(3))
        states.append(make_network(keep).state_dict())
    assert states[0].keys() < states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_what_they_refuse(user_error):
    with user_error("PoolImputer", "samples=3", "2 of the pool"):
        PoolImputer(torch.zeros(2, 4), samples=3)
    with user_error("PoolImputer", "(1, 5)", "(4,)"):
        PoolImputer(torch.zeros(2, 4), samples=1)(torch.zeros(1, 5), torch.ones(1, dtype=torch.bool))
    with user_error("keep", "got 0"):
        SparseCrossImputer(D, 0)
    with user_error("keep=4", "3 tokens"):
        SparseCrossImputer(D, 4)(torch.zeros(B, V, D), PRESENT)
    with user_error("ViewsMoE", "(B, 13)", "(2, 10)"):
        make_network()(torch.zeros(2, 10))
    with user_error("3 heads"):
        views_moe(4, (2,), router=lambda dim, e: Router(LinearScorer(dim, e), TopK(2)), width=D, heads=3)
