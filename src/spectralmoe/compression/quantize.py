"""Quantisation: it rounds matrices to symmetric integers of few bits, and counts the bytes that these take."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from spectralmoe.errors import UserError

__all__ = ["SCALE_BYTES", "checked_bits", "fake_quantize", "quantise_", "stored_bytes"]

SCALE_BYTES = 4
"""The bytes of a row's scale, a float32."""


def fake_quantize(weight: Tensor, bits: int) -> Tensor:
    r"""Round ``weight`` to symmetric integers of ``bits`` bits with one scale a row, and back to its dtype.

    .. math:: \hat w_{ij} = s_i \, \mathrm{round}(w_{ij} / s_i), \qquad s_i = \max_j |w_{ij}| / (2^{b-1} - 1)

    Halves are rounded to the even neighbour. The result is an ordinary tensor; ``stored_bytes`` counts the bytes that
    the integers would take.

    Args:
        weight: (rows, ...); a row is everything at one index of the first dimension.
        bits: b, 2 to 32.

    Raises:
        UserError: ``bits`` is not 2 to 32, or ``weight`` has a single dimension, so that each entry would be a row.

    >>> fake_quantize(torch.tensor([[1.0, -0.4, 0.2], [0.0, 0.0, 0.0]]), 2).tolist()
    [[1.0, 0.0, 0.0], [0.0, 0.0, 0.0]]
    """
    checked_bits("fake_quantize", bits)
    if weight.dim() < 2:
        raise UserError(f"fake_quantize: takes a matrix, one scale a row, got a tensor of shape {tuple(weight.shape)}")
    if not weight.numel():
        return weight.clone()
    most, rows = 2 ** (bits - 1) - 1, weight.detach().float().flatten(1)
    scales = (rows.abs().amax(1) / most).clamp_min(torch.finfo(torch.float32).tiny)  # a row of zeros stays one
    zeros = torch.zeros_like(scales, dtype=torch.int32)
    rounded = torch.fake_quantize_per_channel_affine(rows, scales, zeros, 0, -most, most)
    return rounded.view_as(weight).to(weight.dtype)


@torch.no_grad()
def quantise_(tensors: Iterable[Tensor], bits: int) -> None:
    """Apply ``fake_quantize`` in place to every matrix among ``tensors``; vectors, such as biases, stay as they are."""
    for tensor in tensors:
        if tensor.dim() > 1:
            tensor.copy_(fake_quantize(tensor, bits))


def stored_bytes(tensors: Iterable[Tensor], bits: int | None = None) -> int:
    """Count the bytes of ``tensors``; with ``bits``, matrices count as packed integers and a scale a row.

    >>> matrix, bias = torch.zeros(2, 8), torch.zeros(2)
    >>> stored_bytes([matrix, bias]), stored_bytes([matrix, bias], 3)
    (72, 22)
    """
    total = 0
    for tensor in tensors:
        packed = bits is not None and tensor.dim() > 1
        plain = tensor.numel() * tensor.element_size()
        total += -(-tensor.numel() * (bits or 0) // 8) + SCALE_BYTES * len(tensor) if packed else plain
    return total


def checked_bits(owner: str, bits: int) -> int:
    """Return ``bits`` if it is a whole number from 2 to 32.

    Raises:
        UserError: it is not; the message begins with ``owner``.
    """
    if not isinstance(bits, int) or isinstance(bits, bool) or not 2 <= bits <= 32:
        raise UserError(f"{owner}: bits must be a whole number from 2 to 32, got {bits}")
    return bits
