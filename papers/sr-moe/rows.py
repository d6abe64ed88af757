"""The rows of the card: what each network is, and how it is trained and corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spectralmoe import Balanced, LinearScorer, PrototypeScorer, Router, Soft, Term, TopK
from spectralmoe.regularizers import load_balance, spectral_norm, stable_rank

K = 2
TEMPERATURE = 1.0
BALANCE_RATE = 1e-2

NORM = Term(spectral_norm, 0.1, reduce="sum")
RANK = Term(stable_rank, 0.1, reduce="sum")
LOAD = Term(load_balance, 0.1, reduce="sum")


@dataclass(frozen=True, slots=True)
class Row:
    """One network of the card.

    Attributes:
        router: (D, E) -> router; two experts a token but in the rows that vary their number, so that the gate is the
            only difference.
        terms: penalty terms with the weights from which tuning starts.
    """

    router: Callable[[int, int], Router]
    terms: Mapping[str, Term] = field(default_factory=dict)


def linear(dim: int, experts: int) -> Router:
    """The dot-product gate."""
    return Router(LinearScorer(dim, experts), TopK(K))


def linear_soft(dim: int, experts: int) -> Router:
    """The dot-product gate with all experts."""
    return Router(LinearScorer(dim, experts), Soft())


def linear_top1(dim: int, experts: int) -> Router:
    """The dot-product gate with one expert a token."""
    return Router(LinearScorer(dim, experts), TopK(1))


def linear_balanced(dim: int, experts: int) -> Router:
    """The dot-product gate with the selection bias that SR-MoE has here."""
    return Router(LinearScorer(dim, experts), _balanced())


def prototype(dim: int, experts: int) -> Router:
    """Distance to prototypes."""
    return Router(_prototypes(dim, experts), TopK(K))


def prototype_balanced(dim: int, experts: int) -> Router:
    """Distance to prototypes with a selection bias: the gate of SR-MoE here."""
    return Router(_prototypes(dim, experts), _balanced())


def _balanced() -> Balanced:
    return Balanced(K, score="softmax", normalize=False, rate=BALANCE_RATE)


def _prototypes(dim: int, experts: int) -> PrototypeScorer:
    return PrototypeScorer(dim, experts, temperature=TEMPERATURE, scale=dim**-0.5)


ROWS: dict[str, Row] = {
    "linear": Row(linear),
    "linear soft": Row(linear_soft),
    "linear top-1": Row(linear_top1),
    "linear+load_balance": Row(linear, {"load_balance": LOAD}),
    "linear+balanced": Row(linear_balanced),
    "linear+spectral": Row(linear_balanced, {"spectral_norm": NORM, "stable_rank": RANK}),
    "prototype": Row(prototype),
    "prototype+balanced": Row(prototype_balanced),
    "SR-MoE": Row(prototype_balanced, {"spectral_norm": NORM, "stable_rank": RANK}),
    "SR-MoE spectral_norm": Row(prototype_balanced, {"spectral_norm": NORM}),
    "SR-MoE stable_rank": Row(prototype_balanced, {"stable_rank": RANK}),
}

DECIDING = ("linear", "linear+balanced", "prototype+balanced", "SR-MoE")
"""The rows that tell bias, gate and terms apart."""

GUARD, STREAM = "+guard", " in a row"
ALL_EXPERTS, ALL_PARAMETERS = " all-experts", " all-parameters"
WAYS = (GUARD, STREAM, ALL_EXPERTS, ALL_PARAMETERS)
"""Ways to correct a network other than by gradient steps on one expert a layer: suffixes of its row's name."""

BASELINES = (
    ("linear+balanced", "linear"),
    ("prototype+balanced", "linear+balanced"),
    ("SR-MoE", "prototype+balanced"),
    ("SR-MoE", "linear+balanced"),
    ("SR-MoE", "linear"),
    ("linear+load_balance", "linear"),
    ("SR-MoE", "linear+load_balance"),
    ("linear soft", "linear"),
    ("linear top-1", "linear"),
    ("SR-MoE", "linear soft"),
    ("SR-MoE", "linear top-1"),
    ("linear+spectral", "linear"),
    ("prototype", "linear"),
    ("SR-MoE", "prototype"),
    ("SR-MoE", "SR-MoE spectral_norm"),
    ("SR-MoE", "SR-MoE stable_rank"),
    ("SR-MoE" + GUARD, "SR-MoE"),
    ("SR-MoE" + ALL_EXPERTS, "SR-MoE"),
    ("SR-MoE" + ALL_PARAMETERS, "SR-MoE"),
    ("linear" + ALL_EXPERTS, "linear"),
    ("linear" + ALL_PARAMETERS, "linear"),
)
"""Which rows are compared seed by seed, and with which."""


def scaled(terms: Mapping[str, Term], strength: float) -> dict[str, Term]:
    """The terms with their weights times ``strength``."""
    return {name: _scaled(term, strength) for name, term in terms.items()}


def _scaled(term: Term, strength: float) -> Term:
    assert not callable(term.weight)
    options: dict[str, Any] = {"layers": term.layers, "reduce": term.reduce, "scope": term.scope}
    return Term(term.fn, term.weight * strength, **options)
