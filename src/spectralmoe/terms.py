"""Terms: regularizers with their weights, and their sum over a tape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.tape import Record, Tape, said

__all__ = ["Term", "penalty"]


@dataclass(frozen=True, slots=True)
class Term:
    """One regularizer of a training loss.

    Attributes:
        fn: record -> scalar, unweighted; with ``scope="model"`` it gets the list of records.
        weight: factor, or a function of the step.
        layers: pattern on layer names (``*`` and ``?``).
        reduce: "mean" or "sum" over the records.
        scope: "layer" or "model"; by default what ``fn`` itself says, else "layer".
        keeps: tensors that ``record(model, terms=terms)`` keeps for it; by default what ``fn`` itself says it reads.

    >>> Term(lambda item: item.hidden.abs().mean(), weight=1e-3, keeps=("hidden",)).keeps
    ('hidden',)
    """

    fn: Callable[[Any], Tensor]
    weight: float | Callable[[int], float]
    layers: str = "*"
    reduce: Literal["mean", "sum"] = "mean"
    scope: Literal["layer", "model"] | None = None
    keeps: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        keeps, scope = said(self.fn)
        object.__setattr__(self, "keeps", self.keeps or keeps)
        object.__setattr__(self, "scope", self.scope or scope)
        if self.reduce not in ("mean", "sum"):
            raise one_of("Term(reduce=...)", self.reduce, ["mean", "sum"])
        if self.scope not in ("layer", "model"):
            raise one_of("Term(scope=...)", str(self.scope), ["layer", "model"])

    def values(self, records: Sequence[Record]) -> list[tuple[list[Record], Tensor]]:
        """What each call of ``fn`` was given, and what it gave, over the records that ``layers`` names."""
        chosen = [item for item in records if fnmatch(item.name, self.layers)]
        if not chosen:
            names = ", ".join(dict.fromkeys(item.name for item in records))
            raise UserError(f"Term(layers={self.layers!r}) matches no MoE layer; the tape holds: {names}")
        if self.scope == "model":
            return [(chosen, self.fn(chosen))]
        return [([item], self.fn(item)) for item in chosen]

    def reduced(self, values: Sequence[Tensor]) -> Tensor:
        """The mean or the sum of the values: a scalar."""
        stacked = torch.stack([value.to(values[0].device) for value in values])
        return stacked.sum() if self.reduce == "sum" else stacked.mean()


def penalty(tape: Tape, terms: Mapping[str, Term], *, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """The weighted sum of all terms (a scalar), and each term's unweighted, detached value by name.

    Args:
        step: handed to weights that are functions of the step.

    Raises:
        UserError: an empty tape; a pattern without a match; a term without a gradient for a layer whose router is
            being trained.
    """
    records = tape.records
    total = records[0].routing.logits.new_zeros(())
    parts = {}
    for name, term in terms.items():
        values = term.values(records)
        weight = term.weight(step) if callable(term.weight) else term.weight
        if weight and any(not value.requires_grad and _trains_router(given) for given, value in values):
            raise UserError(
                f"term {name!r} has no gradient: the forward was recorded without one (torch.no_grad, or re-entrant "
                "activation checkpointing: use use_reentrant=False), or the term has none"
            )
        value = term.reduced([value for _, value in values])
        total = total + weight * value.to(total)
        parts[name] = value.detach()
    return total, parts


def _trains_router(records: Sequence[Record]) -> bool:
    return torch.is_grad_enabled() and any(item.layer.trains_router for item in records)
