"""Cuts rows that are sorted by expert into blocks that fit a cache."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Block", "Layout", "cut_blocks", "lay_out", "rows_at_most", "sort_by_expert"]

_STEP = 32  # rows: what a kernel for 16-bit numbers takes at once


@dataclass(slots=True)
class Block:
    """Consecutive sorted rows: all rows of some experts, or a part of the rows of one."""

    start: int
    size: int = 0
    experts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # rows of each
    begins: list[bool] = field(default_factory=list)  # whether they are its first

    def cut(self, x: Tensor) -> tuple[Tensor, ...]:
        """Split x into the rows of each expert."""
        return x.split_with_sizes(self.sizes)

    def multiply(
        self, x: Tensor, matrices: Sequence[Tensor], bias: Sequence[Tensor] | None = None, *, out: Tensor
    ) -> None:
        """Multiply the rows of each expert by its matrix and add its row of ``bias``, into ``out``."""
        for e, rows, result in zip(self.experts, self.cut(x), self.cut(out), strict=True):
            if bias is None:
                torch.mm(rows, matrices[e], out=result)
            else:
                torch.addmm(bias[e], rows, matrices[e], out=result)

    def outer(self, left: Tensor, right: Tensor, out: Sequence[Tensor]) -> None:
        """Add left' right of each expert to its matrix in ``out``; its first block overwrites what was there."""
        for e, begins, a, b in zip(self.experts, self.begins, self.cut(left), self.cut(right), strict=True):
            if begins:
                torch.mm(a.T, b, out=out[e])
            else:
                out[e].addmm_(a.T, b)

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add the sum of the rows of each expert to its row of ``out``."""
        for e, rows in zip(self.experts, self.cut(x), strict=True):
            out[e] += rows.sum(0, dtype=out.dtype)

    def each(self, table: Tensor) -> Tensor:
        """Return for each row the entry of its expert in ``table``."""
        return table[self.experts].repeat_interleave(torch.tensor(self.sizes), dim=0)


@dataclass(frozen=True, slots=True)
class Layout:
    """The order of rows sorted by expert, and the blocks that they are cut into.

    Attributes:
        slots: (P,) the flat slot of each row, expert by expert; slots without an expert may follow.
        real: True for rows of slots, False for copies that fill an expert's rows up (``lay_out``).
        blocks: the blocks, which hold all rows of experts.
    """

    slots: Tensor
    real: Tensor | slice
    blocks: list[Block]

    @property
    def most(self) -> int:
        """The number of rows in the largest block."""
        return max((block.size for block in self.blocks), default=0)

    @property
    def end(self) -> int:
        """The number of rows that belong to experts."""
        return self.blocks[-1].start + self.blocks[-1].size if self.blocks else 0

    def scale(self, weights: Tensor) -> Tensor:
        """Return the combine weight of each row (P, 1); 0 for rows that fill up."""
        scale = weights.flatten()[self.slots, None]
        return scale if isinstance(self.real, slice) else scale * self.real[:, None]


def lay_out(order: Tensor, counts: Tensor, most: int, dtype: torch.dtype) -> Layout:
    """Lay out rows in the order of ``sort_by_expert``, in blocks of about ``most`` rows.

    In 16 bits torch's matmuls on a CPU compile a kernel for every new shape, and loads are new at every step. So there
    the rows of each expert are filled up with copies, to a power of 2 or a multiple of 32 rows.
    """
    loads = counts.tolist()
    if not _fills_up(dtype):
        return Layout(order, slice(None), cut_blocks(loads, most))
    heights = [_filled(load) for load in loads]
    expert = torch.repeat_interleave(torch.tensor(heights))
    row, load = torch.arange(len(expert)) - _starts(torch.tensor(heights))[expert], counts[expert]
    return Layout(order[_starts(counts)[expert] + row % load], row < load, cut_blocks(heights, most, _STEP))


def rows_at_most(slots: int, num_experts: int, dtype: torch.dtype) -> int:
    """Return an upper bound on the rows of a layout of so many slots: filling up adds at most 31 rows an expert."""
    more: int = torch.sym_min(slots, (_STEP - 1) * num_experts) if _fills_up(dtype) else 0  # type: ignore[assignment]
    return slots + more


def _fills_up(dtype: torch.dtype) -> bool:
    return dtype in (torch.bfloat16, torch.float16)


def _filled(load: int) -> int:
    return -(-load // _STEP) * _STEP if load > _STEP else load and 1 << (load - 1).bit_length()


def _starts(sizes: Tensor) -> Tensor:
    return sizes.cumsum(0) - sizes


def cut_blocks(heights: list[int], most: int, step: int = 1) -> list[Block]:
    """Cut all rows into blocks of about ``most`` rows; the rows of a busy expert are cut into equal parts.

    Args:
        heights: the number of rows of each expert.
        step: if a height is a multiple of this, so are its parts.
    """
    blocks = [block := Block(0)]
    for e, height in enumerate(heights):
        for part, size in enumerate(_parts(height, most, 1 if height % step else step)):
            if block.size and block.size + size > most:
                block = Block(block.start + block.size)
                blocks.append(block)
            block.size += size
            block.experts.append(e)
            block.sizes.append(size)
            block.begins.append(part == 0)
    return blocks if block.size else []


def _parts(height: int, most: int, step: int) -> list[int]:
    if 2 * height <= 3 * most:
        return [height] if height else []
    parts = min(round(height / most), height // step)
    edges = [height * part // parts // step * step for part in range(parts + 1)]
    return [end - start for start, end in pairwise(edges)]


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """Return the flat slots sorted by expert, those without one at the end, and the number of rows of each expert."""
    key = indices.flatten().clamp(-1, num_experts) % (num_experts + 1)  # none of our experts: behind the last
    if num_experts < 2**15 - 1:
        key = key.to(torch.int16)  # two passes of a counting sort
    return key.argsort(stable=True), torch.bincount(key, minlength=num_experts + 1)[:num_experts]
