"""The rows of part (a): one network each, alike but for what routes its tokens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from spectralmoe import Balanced, LinearScorer, Router, Term, TopK
from spectralmoe.presets import find_preset
from spectralmoe.regularizers import load_balance

RouterFactory = Callable[[int, int], Router]
LRS = (1e-3, 2e-3, 4e-3)
FAITHFUL_RANK = 32


class Setting(NamedTuple):
    """What a row may be tuned in: the learning rate, and a knob that means something else in each row."""

    lr: float
    knob: float


@dataclass(frozen=True, slots=True)
class Row:
    """One network of the card.

    Attributes:
        router: knob -> (D, E) -> router; None: a dense network of equal active compute.
        terms: knob -> penalty terms.
        knobs: the knob as it is usually set, and one other value; without a knob twice the same.
    """

    router: Callable[[float], RouterFactory] | None
    terms: Callable[[float], Mapping[str, Term]] = field(default=lambda knob: {})
    knobs: tuple[float, float] = (0.0, 0.0)

    def tries(self) -> list[Setting]:
        """Four for each row: three learning rates, then the other knob, or one more rate where there is no knob."""
        usual, other = self.knobs
        last = Setting(2e-3, other) if other != usual else Setting(8e-3, usual)
        return [*(Setting(lr, usual) for lr in LRS), last]


def linear(_knob: float) -> RouterFactory:
    """The dot-product gate."""
    return lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1))


def balanced(rate: float) -> RouterFactory:
    """The dot-product gate with a loss-free selection bias."""
    return lambda dim, experts: Router(
        LinearScorer(dim, experts), Balanced(1, score="softmax", normalize=False, rate=rate)
    )


def emoe(tau: float) -> RouterFactory:
    """The default form."""
    return find_preset({"preset": "emoe", "temperature": tau}).routers(1)


def faithful(tau: float) -> RouterFactory:
    """The authors' form; their tau is 1."""
    return find_preset({"preset": "emoe-faithful", "rank": FAITHFUL_RANK, "temperature": tau}).routers(1)


def balance_term(weight: float) -> Mapping[str, Term]:
    """The Switch loss."""
    return {"load_balance": Term(load_balance, weight)}


ROWS: dict[str, Row] = {
    "dense": Row(None),
    "linear": Row(linear),
    "linear+load_balance": Row(linear, balance_term, knobs=(1e-2, 3e-2)),
    "linear+balanced": Row(balanced, knobs=(1e-2, 1e-3)),
    "EMoE faithful": Row(faithful, knobs=(1.0, 0.1)),
    "EMoE": Row(emoe, knobs=(0.2, 0.1)),
}

BASELINES = (
    ("linear", "dense"),
    ("linear+load_balance", "linear"),
    ("linear+balanced", "linear"),
    ("EMoE faithful", "linear"),
    ("EMoE", "linear"),
    ("EMoE", "linear+load_balance"),
    ("EMoE", "linear+balanced"),
    ("EMoE", "EMoE faithful"),
)
"""Which rows are compared seed by seed, and with which."""

FEW_BASELINES = (
    ("EMoE", "linear probe"),
    ("EMoE", "dense adapter"),
    ("EMoE", "linear"),
    ("EMoE", "linear+load_balance"),
    ("EMoE", "EMoE faithful"),
)
"""The same of part (b)."""
