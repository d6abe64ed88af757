"""The work after an optimizer step: running statistics, biases and bases move, by the records of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectralmoe.errors import UserError
from spectralmoe.parts import Part
from spectralmoe.recording import Recordable
from spectralmoe.tape import Record

__all__ = ["after", "device_of", "parallel_of", "refuse_join"]


@torch.no_grad()
def after(layers: dict[str, Recordable], records: Sequence[Record], group: Any) -> None:
    """Update the statistics of each part of the layers, and call its ``after_step``; frozen parts stay as they are.

    Every rank of ``group`` must call it.
    """
    moving, gathered = [], []
    for layer in layers.values():
        seen = [item for item in records if item.layer is layer]
        parts = _moving_parts(layer)
        moving += parts
        gathered += _statistics(layer, parts, seen)
    totals = _summed([sums for _, sums, _ in gathered], group)
    for (part, _, counted), total in zip(gathered, totals, strict=True):
        if counted:
            part.update(total)
    for part in moving:
        part.after_step()


def _moving_parts(layer: Recordable) -> list[Part]:
    """The parts of ``layer`` that are not frozen; with its scorer a whole router rests."""
    router = layer.router
    resting = set(router.modules()) if router is not None and router.is_frozen else set()
    return [part for _, part in layer.parts() if not part.is_frozen and part not in resting]


def _statistics(layer: Recordable, parts: list[Part], seen: Sequence[Record]) -> list[tuple[Part, Tensor, bool]]:
    """The parts that keep statistics, with the sums of this rank, and whether they take the sums of all ranks.

    A part rests where its layer ran in evaluation mode alone; where it did not run, what other ranks saw counts.
    """
    if (router := layer.router) is None:
        return []
    counts = torch.zeros(router.num_experts, dtype=torch.int64, device=device_of(layer))
    tokens = torch.zeros(0, router.scorer.dim, device=counts.device)
    trained = [item for item in seen if item.training]
    gathered = []
    for part in parts:
        sums = part.statistics(tokens, counts)
        if sums is None:
            continue
        for item in trained:
            loads = item.routing.load_counts() if item.routing.live is None else counts
            added = part.statistics(tokens if item.tokens is None else _real(item.tokens, item.routing.mask), loads)
            sums = sums if added is None else sums + added
        gathered.append((part, sums, bool(trained) or not seen))
    return gathered


def _real(tokens: Tensor, mask: Tensor | None) -> Tensor:
    """The rows of ``tokens`` (N, D) that are no padding."""
    return tokens if mask is None else tokens[mask]


def parallel_of(model: nn.Module) -> DistributedDataParallel | None:
    """Return the DDP wrapper around or inside ``model``; None if there is none."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def refuse_join(parallel: DistributedDataParallel | None, cure: str) -> None:
    """Refuse to sum over ranks inside torch's ``Join``, if ranks without inputs would not take part.

    Args:
        cure: what the caller should do instead, for the error message.
    """
    if parallel is not None and (config := parallel._join_config).enable and not config.throw_on_early_termination:
        raise UserError(f"uneven inputs: a rank that has none left would miss the sums over the ranks; do it {cure}")


def _summed(totals: list[Tensor], group: Any) -> list[Tensor]:
    """The tensors of all parts, summed over the ranks in one call for each dtype."""
    if not totals or not (dist.is_available() and dist.is_initialized()):
        return totals
    summed = list(totals)
    for dtype in dict.fromkeys(total.dtype for total in totals):
        alike = [i for i, total in enumerate(totals) if total.dtype == dtype]
        flat = torch.cat([totals[i].flatten() for i in alike])
        dist.all_reduce(flat, group=group)
        for i, part in zip(alike, flat.split([totals[i].numel() for i in alike]), strict=True):
            summed[i] = part.view_as(totals[i])
    return summed


def device_of(layer: nn.Module) -> torch.device:
    """Return the device of the layer's first tensor; the CPU if it has none."""
    return next((tensor.device for tensor in chain(layer.parameters(), layer.buffers())), torch.device("cpu"))
