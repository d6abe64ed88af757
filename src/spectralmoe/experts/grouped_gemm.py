"""Grouped GEMM: it multiplies the rows of each expert, which stand together, by that expert's matrix.

It has two forms. ``torch.nn.functional.grouped_mm`` is used where dtype and shape allow. Elsewhere a custom operator
runs one GEMM an expert: it takes any dtype and width, ``torch.compile`` takes it as one node, and its backward writes
each expert's gradient in place (indexing a stacked parameter in a Python loop would allocate the whole stack for each
expert).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.torch_private import transforming

__all__ = ["grouped_linear", "row_experts", "supports_grouped_mm"]

_ROW_BYTES = 16  # grouped_mm wants rows of a multiple of 16 bytes


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Multiply the rows of expert e, ``counts[e]`` of them, by the transpose of ``weight[e]``: (M, D) -> (M, H).

    Under ``torch.compile`` there may be more rows than ``counts`` sums to; these give zero and get no gradient.

    Args:
        x: (M, D), sorted by expert.
        weight: (E, H, D), E linear layers stacked; it is cast to ``x.dtype``.
        counts: (E,) int64, on the device of x or on the CPU. The form with one GEMM an expert reads them on the CPU;
            if they are on a GPU, it waits for them in forward and backward.

    >>> x, w = torch.randn(5, 8), torch.randn(2, 4, 8)
    >>> y = grouped_linear(x, w, torch.tensor([3, 2]))
    >>> torch.allclose(y, torch.cat([x[:3] @ w[0].T, x[3:] @ w[1].T]), atol=1e-5)
    True
    """
    weight = weight.to(x.dtype)
    if transforming():
        return _every_matrix(x, weight, counts)
    x = x.contiguous()
    if not supports_grouped_mm(x, weight):
        return _grouped_gemm(x, weight, counts)  # type: ignore[no-any-return]
    ends = _beside(counts, x.device).cumsum(0)
    if not torch.compiler.is_compiling():
        return _grouped_mm(x, weight, ends)
    tail = (torch.arange(x.shape[0], device=x.device) >= ends[-1])[:, None]  # grouped_mm leaves these undefined
    return _grouped_mm(x.masked_fill(tail, 0), weight, ends).masked_fill(tail, 0)


def supports_grouped_mm(x: Tensor, weight: Tensor) -> bool:
    """Return whether ``torch.nn.functional.grouped_mm`` takes these operands."""
    aligned = all(width * x.element_size() % _ROW_BYTES == 0 for width in weight.shape[1:])
    dtypes = (torch.float32, torch.bfloat16, torch.float16) if x.device.type == "cpu" else (torch.bfloat16,)
    return x.dtype in dtypes and aligned and x.shape[0] > 0 and x.device.type in ("cpu", "cuda")


def row_experts(counts: Tensor, rows: int, device: torch.device | None = None) -> Tensor:
    """Return the expert of each of M = ``rows`` sorted rows: (M,) int64; E for rows behind the last expert's.

    Args:
        device: the device of the result; None is that of ``counts``.
    """
    counts = counts if device is None else _beside(counts, device)
    return torch.searchsorted(counts.cumsum(0), torch.arange(rows, device=counts.device), right=True)


def _beside(counts: Tensor, device: torch.device) -> Tensor:
    """Copy ``counts`` to ``device`` without blocking."""
    return counts.to(device, non_blocking=True)


def _every_matrix(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """Each row times every matrix, and its own expert's taken: for transforms, which know all of its operations."""
    rows = torch.arange(x.shape[0], device=x.device)[:, None]
    ends = counts.cumsum(0)
    in_block = (rows >= ends - counts) & (rows < ends)
    return torch.where(in_block.T[..., None], x @ weight.mT, 0).sum(0)


def _grouped_mm(x: Tensor, weight: Tensor, ends: Tensor) -> Tensor:
    y = F.grouped_mm(x, weight.mT, offs=ends.to(torch.int32))
    return _DenseGradient.apply(y)  # type: ignore[no-any-return]


class _DenseGradient(torch.autograd.Function):
    """Identity whose gradient is laid out densely: the backward of grouped_mm refuses expanded gradients."""

    @staticmethod
    def forward(ctx: Any, y: Tensor) -> Tensor:
        return y.view_as(y)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.contiguous()


@torch.library.custom_op("spectralmoe::grouped_gemm", mutates_args=())
def _grouped_gemm(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    out = x.new_zeros(x.shape[0], weight.shape[1])
    start = 0
    for e, count in enumerate(counts.tolist() if len(x) else ()):
        if count:
            torch.mm(x[start : start + count], weight[e].T, out=out[start : start + count])
        start += count
    return out


@torch.library.custom_op("spectralmoe::grouped_outer", mutates_args=())
def _grouped_outer(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    """Block e of ``grad`` (M, H) transposed times block e of ``x`` (M, D): (E, H, D)."""
    out = x.new_zeros(counts.shape[0], grad.shape[1], x.shape[1])
    start = 0
    for e, count in enumerate(counts.tolist() if len(x) else ()):
        if count:
            torch.mm(grad[start : start + count].T, x[start : start + count], out=out[e])
        start += count
    return out


@_grouped_gemm.register_fake
def _(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[1])


@_grouped_outer.register_fake
def _(grad: Tensor, x: Tensor, counts: Tensor) -> Tensor:
    return x.new_empty(counts.shape[0], grad.shape[1], x.shape[1])


def _save_gemm(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _gemm_backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
    x, weight, counts = ctx.saved_tensors
    grad = grad.contiguous()
    wants_x, wants_weight, _ = ctx.needs_input_grad
    return (
        _grouped_gemm(grad, weight.mT, counts) if wants_x else None,
        _grouped_outer(grad, x, counts) if wants_weight else None,
        None,
    )


def _outer_backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
    left, right, counts = ctx.saved_tensors  # out[e] = left[e]' right[e]
    return _grouped_gemm(right, grad, counts), _grouped_gemm(left, grad.mT, counts), None


_grouped_gemm.register_autograd(_gemm_backward, setup_context=_save_gemm)
_grouped_outer.register_autograd(_outer_backward, setup_context=_save_gemm)
