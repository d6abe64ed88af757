"""What all layers did in the steps between two reports: exact counts of every step, the rest from the first ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.measure import TOKENS
from spectralmoe.diagnostics.statistics import LayerStatistics
from spectralmoe.diagnostics.watch import Seen, Watched
from spectralmoe.instruments.document import layer_names, value_blocks

__all__ = ["Window"]

_SAMPLE = 4 * TOKENS
_EXTRA = 4  # columns after those of the experts: slots with zero experts, empty slots, tokens, slots asked for


class Window:
    """Sums on the device of the model; nothing is read before ``take``.

    The counts of a step take a few kernels for all layers together, whatever the depth.
    """

    def __init__(self, layers: Sequence[Watched], device: torch.device) -> None:
        self.layers, self.device = layers, device
        self.width = max((layer.num_experts for layer in layers), default=0)
        self._places = {id(layer): place for place, layer in enumerate(layers)}
        self._index: dict[tuple[int, ...], Tensor] = {}
        self._start()

    def add(self, calls: Sequence[Seen]) -> None:
        """Count the calls of some forwards."""
        for alike in _grouped(calls):
            self._count(alike)
        if self._sampled < _SAMPLE:
            for call in calls:
                self._look(call).add(call.routing)
            self._sampled += sum(len(call.routing.logits) for call in calls if call.layer is calls[0].layer)

    def take(self, summed: Callable[[Tensor], Tensor]) -> tuple[int, list[dict[str, Any]]]:
        """The tokens of the layer that saw most, and the values of each layer, as in an inspection; then start anew.

        Args:
            summed: adds a flat float64 tensor up over the ranks. Counts below 2^53 stay exact.
        """
        looks = [self._looks.get(place) or _empty(layer) for place, layer in enumerate(self.layers)]
        parts = [self._counts, *(part for look in looks for part in (look.ints, look.sums))]
        flat = summed(torch.cat([part.to(self.device, torch.float64).flatten() for part in parts])).cpu()
        counts, *rest = flat.split([part.numel() for part in parts])
        blocks, rows = [], counts.view(self._counts.shape).long()
        for layer, row, ints, sums in zip(self.layers, rows, rest[::2], rest[1::2], strict=True):
            look = _empty(layer)
            look.ints, look.sums = ints.long(), sums
            blocks.append({**layer_names(layer), **_values(layer, row, look)})
        self._start()
        return int(rows[:, -2].max()), blocks

    def _start(self) -> None:
        self._sampled = 0
        shape = (len(self.layers), self.width + _EXTRA)
        self._counts = torch.zeros(shape, dtype=torch.int64, device=self.device)
        self._looks: dict[int, LayerStatistics] = {}

    def _look(self, call: Seen) -> LayerStatistics:
        """The sampled sums of a layer, where the layer is."""
        place = self._places[id(call.layer)]
        if place not in self._looks:
            self._looks[place] = _empty(call.layer, call.routing.logits.device)
        return self._looks[place]

    def _count(self, calls: Sequence[Seen]) -> None:
        """Count calls of equal size with one kernel for all layers."""
        first, e = calls[0].routing, calls[0].layer.num_experts
        chosen = torch.stack([_chosen(call).flatten() for call in calls])
        bins = torch.where(chosen < 0, self.width + 1, torch.where(chosen < e, chosen, self.width))
        found = chosen.new_zeros(len(calls), self.width + _EXTRA)
        found.scatter_add_(1, bins, bins.new_ones(()).expand_as(bins))
        masks = [mask for call in calls if (mask := call.routing.mask) is not None]
        asked = [asked for call in calls if (asked := call.routing.asked) is not None]
        found[:, -2] += torch.stack(masks).sum(1) if masks else len(first.logits)
        if asked:
            found[:, -1] += torch.stack(asked).flatten()
        places = tuple(self._places[id(call.layer)] for call in calls)
        if places not in self._index:  # made once: a tensor from a list waits for the device
            self._index[places] = torch.tensor(places, device=self.device)
        self._counts.index_add_(0, self._index[places], found.to(self.device))


def _chosen(call: Seen) -> Tensor:
    """The experts that carry the load of a call, -1 where there is none."""
    return call.routing.top_expert() if call.routing.soft else call.routing.indices


def _grouped(calls: Sequence[Seen]) -> list[list[Seen]]:
    """The calls whose tensors can be stacked."""
    groups: dict[Any, list[Seen]] = {}
    for call in calls:
        made = call.routing
        key = (
            made.indices.device,
            made.indices.shape,
            call.layer.num_experts,
            made.soft,
            made.mask is None,
            made.asked is None,
        )
        groups.setdefault(key, []).append(call)
    return list(groups.values())


def _empty(layer: Watched, device: torch.device | str = "cpu") -> LayerStatistics:
    return LayerStatistics(layer.num_experts, layer.top_k, device)


def _values(layer: Watched, row: Tensor, look: LayerStatistics) -> dict[str, Any]:
    """The values of one layer, for JSON: the load from the exact counts, what is of single batches from the sample."""
    filled, tokens, asked = int(row[: -_EXTRA + 1].sum()), int(row[-2]), int(row[-1])
    exact = _empty(layer)
    exact.add_counts(row[: layer.num_experts], tokens=tokens, filled=filled, asked=asked or filled)
    blocks = value_blocks(Evidence(counts=exact, statistics=look), {"counts", "routing"})
    return {"finite_scores": look.finite(), **blocks, "weights": look.weights()}
