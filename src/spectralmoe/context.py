"""Context: side information that a layer gets beside its tokens, and that its parts read by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from spectralmoe.errors import UserError

__all__ = ["Context", "Rows", "rows_of", "without_padding"]

Rows = dict[str, Tensor]
"""Side information by name in the form that scorers, selectors and experts get: one row for each token (N, ...)."""


@dataclass(frozen=True)
class Context:
    """Side information for a forward, by name: ``layer(x, context=Context(...))``.

    Scorers, selectors and experts that read side information name it in ``reads``: ``ContextScorer`` reads "severity",
    for example.

    Args:
        tokens: name -> one value for each token, (..., *) beside tokens x (..., D).
        samples: name -> one value for each sample, (B, *) beside tokens x (B, ..., D).

    >>> context = Context(samples={"severity": torch.tensor([0.5, 0.0])})
    >>> context.rows((2, 3))["severity"].tolist()  # for two samples of three tokens
    [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    """

    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, shape: tuple[int, ...], mask: Tensor | None = None) -> dict[str, Tensor]:
        """Return all values by name as rows (N, *), one for each token.

        Args:
            shape: the leading dimensions of the tokens, which N is the product of.
            mask: of that shape, False for padding, whose rows become 0.

        Raises:
            UserError: a value is no tensor or has another leading shape, or a name is given for tokens and samples.
        """
        if both := self.tokens.keys() & self.samples.keys():
            raise UserError(f"Context: {min(both)!r} is given for tokens and for samples; give it once")
        rows = {name: _flat(name, value, shape, "tokens") for name, value in self.tokens.items()}
        for name, value in self.samples.items():
            flat = _flat(name, value, shape[:1], "samples")
            each = flat[:, None].expand(len(flat), math.prod(shape[1:]), *flat.shape[1:])
            rows[name] = each.reshape(math.prod(shape), *flat.shape[1:])
        if mask is None or mask.shape != shape:  # a mask of another shape is refused by the router
            return rows
        return {name: without_padding(row, mask.reshape(-1)) for name, row in rows.items()}


register_dataclass(Context)  # so that FSDP and torch.export see the tensors inside


def rows_of(context: Context | Rows | None, x: Tensor, mask: Tensor | None) -> Rows | None:
    """Return the rows of a ``Context`` beside tokens x (..., D); rows and None are returned as they are."""
    return context.rows(x.shape[:-1], mask) if isinstance(context, Context) else context


def without_padding(values: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``values`` (*L, *S) with zeros where ``mask`` (*L) has no real token, in value and gradient."""
    if mask is None:
        return values
    return values.masked_fill(~mask.bool()[(..., *[None] * (values.dim() - mask.dim()))], 0)


def _flat(name: str, value: Tensor, lead: tuple[int, ...], kind: str) -> Tensor:
    """``value`` with its leading dimensions ``lead`` made one."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"Context: {name!r} must be a tensor, got a {type(value).__name__}")
    if value.shape[: len(lead)] != lead:
        raise UserError(
            f"Context: {name!r} has shape {tuple(value.shape)}, but there are {lead} {kind}; give it one value for each"
        )
    return value.reshape(math.prod(lead), *value.shape[len(lead) :])
