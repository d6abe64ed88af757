"""Kept rows laid out by token and slot, for terms that compare the experts of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.tape import Record

__all__ = ["grams_of_tokens", "rows_by_token"]


def rows_by_token(owner: str, record: Record, name: str) -> Tensor:
    """A kept tensor as (N, K, W), at least fp32: what each expert of a token made; zero in a slot without a row.

    Found by their slots: rows are kept in the order of the experts, in which neighbours are of different tokens.

    Raises:
        UserError: it was not kept; one expert a token.
    """
    rows = record.tensor(name).flatten(1)
    n, k = record.routing.indices.shape
    if k < 2:
        raise UserError(f"{owner} compares the experts of a token, but layer {record.name!r} gives it one (K={k})")
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.new_zeros(n * k, rows.shape[1]).index_copy_(0, record.order, rows).view(n, k, rows.shape[1])


def grams_of_tokens(rows: Tensor) -> Tensor:
    """The inner products of the rows of each token: (N, K, K) from (N, K, W)."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT
