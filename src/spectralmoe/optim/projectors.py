r"""Projectors onto the directions that an expert's inputs do not use; ``OrthogonalExperts`` projects steps with them.

As in orthogonal weight modification, Zeng et al., "Continual Learning of Context-dependent Processing in Neural
Networks", arXiv 1810.01256, whose recursion over tokens, :math:`P \leftarrow P - P x x^\top P / (a + x^\top P x)`, ends
at :math:`(I + \sum x x^\top / a)^{-1}`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from spectralmoe.dispatch.base import sort_slots
from spectralmoe.linalg import without_autocast
from spectralmoe.routing import EMPTY
from spectralmoe.sharding import beside
from spectralmoe.tape import Record

__all__ = ["add_inputs", "others", "projected", "projectors"]

_NOISE = 1e-5
"""A projected step below this share of the step is rounding, and is not made larger."""


def add_inputs(sums: Sequence[Tensor], record: Record) -> None:
    """Add the inputs x of each expert to the sums of x x' (E, D, D) and of x (E, D), and to their number (E,) int64.

    Tokens that are not finite are left out, because the steps that a gradient scaler skips come here, too.
    """
    outer, total, count = sums
    tokens = record.tensor("tokens").to(outer.dtype)
    broken = ~tokens.isfinite().all(-1, keepdim=True)
    indices = record.routing.indices.masked_fill(broken, EMPTY)
    slots = sort_slots(replace(record.routing, indices=indices, full=False), len(count))
    with torch.autocast(tokens.device.type, enabled=False):
        for e, chosen in enumerate(slots.order[: int(slots.counts.sum())].split(slots.counts.tolist())):
            rows = tokens[chosen // slots.slots]
            outer[e].addmm_(rows.mT, rows)
            total[e] += rows.sum(0)
    count += slots.counts


@without_autocast
def projectors(
    outer: Tensor, total: Tensor, count: Tensor, *, alpha: float = 0.1, center: bool = True, rank: int | None = None
) -> Tensor:
    """Compute the projectors P_e (E, D, D) of each expert's inputs: symmetric, with eigenvalues in (0, 1].

    With ``rank`` the eigenvalues are 0 and 1. Eigenvalues of C within rounding of 0 count as 0. An expert without
    inputs, or whose inputs all equal the mean, gets the identity. The computation is in float64.

    Args:
        outer, total, count: the sums of x x' (E, D, D) and of x (E, D) over each expert's inputs, and their number
            (E,).
        alpha, center, rank: as of ``OrthogonalExperts``.

    >>> x = torch.tensor([[2.0, 0.0]])  # one token of one expert: C = diag(4, 0), its mean eigenvalue 2
    >>> projectors((x.mT @ x)[None], x, torch.tensor([1]), alpha=1.0, center=False)
    tensor([[[0.3333, 0.0000],
             [0.0000, 1.0000]]])
    """
    mean = total.double().sum(0) / count.sum().clamp_min(1) * center
    made = []
    for one, own, number in zip(outer, total, count, strict=True):
        shift = torch.outer(mean, own.double())
        c = (one.double() - shift - shift.mT + number * torch.outer(mean, mean)) / number.clamp_min(1)
        rounding = 8 * torch.finfo(outer.dtype).eps * one.trace() / number.clamp_min(1)
        values, vectors = torch.linalg.eigh(c)
        values = torch.where(values > rounding, values, 0)
        if rank is None:
            kept = 1 / (1 + values / (alpha * values.mean()).clamp_min(torch.finfo(values.dtype).tiny))
        else:
            kept = 1 - (values > 0).double()
            kept[:-rank] = 1
        made.append((vectors * kept @ vectors.mT).to(outer.dtype))
    return torch.stack(made)


def others(made: Tensor) -> Tensor:
    """Return for each expert the mean of the other experts' projectors (E, D, D)."""
    return (made.sum(0) - made) / (len(made) - 1)


@without_autocast
def projected(step: Tensor, projector: Tensor, *, match_norm: bool) -> Tensor:
    """Multiply each expert's step (E, H, D), sharded or whole, by its projector (E, D, D).

    Args:
        match_norm: whether each product is scaled to the norm of its step.
    """
    wide = step.to(projector.dtype)
    result = torch.bmm(wide, beside(projector, step))
    if match_norm:
        had, has = (torch.linalg.vector_norm(each, dim=(1, 2), keepdim=True) for each in (wide, result))
        result.mul_(torch.where(has > _NOISE * had, had / has, 1.0))
    return result.to(step.dtype)
