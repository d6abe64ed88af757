"""Small parts of every table: a new entry whose arguments have the usual names needs no line here."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from spectralmoe import LinearScorer, TopK
from spectralmoe.experts import EXPERTS, Experts, FeedForward
from spectralmoe.regularizers import REGULARIZERS
from spectralmoe.scorers import SCORERS
from spectralmoe.selectors import SELECTORS

__all__ = ["NOT_ALONE", "make_bank", "make_regularizer", "make_scorer", "make_selector", "needed_by"]

NOT_ALONE = {"basis", "context", "spectrum"}
"""Scorers that need more than tokens, a bank or a context: they have tests of their own instead."""

_USUAL: dict[str, Any] = {
    "k": 2,
    "p": 0.5,
    "capacity": 2.0,
    "factor": 1.0,
    "groups": 1,
    "groups_on": 1,
    "hidden": 6,
    "bottleneck": 4,
}
_USUAL |= {"severity": 0.5, "num_real": 4}
_USUAL |= {"rank": 3, "selector": lambda: TopK(2)}
_OWN: dict[Any, dict[str, Any]] = {  # what makes a small one a better test
    SCORERS["linear"]: {"bias": True},
    SCORERS["cosine"]: {"proj_dim": 5, "temperature": 0.3},
    SCORERS["eigenbasis"]: {"rank": 5, "temperature": 0.1},
    SCORERS["basis"]: {"score": "energy"},
    SELECTORS["threshold"]: {"threshold": 0.1, "score": "softmax"},  # logits of any sign
}


def make_scorer(name: str, dim: int = 12, num_experts: int = 6) -> Any:
    """A small scorer from the table."""

    def scorer() -> LinearScorer:
        return LinearScorer(dim, num_experts)

    return _made(SCORERS[name], dim=dim, num_experts=num_experts, scorer=scorer)


def make_selector(name: str) -> Any:
    """A selector from the table."""
    return _made(SELECTORS[name])


def make_bank(name: str, dim: int = 8, num_experts: int = 4) -> Any:
    """A small bank from the table."""

    def modules() -> list[nn.Module]:
        return [nn.Sequential(nn.Linear(dim, 5), nn.Tanh(), nn.Linear(5, dim)) for _ in range(num_experts)]

    def experts() -> Experts:
        return FeedForward(num_experts, dim, 6)

    sizes = {"dim": dim, "channels": dim, "num_experts": num_experts}
    return _made(EXPERTS[name], **sizes, modules=modules, experts=experts)


def make_regularizer(name: str) -> Callable[..., Any]:
    """A regularizer from the table, with the arguments that it needs."""
    needed = needed_by(name)
    return partial(REGULARIZERS[name], **needed) if needed else REGULARIZERS[name]


def needed_by(name: str) -> dict[str, Any]:
    """The arguments that a regularizer must be given beside the record."""
    _, *parameters = inspect.signature(REGULARIZERS[name]).parameters.values()
    return {each.name: _USUAL[each.name] for each in parameters if each.default is each.empty}


def _made(cls: Any, **sizes: Any) -> Any:
    """An object of ``cls`` with what its constructor must be given."""
    values, arguments = {**_USUAL, **sizes}, _OWN.get(cls, {})
    for name, parameter in inspect.signature(cls).parameters.items():
        if parameter.default is parameter.empty and name not in arguments:
            assert name in values, f"{cls.__name__} needs {name!r}: give it a usual value in tests/small_parts.py"
            value = values[name]
            arguments = {**arguments, name: value() if callable(value) else value}
    return cls(**arguments)
