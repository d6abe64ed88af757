"""Running sums over the routings of one layer, which can be added over batches and ranks, and measures of them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from spectralmoe.diagnostics.entropy import token_entropies
from spectralmoe.diagnostics.load import concentration, per_sequence
from spectralmoe.diagnostics.measure import TOKENS, Measure
from spectralmoe.diagnostics.stability import margins, tie_counts
from spectralmoe.routing import Routing

__all__ = ["SLOTS_AN_EXPERT", "LayerStatistics"]

SLOTS_AN_EXPERT = 10
"""A load needs this many slots for each expert; then an expert with an even load has none with probability e^-10."""

_INTS = ("tokens", "judged", "ties", "asked", "filled", "batches", "sequences", "constant")
_FLOATS = ("entropy", "margin", "batch_vio", "sequence_vio", "sequence_concentration")


class LayerStatistics:
    """Running sums over the routings of one layer, and the measures that follow from them.

    The tensors ``ints`` (int64) and ``sums`` (float64) can be added over ranks by an all-reduce.

    Args:
        num_experts: E.
        top_k: K; None if it varies.
        device: the device of the sums.

    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> from spectralmoe.diagnostics import max_vio
    >>> seen = LayerStatistics(4, 2)
    >>> seen.add(Router(LinearScorer(8, 4), TopK(2))(torch.randn(100, 8)))
    >>> seen.of_share(max_vio).data, seen.number("tokens")
    (200, 100)
    """

    def __init__(self, num_experts: int, top_k: int | None, device: torch.device | str = "cpu") -> None:
        self.num_experts, self.top_k = num_experts, top_k
        self.ints = torch.zeros(num_experts + len(_INTS), dtype=torch.int64, device=device)
        self.sums = torch.zeros(2 * num_experts + len(_FLOATS), dtype=torch.float64, device=device)

    @torch.no_grad()
    def add(self, routing: Routing) -> None:
        """Add one routing; the CPU does not wait for a GPU."""
        e, mask = self.num_experts, routing.mask
        if not len(routing.logits):
            return
        real = routing.logits.new_ones(len(routing.logits), dtype=torch.bool) if mask is None else mask
        counts, tokens = routing.load_counts()[:e], real.sum()
        filled = (routing.indices >= 0) & real[:, None]
        weights = torch.where(filled, routing.weights.detach(), 0).double()
        inside = torch.where(filled & (routing.indices < e), routing.indices, 0)
        asked = filled.sum() if routing.asked is None else routing.asked
        self._count(tokens=tokens, asked=asked, filled=filled.sum(), batches=1)
        self._count(constant=((weights == 1) & filled).sum())
        self.ints[:e] += counts
        self.sums[:e] += torch.where(real[:, None], routing.probs.detach()[:, :e], 0).double().sum(0)
        self.sums[e : 2 * e].scatter_add_(0, inside.flatten(), torch.where(routing.indices < e, weights, 0).flatten())
        self._sum(entropy=torch.where(real, token_entropies(routing), 0).sum(), batch_vio=_vio(counts[None])[0])
        self._add_margins(margins(routing))
        self._add_sequences(routing)

    def add_counts(self, slots: Tensor, **numbers: int) -> None:
        """Add the slots of each expert (E,), and numbers of tokens and slots, that were counted elsewhere."""
        self.ints[: self.num_experts] += slots
        self._count(**numbers)

    def number(self, name: str) -> int:
        """Return one of the counts: "tokens", "batches", "sequences", "asked", "filled", ..."""
        return int(self.ints[self.num_experts + _INTS.index(name)])

    def counts(self) -> Tensor:
        """Return the slots of each expert (E,) int64."""
        return self.ints[: self.num_experts]

    def share(self) -> Tensor:
        """Return each expert's share of the load (E,) float64; 0 without data."""
        return self.counts().double() / self.counts().sum().clamp_min(1)

    def finite(self) -> bool:
        """Return whether all scores and weights were finite; True without data."""
        return bool(self.sums[: 2 * self.num_experts].isfinite().all())

    def of_share(self, value: Callable[[Tensor], float]) -> Measure:
        """Measure a function of the load (E,); it needs ``SLOTS_AN_EXPERT`` slots for each expert."""
        return Measure.of(value(self.share()), self._slots(), "slots", SLOTS_AN_EXPERT * self.num_experts)

    def concentration(self) -> Measure:
        """Measure how far the load is concentrated on the K busiest experts (``load.concentration``)."""
        return self.of_share(lambda share: concentration(share, self.top_k or 1))

    def dropped(self) -> Measure:
        """Measure the share of slots that a capacity emptied."""
        asked = self.number("asked")
        return Measure.of(1 - self.number("filled") / max(asked, 1), asked, "slots", TOKENS)

    def max_vio_batch(self) -> Measure:
        """Measure the mean over the batches of MaxVio."""
        batches = self.number("batches")
        enough = self._slots() >= SLOTS_AN_EXPERT * self.num_experts
        return Measure.of(self._mean("batch_vio", batches), batches if enough else 0, "batches")

    def of_sequences(self, name: str) -> Measure:
        """Measure the mean over single sequences of "sequence_vio" (MaxVio) or "sequence_concentration"."""
        sequences = self.number("sequences")
        return Measure.of(self._mean(name, sequences), sequences, "sequences")

    def token_entropy(self) -> Measure:
        """Measure the mean over tokens of the entropy of a token's scores, over log E."""
        return Measure.of(self._mean("entropy", self.number("tokens")), self._choosing(), needs=TOKENS)

    def mean_entropy(self) -> Measure:
        """Measure the entropy of the mean scores, over log E."""
        probs = self.sums[: self.num_experts]
        mean = probs / probs.sum().clamp_min(1e-300)
        entropy = float(-torch.xlogy(mean, mean).sum()) / math.log(max(self.num_experts, 2))
        return Measure.of(entropy, self._choosing(), needs=TOKENS)

    def near_tie(self) -> Measure:
        """Measure the share of tokens whose margin is at most ``stability.NEAR``."""
        judged = self.number("judged")
        return Measure.of(self.number("ties") / max(judged, 1), judged, needs=TOKENS)

    def margin(self) -> Measure:
        """Measure the mean margin of the tokens that have one."""
        judged = self.number("judged")
        return Measure.of(self._mean("margin", judged), judged, needs=TOKENS)

    def weights(self) -> dict[str, Any]:
        """Return each expert's share of all combine weights, and whether every combine weight is exactly 1."""
        carried, filled = self.sums[self.num_experts : 2 * self.num_experts], self.number("filled")
        share = carried / carried.sum().clamp_min(1e-300)
        constant = filled > 0 and self.number("constant") == filled
        return {"share": share.tolist() if share.isfinite().all() else [], "constant": constant}

    def _slots(self) -> int:
        return int(self.counts().sum())

    def _choosing(self) -> int:
        """The tokens that had a choice: none where there is one expert."""
        return self.number("tokens") if self.num_experts > 1 else 0

    def _add_margins(self, values: Tensor) -> None:
        judged, ties = tie_counts(values)
        self._count(judged=judged, ties=ties)
        self._sum(margin=torch.where(values.isfinite(), values, 0).sum())

    def _add_sequences(self, routing: Routing) -> None:
        if routing.shape is None or len(routing.shape) != 2:
            return
        counts = per_sequence(routing)[:, : self.num_experts]
        enough = counts.sum(1) >= SLOTS_AN_EXPERT * self.num_experts
        k, e = self.top_k or 1, self.num_experts
        shares = counts.double() / counts.sum(1, keepdim=True).clamp_min(1)
        concentrations = (shares.topk(min(k, e), dim=1).values.sum(1) - k / e) / max(1 - k / e, 1e-300)
        self._count(sequences=enough.sum())
        self._sum(
            sequence_vio=torch.where(enough, _vio(counts), 0).sum(),
            sequence_concentration=torch.where(enough, concentrations, 0).sum(),
        )

    def _count(self, **values: Tensor | int) -> None:
        for name, value in values.items():
            self.ints[self.num_experts + _INTS.index(name)] += value

    def _sum(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.sums[2 * self.num_experts + _FLOATS.index(name)] += value

    def _mean(self, name: str, over: int) -> float:
        return float(self.sums[2 * self.num_experts + _FLOATS.index(name)]) / max(over, 1)


def _vio(counts: Tensor) -> Tensor:
    """MaxVio of rows of counts (B, E): (B,) float64, 0 without data."""
    means = counts.double().mean(1)
    return torch.where(means > 0, counts.amax(1) / means.clamp_min(1e-300) - 1, 0)
