"""The rows of the card: what each network is, and how it is trained and corrected."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from spectralmoe import Balanced, LinearScorer, PrototypeScorer, Router, Term, TopK
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
        router: (D, E) -> router; all rows use two experts a token, so that the gate is the only difference.
        terms: penalty terms with the weights from which tuning starts.
    """

    router: Callable[[int, int], Router]
    terms: Mapping[str, Term] = field(default_factory=dict)


def linear(dim: int, experts: int) -> Router:
    """The dot-product gate."""
    return Router(LinearScorer(dim, experts), TopK(K))


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
    "linear+load_balance": Row(linear, {"load_balance": LOAD}),
    "linear+spectral": Row(linear_balanced, {"spectral_norm": NORM, "stable_rank": RANK}),
    "prototype": Row(prototype),
    "SR-MoE": Row(prototype_balanced, {"spectral_norm": NORM, "stable_rank": RANK}),
    "SR-MoE spectral_norm": Row(prototype_balanced, {"spectral_norm": NORM}),
    "SR-MoE stable_rank": Row(prototype_balanced, {"stable_rank": RANK}),
}

MAIN = ("linear", "linear+load_balance", "SR-MoE")
"""All depths and seeds; the others at two depths with fewer seeds."""

GUARD, ALL_EXPERTS, ALL_PARAMETERS = "+guard", " all-experts", " all-parameters"

ADAPTED: dict[str, tuple[str, ...]] = {
    "linear": ("", ALL_EXPERTS, ALL_PARAMETERS),
    "SR-MoE": ("", GUARD, ALL_EXPERTS, ALL_PARAMETERS),
}
"""In how many ways each network is corrected; the others in one."""


def scaled(terms: Mapping[str, Term], strength: float) -> dict[str, Term]:
    """The terms with their weights times ``strength``."""
    return {name: _scaled(term, strength) for name, term in terms.items()}


def _scaled(term: Term, strength: float) -> Term:
    assert not callable(term.weight)
    options: dict[str, Any] = {"layers": term.layers, "reduce": term.reduce, "scope": term.scope}
    return Term(term.fn, term.weight * strength, **options)
