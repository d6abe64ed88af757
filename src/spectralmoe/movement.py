"""What moves at an optimizer step: bases, streaming statistics, selection biases; from the records of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from spectralmoe.errors import UserError
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.selectors import Selector
from spectralmoe.tape import Record

__all__ = ["after", "before", "device_of", "parallel_of", "refuse_join"]


def before(layers: dict[str, Recordable], records: Sequence[Record]) -> None:
    """Let the scorers of trained routers act on their gradients."""
    for router, items in _moving(layers, records):
        router.scorer.before_step(items)


@torch.no_grad()
def after(layers: dict[str, Recordable], records: Sequence[Record], group: Any) -> None:
    """Statistics, retractions, then selection biases of trained routers; every rank of ``group`` calls."""
    moving = _moving(layers, records)
    streams = [(router, sums) for router, items in moving if (sums := router.scorer.statistics(items)) is not None]
    for (router, _), total in zip(streams, _summed([sums for _, sums in streams], group), strict=True):
        router.scorer.update(total)
    for router, items in moving:
        router.scorer.after_step(items)
    biased = [(router, items) for router, items in moving if type(router.selector).update is not Selector.update]
    counted = [[item for item in items if item.training and item.routing.live is None] for _, items in biased]
    counts = [_counts(router, items) for (router, _), items in zip(biased, counted, strict=True)]
    for (router, items), own, total in zip(biased, counted, _summed(counts, group), strict=True):
        if own or not items:  # without a record of its own, those of other ranks count
            router.selector.update(total)


def _moving(layers: dict[str, Recordable], records: Sequence[Record]) -> list[tuple[Router, list[Record]]]:
    """The routers that are not frozen, each with the records of its layer."""
    routed = [(layer, layer.router) for layer in layers.values() if layer.router is not None]
    return [(router, [item for item in records if item.layer is layer]) for layer, router in routed if _moves(router)]


def _moves(router: Router) -> bool:
    """Whether the router is not frozen."""
    return not router.scorer.is_frozen or any(parameter.requires_grad for parameter in router.selector.parameters())


def _counts(router: Router, records: Sequence[Record]) -> Tensor:
    counts = torch.zeros(router.num_experts, dtype=torch.int64, device=device_of(router))
    return counts + sum((item.routing.load_counts() for item in records), start=counts)


def parallel_of(model: nn.Module) -> DistributedDataParallel | None:
    """The DDP wrapper around or inside ``model``."""
    return next((module for module in model.modules() if isinstance(module, DistributedDataParallel)), None)


def refuse_join(parallel: DistributedDataParallel | None, cure: str) -> None:
    """Refuse sums over ranks inside torch's ``Join`` that ranks without inputs would not take part in."""
    if parallel is not None and (config := parallel._join_config).enable and not config.throw_on_early_termination:
        raise UserError(f"uneven inputs: a rank that has none left would miss the sums over the ranks; do it {cure}")


def _summed(totals: list[Tensor], group: Any) -> list[Tensor]:
    """The tensors of all layers, summed over the ranks in one call."""
    if not totals or not (dist.is_available() and dist.is_initialized()):
        return totals
    flat = torch.cat([total.flatten() for total in totals])
    dist.all_reduce(flat, group=group)
    parts = flat.split([total.numel() for total in totals])
    return [part.view_as(total) for part, total in zip(parts, totals, strict=True)]


def device_of(router: Router) -> torch.device:
    """Where its tensors are; the CPU, where it has none."""
    return next((tensor.device for tensor in chain(router.parameters(), router.buffers())), torch.device("cpu"))
