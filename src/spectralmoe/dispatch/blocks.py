"""Rows sorted by expert, cut into blocks that fit a cache."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

__all__ = ["Block", "cut_blocks", "sort_by_expert"]


@dataclass(slots=True)
class Block:
    """Consecutive sorted rows: those of some experts, or a part of one expert's."""

    start: int
    size: int = 0
    experts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)  # rows of each
    begins: list[bool] = field(default_factory=list)  # whether they are its first

    def multiply(self, x: Tensor, matrices: Tensor, out: Tensor) -> None:
        """The rows of each expert times its matrix."""
        for e, rows, result in zip(self.experts, x.split(self.sizes), out.split(self.sizes), strict=True):
            torch.mm(rows, matrices[e], out=result)

    def outer(self, left: Tensor, right: Tensor, out: Tensor) -> None:
        """Left' times right for each expert, over all of its blocks."""
        pieces = zip(self.experts, self.begins, left.split(self.sizes), right.split(self.sizes), strict=True)
        for e, begins, a, b in pieces:
            if begins:
                torch.mm(a.T, b, out=out[e])
            else:
                out[e].addmm_(a.T, b)

    def add(self, x: Tensor, out: Tensor) -> None:
        """Add the rows of each expert to its row of ``out``."""
        for e, rows in zip(self.experts, x.split(self.sizes), strict=True):
            out[e] += rows.sum(0, dtype=out.dtype)

    def each(self, table: Tensor) -> Tensor:
        """For each row that of its expert in ``table``."""
        return table[self.experts].repeat_interleave(torch.tensor(self.sizes), dim=0)


def cut_blocks(counts: list[int], most: int) -> list[Block]:
    """All rows in blocks of about ``most`` rows; a large expert is cut into equal parts."""
    blocks: list[Block] = []
    for e, count in enumerate(counts):
        parts = max(round(count / most), min(count, 1))
        for part in range(parts):
            size = count * (part + 1) // parts - count * part // parts
            if not blocks or blocks[-1].size + size > most:
                blocks.append(Block(blocks[-1].start + blocks[-1].size if blocks else 0))
            block = blocks[-1]
            block.size += size
            block.experts.append(e)
            block.sizes.append(size)
            block.begins.append(part == 0)
    return blocks


def sort_by_expert(indices: Tensor, num_experts: int) -> tuple[Tensor, Tensor]:
    """(order, counts): the flat slots by expert, stably, those without one behind; rows of each expert."""
    key = torch.where((indices >= 0) & (indices < num_experts), indices, num_experts).flatten()
    if num_experts < 2**15:
        key = key.to(torch.int16)  # two passes of a counting sort
    key, order = key.sort(stable=True)
    ends = torch.searchsorted(key, torch.arange(num_experts, dtype=key.dtype), right=True)
    return order, ends.diff(prepend=ends.new_zeros(1))
