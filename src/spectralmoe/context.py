"""Context: side information beside the tokens, which parts of a layer read by name."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.utils._pytree import register_dataclass

from spectralmoe.errors import UserError

__all__ = ["Context", "Rows", "rows_of"]

Rows = dict[str, Tensor]
"""Side information as parts get it, by name: one row a token (N, ...)."""


@dataclass(frozen=True)
class Context:
    """Side information by name; a part that reads some says which (``Part.reads``).

    Args:
        tokens: one value a token, (..., *) beside tokens x (..., D).
        samples: one value a sample, (B, *) beside tokens x (B, ..., D).

    >>> context = Context(samples={"severity": torch.tensor([0.5, 0.0])})
    >>> context.rows((2, 3))["severity"].tolist()  # for two samples of three tokens
    [0.5, 0.5, 0.5, 0.0, 0.0, 0.0]
    """

    tokens: Mapping[str, Tensor] = field(default_factory=dict)
    samples: Mapping[str, Tensor] = field(default_factory=dict)

    def rows(self, shape: tuple[int, ...], mask: Tensor | None = None) -> dict[str, Tensor]:
        """All values by name as rows (N, *), one a token, for tokens of the leading dimensions ``shape``.

        Args:
            mask: of that shape, False for padding, whose rows become 0.

        Raises:
            UserError: a value that is no tensor or of another leading shape; a name of both kinds.
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
        padding = ~mask.reshape(-1).bool()
        return {name: row.masked_fill(padding.view(-1, *[1] * (row.dim() - 1)), 0) for name, row in rows.items()}


register_dataclass(Context)  # so that FSDP and torch.export see the tensors inside


def rows_of(context: Context | Rows | None, x: Tensor, mask: Tensor | None) -> Rows | None:
    """The rows of a ``Context`` beside tokens x (..., D); what holds rows already, or nothing, as it is."""
    return context.rows(x.shape[:-1], mask) if isinstance(context, Context) else context


def _flat(name: str, value: Tensor, lead: tuple[int, ...], kind: str) -> Tensor:
    """``value`` with its leading dimensions ``lead`` made one."""
    if not isinstance(value, torch.Tensor):
        raise UserError(f"Context: {name!r} must be a tensor, got a {type(value).__name__}")
    if value.shape[: len(lead)] != lead:
        raise UserError(f"Context: {name!r} has shape {tuple(value.shape)}, but there are {lead} {kind}")
    return value.reshape(math.prod(lead), *value.shape[len(lead) :])
