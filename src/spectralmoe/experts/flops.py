"""Counts the floating-point operations of a module on one row while it runs."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import chain
from math import log2, prod
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

__all__ = ["count_flops"]

Formula = Callable[..., int]


def count_flops(module: nn.Module, shape: Sequence[int]) -> int:
    """Count the floating-point operations of ``module`` on one row of ``shape`` (*S); multiply and add are two.

    It counts matrix products, convolutions, attention and Fourier transforms (5 n log2 n for a complex transform of n
    numbers, half of that for a real one), and nothing else. A copy of the module runs in evaluation mode on zeros.

    >>> count_flops(nn.Conv2d(3, 8, 1), (3, 10, 10))
    4800
    """
    twin = copy.deepcopy(module).eval()
    like = next((tensor for tensor in chain(twin.parameters(), twin.buffers()) if tensor.is_floating_point()), None)
    row = torch.zeros(1, *shape) if like is None else like.new_zeros(1, *shape)
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)  # one operator of torch's own, which no counter looks into
    try:
        with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=_TRANSFORMS) as counter:
            twin(row)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
    return int(counter.get_total_flops())


def _transform(share: float, counts_output: bool) -> Formula:
    """The operations of Fourier transforms over ``dims``: of the numbers that go in, or of those that come out."""

    def operations(shape: Sequence[int], dims: Sequence[int], *_: Any, out_shape: Sequence[int], **__: Any) -> int:
        numbers = out_shape if counts_output else shape
        size = prod(numbers[dim] for dim in dims)
        return round(share * prod(numbers) * log2(size)) if size > 1 else 0

    return operations


_TRANSFORMS: dict[Any, Formula] = {
    torch.ops.aten._fft_r2c: _transform(2.5, False),
    torch.ops.aten._fft_c2r: _transform(2.5, True),
    torch.ops.aten._fft_c2c: _transform(5.0, False),
}
