"""Terms: regularizers with their weights in the training loss, and their sum over a tape."""

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
    """One regularizer of a training loss, with its weight.

    Attributes:
        fn: the regularizer, a function record -> scalar; with ``scope="model"`` it takes a list of records.
        weight: its factor in the loss, a number or a function of the step.
        layers: a pattern for the names of the layers that it is for (``*`` and ``?``).
        reduce: "mean" or "sum", how the values of the records are combined.
        scope: "layer" calls ``fn`` for each record, "model" once for all; None is what ``fn`` is marked with, else
            "layer".
        keeps: the names of the tensors that ``record(model, terms=terms)`` keeps for it; by default those that ``fn``
            is marked with (``spectralmoe.tape.keeps``).

    Raises:
        UserError: ``reduce`` or ``scope`` is unknown.

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
        """Call ``fn`` for the records of the layers that ``layers`` matches; return pairs (records, value).

        Raises:
            UserError: no layer matches.
        """
        chosen = [item for item in records if fnmatch(item.name, self.layers)]
        if not chosen:
            names = ", ".join(dict.fromkeys(item.name for item in records))
            raise UserError(f"Term(layers={self.layers!r}) matches no MoE layer; the tape holds: {names}")
        if self.scope == "model":
            return [(chosen, self.fn(chosen))]
        return [([item], self.fn(item)) for item in chosen]

    def reduced(self, values: Sequence[Tensor]) -> Tensor:
        """Return the mean or the sum of the values: a scalar."""
        stacked = torch.stack([value.to(values[0].device) for value in values])
        return stacked.sum() if self.reduce == "sum" else stacked.mean()


def penalty(tape: Tape, terms: Mapping[str, Term], *, step: int = 0) -> tuple[Tensor, dict[str, Tensor]]:
    """Compute the weighted sum of all terms over a tape, to be added to the training loss.

    Args:
        tape: a tape that was recorded with ``record(model, terms=terms)``.
        terms: name -> term.
        step: the step that weights get which are functions of the step.

    Returns:
        The weighted sum, a scalar with gradient; and each term's value by name, unweighted and without gradient.

    Raises:
        UserError: the tape is empty; no layer matches the pattern of a term; or a term has no gradient although a
            router is being trained.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> from spectralmoe.regularizers import load_balance
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> _ = layer.router.scorer.weight.data.zero_()
    >>> with record(layer) as tape:
    ...     y = layer(torch.randn(10, 8))
    >>> extra, values = penalty(tape, {"load": Term(load_balance, 0.01)})
    >>> round(extra.item(), 4), round(values["load"].item(), 4)
    (0.01, 1.0)
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
