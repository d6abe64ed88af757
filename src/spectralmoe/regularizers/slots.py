"""Rows of experts laid out by token and slot, for terms that compare the experts of one token."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.tape import Record

__all__ = ["grams_of_tokens", "rows_by_token"]


def rows_by_token(owner: str, record: Record, name: str) -> Tensor:
    """Lay a kept tensor (M, W) out by token and slot, (N, K, W), in fp32 or float64; slots without a row are zero.

    Args:
        owner: the name of the regularizer, for error messages.

    Raises:
        UserError: the record did not keep the tensor, or K = 1.
    """
    rows = record.tensor(name).flatten(1)
    n, k = record.routing.indices.shape
    if k < 2:
        raise UserError(
            f"{owner} compares the experts of a token, but layer {record.name!r} gives it one (K={k}); use k >= 2"
        )
    rows = rows.to(torch.promote_types(rows.dtype, torch.float32))
    return rows.new_zeros(n * k, rows.shape[1]).index_copy_(0, record.order, rows).view(n, k, rows.shape[1])


def grams_of_tokens(rows: Tensor) -> Tensor:
    """Return the inner products (N, K, K) between the rows (N, K, W) of each token."""
    with torch.autocast(rows.device.type, enabled=False):
        return rows @ rows.mT
