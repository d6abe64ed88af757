"""The generalization bound: its terms by hand, what moves it and how, and random signs against their closed form."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from seeds import generator

from spectralmoe.diagnostics import empirical_rademacher, generalization_bound, natarajan_linear


def bound(n=500, experts=16, k=2, natarajan=100.0, rademacher=0.1, **options):
    return generalization_bound(n, experts, k, natarajan=natarajan, rademacher=rademacher, **options)["bound"]


def test_by_hand():
    terms = generalization_bound(50, 4, 4, natarajan=10, rademacher=0.25, lipschitz=2.0, delta=0.04)
    assert terms["masks"] == pytest.approx(80)  # 2 * 10 * 4 * (1 + ln 1)
    assert terms["samples"] == pytest.approx(10 * math.log(100))
    assert terms["confidence"] == pytest.approx(math.log(100))
    assert terms["experts"] == pytest.approx(2)
    assert terms["router"] == pytest.approx(2 * math.sqrt((80 + 11 * math.log(100)) / 100))
    assert terms["bound"] == pytest.approx(terms["router"] + terms["experts"])


@pytest.mark.parametrize(
    ("name", "values", "rises"),
    [
        ("n", [1, 2, 10, 1000], False),
        ("delta", [0.01, 0.1, 0.9], False),
        ("k", list(range(1, 17)), True),
        ("experts", [2, 3, 8, 64], True),
        ("natarajan", [0, 1, 64, 4096], True),
        ("rademacher", [0.0, 0.1, 1.0], True),
        ("lipschitz", [0.5, 1.0, 2.0], True),
    ],
)
def test_what_moves_it(name, values, rises):
    found = [bound(**{name: value}) for value in values]
    steps = [b - a if rises else a - b for a, b in itertools.pairwise(found)]
    assert all(step > 0 for step in steps), found


def test_the_exact_count_is_no_larger():
    for experts in range(1, 33):
        for k in range(1, experts + 1):
            assert bound(experts=experts, k=k, exact=True) <= bound(experts=experts, k=k)
    assert bound(experts=8, k=8, exact=True) < bound(experts=8, k=7, exact=True)  # there is one way to choose all
    fixed = [bound(natarajan=0, experts=e, k=k) for e, k in ((4, 1), (64, 8))]
    assert fixed[0] == fixed[1]  # a router that is fixed beforehand


@pytest.mark.parametrize("form", ["normal", "orthogonal", "line", "one", "zero"])
def test_random_signs_stay_under_the_closed_form(form):
    x = torch.randn(40, 50, generator=generator(1))
    x = {"normal": x, "orthogonal": torch.eye(40), "line": x[:, :1] * x[:1], "one": x[:1], "zero": 0 * x}[form]
    closed = empirical_rademacher(x, 2.0, draws=None)
    assert closed == pytest.approx(2.0 * math.sqrt(float(x.square().sum())) / len(x))
    for draws, seed in itertools.product((1, 7, 200), range(5)):
        assert empirical_rademacher(x, 2.0, draws=draws, seed=seed) <= closed * (1 + 1e-12)


def test_random_signs_are_those_of_the_equation():
    x = torch.randn(6, 2, generator=generator(2))
    signs = torch.tensor(list(itertools.product([-1.0, 1.0], repeat=6)))
    mean = float((signs @ x).norm(dim=1).mean()) / 6
    assert empirical_rademacher(x, 1.0, draws=20_000) == pytest.approx(mean, rel=0.05)
    assert empirical_rademacher(x, 1.0, seed=3) == empirical_rademacher(x, 1.0, seed=3)


def test_linear_routers():
    assert natarajan_linear(64, 1) == 64
    assert natarajan_linear(3, 5) == 15


def test_mistakes_are_named(user_error):
    for words, values in (
        (("n must be at least 1, got 0",), {"n": 0}),
        (("k=17 exceeds the E=16",), {"k": 17}),
        (("natarajan must be 0 or more, got -1",), {"natarajan": -1}),
        (("delta must lie between 0 and 1, got 1",), {"delta": 1}),
    ):
        with user_error("generalization_bound", *words):
            bound(**values)
    for words, values in (
        (("(N, D)", "(3,)"), {"features": torch.ones(3), "radius": 1.0}),
        (("radius must be 0 or more",), {"features": torch.ones(3, 2), "radius": -1.0}),
        (("draws must be at least 1",), {"features": torch.ones(3, 2), "radius": 1.0, "draws": 0}),
    ):
        with user_error("empirical_rademacher", *words):
            empirical_rademacher(**values)
    with user_error("natarajan_linear", "experts must be at least 1, got 0"):
        natarajan_linear(3, 0)
