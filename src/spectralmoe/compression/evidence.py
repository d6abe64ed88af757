"""Evidence: saliencies of experts, computed from a tape of calibration data."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from spectralmoe.compression.saliency import SALIENCIES, affinity, frequency, random, reap, removal, wanda
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import FeedForward
from spectralmoe.moe import MoE
from spectralmoe.tape import Record

__all__ = ["Evidence", "dense_gates"]


class Evidence:
    """Computes loads and saliencies of experts from the records of calibration data.

    Args:
        owner: the name of the calling function, for error messages.
        layers: the MoE layers of the model by name.
        records: a tape of ``record(model)``, or some of its records.
        seed: the seed of the saliency "random".

    Raises:
        UserError: a record comes from another model.
    """

    def __init__(self, owner: str, layers: dict[str, MoE], records: Iterable[Record], seed: int) -> None:
        self.owner, self.records = owner, list(records)
        self.generator = torch.Generator().manual_seed(seed)
        for item in self.records:
            if not any(item.layer is layer for layer in layers.values()):
                raise UserError(
                    f"{owner}: evidence of another model: its layer {item.name!r} is not in this one; record this model"
                )

    def of(self, name: str, layer: MoE) -> list[Record]:
        """Return the records of one layer.

        Raises:
            UserError: there are none.
        """
        records = [item for item in self.records if item.layer is layer]
        if not records:
            raise UserError(
                f"{self.owner}: no evidence for layer {name!r}; run calibration data inside 'with record(model) as "
                "tape' and pass evidence=tape"
            )
        return records

    def counts(self, name: str, layer: MoE) -> Tensor:
        """Return the load of each expert: (E,) int64."""
        return torch.stack([item.routing.load_counts() for item in self.of(name, layer)]).sum(0)

    @torch.no_grad()
    def saliency(self, by: str, name: str, layer: MoE) -> Tensor:
        """Return how much each expert of the layer matters: (E,) float64, on the CPU.

        Args:
            by: a name in ``SALIENCIES``, or "wanda".

        Raises:
            UserError: the saliency is unknown or not finite; there are no records, or they lack the tensors that it
                reads.
        """
        if by not in (*SALIENCIES, "wanda"):
            raise one_of("saliency, by", by, (*SALIENCIES, "wanda"))
        if by == "random":
            return random(layer.router.num_experts, self.generator)
        if by == "frequency":
            values = frequency(self.counts(name, layer))
        else:
            saliencies = {"reap": _reap, "removal": _removal, "wanda": _wanda}
            values = saliencies[by](layer, self.of(name, layer))
        if not values.isfinite().all():
            raise UserError(
                f"{self.owner}: by={by!r} of layer {name!r} is not a finite number; look for nan in weights and data"
            )
        return values.cpu()

    def affinity(self, name: str, layer: MoE) -> Tensor:
        """Return the cosines between the logits of two experts over all tokens: (E, E) float64."""
        routings = [item.routing for item in self.of(name, layer)]
        return affinity(torch.cat([r.logits if r.mask is None else r.logits[r.mask] for r in routings]))


def _reap(layer: MoE, records: list[Record]) -> Tensor:
    norms = []
    for item in records:
        flat = item.routing.weights.new_zeros(item.routing.indices.numel())
        flat[item.order] = item.output.detach().norm(dim=-1).to(flat)
        norms.append(flat)
    parts = [(r.indices.flatten(), r.weights.detach().flatten()) for r in (item.routing for item in records)]
    indices, weights = (torch.cat(values) for values in zip(*parts, strict=True))
    return reap(indices, weights, torch.cat(norms), layer.router.num_experts)


def _wanda(layer: MoE, records: list[Record]) -> Tensor:
    bank, total_experts = layer.experts, layer.router.num_experts
    if not isinstance(bank, FeedForward):
        raise UserError(
            f"by='wanda' reads the two matrices of FeedForward experts, and {type(bank).__name__} has others; take "
            "another saliency"
        )
    found = torch.zeros(total_experts, dtype=torch.float64)
    experts = [e for e in range(total_experts) if layer.places(e)]
    first = [layer.places(e)[0] for e in experts]
    for stack, name in ((bank.up, "input"), (bank.down, "hidden")):
        squares = stack.new_zeros(total_experts, stack.shape[2], dtype=torch.float64)
        for item in records:
            squares.index_add_(0, item.routing.indices.flatten()[item.order], item.tensor(name).double().square())
        found[experts] += wanda(stack[first], squares[experts]).cpu()
    return found


def _removal(layer: MoE, records: list[Record]) -> Tensor:
    total_experts = layer.router.num_experts
    rests = [[e for e in range(total_experts) if e != gone] for gone in range(total_experts)]
    selectors = [layer.router.selector.select(rest).eval() for rest in rests]
    total, tokens = torch.zeros(total_experts, dtype=torch.float64), 0
    for item in records:
        rows, routing = item.input.detach(), item.routing
        seen, its_row = _seen(item.order // max(routing.indices.shape[1], 1))
        logits = routing.logits.detach()[seen]
        gates = dense_gates(routing.indices[seen], routing.weights.detach()[seen], range(total_experts), total_experts)
        without = []
        for selector, rest in zip(selectors, rests, strict=True):
            left = logits[:, rest]
            indices = selector.limit(selector.choose(left), len(rest))
            without.append(dense_gates(indices, selector.weigh(left, indices), rest, total_experts))
        outputs = torch.stack([_output(layer, e, rows[its_row]) for e in range(total_experts)])
        total += removal(outputs.to(gates), gates, torch.stack(without)).cpu() * len(seen)
        tokens += len(seen)
    return total / max(tokens, 1)


def _seen(tokens: Tensor) -> tuple[Tensor, Tensor]:
    """The tokens that have rows, in order, and a row of each: they are all alike."""
    seen, number = tokens.unique(return_inverse=True)
    return seen, torch.empty_like(seen).scatter_(0, number, torch.arange(len(tokens), device=tokens.device))


def dense_gates(indices: Tensor, weights: Tensor, experts: Sequence[int], num_experts: int) -> Tensor:
    """Return combine weights (N, E) given indices and weights (N, K); index i stands for expert ``experts[i]``."""
    names = torch.tensor([*experts, num_experts], device=indices.device)[indices]  # -1: the last
    dense = weights.new_zeros(len(names), num_experts + 1)
    return dense.scatter_add(1, names, weights)[:, :num_experts]


def _output(layer: MoE, e: int, x: Tensor) -> Tensor:
    """Expert ``e`` of the router on rows (N, D)."""
    places = layer.places(e)
    return layer.experts.expert(x, places[0]) if places else x.new_zeros(len(x), layer.router.scorer.dim)
