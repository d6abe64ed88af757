"""Calibration: what a run over text says of the experts of a Hugging Face model, for saliencies of ``compression``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectralmoe.compression.saliency import affinity, frequency, random, reap
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.language import TransformersModel, run
from spectralmoe.hf.layers import HFLayer
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments.samples import TokenSample

__all__ = ["Batches", "Calibration"]

_KNOWN = ("frequency", "reap", "random")

Batches = Iterable[Mapping[str, Any]]
"""Arguments of the model's forward, a dict a batch, as ``encode`` makes them of text."""


class Calibration:
    """The load of every expert in a run, and a sample of each layer's tokens.

    Args:
        owner: who asks, for errors.
        model: is run in evaluation mode; its mode is put back.
        batches: of the run; None: nothing is run.
        tokens: how many of each layer's tokens are kept, drawn evenly; 0: none.
        seed: of the sample and of the saliency "random".

    Attributes:
        layers: the model's MoE layers by name, as the run saw them.
        counts: layer's name -> the load of each expert (E,) int64.
    """

    def __init__(self, owner: str, model: nn.Module, batches: Batches | None, tokens: int, seed: int) -> None:
        self.owner = owner
        self.generator = torch.Generator().manual_seed(seed)
        self.counts: dict[str, Tensor] = {}
        loaded = TransformersModel(model, name=type(model).__name__)
        with watch_transformers(model, tokens=tokens > 0) as seen, evaluation_mode(model):
            self.layers = {layer.name: cast(HFLayer, layer) for layer in seen.layers}
            self._samples = {name: TokenSample(tokens, seed + place) for place, name in enumerate(self.layers)}
            for batch in batches or ():
                run(loaded, [dict(batch)])
                for call in seen.drain():
                    name, routing = call.layer.name, call.routing
                    self.counts[name] = self.counts.get(name, 0) + routing.load_counts().cpu()
                    if tokens:
                        self._samples[name].add(call.tokens[(routing.indices >= 0).any(-1)])

    @torch.no_grad()
    def saliency(self, by: str, name: str) -> Tensor:
        """How much each expert of layer ``name`` matters: (E,) float64, on the CPU.

        Raises:
            UserError: an unknown saliency; nothing was run; a router that reads more than its tokens; numbers that are
                not finite.
        """
        if by not in _KNOWN:
            raise one_of("saliency, by", by, _KNOWN)
        layer = self.layers[name]
        if by == "random":
            return random(layer.num_experts, self.generator)
        if by == "frequency":
            return frequency(self._of(by, name))
        values = _reap(layer, self._sample(by, name))
        if not values.isfinite().all():
            raise UserError(f"{self.owner}: by={by!r} of layer {name!r} is not a finite number")
        return values.cpu()

    @torch.no_grad()
    def affinity(self, name: str) -> Tensor:
        """How alike the router of layer ``name`` treats two experts: (E, E) float64.

        Raises:
            UserError: as ``saliency``.
        """
        return affinity(self.layers[name].route(self._sample("merging", name)).logits)

    def _of(self, what: str, name: str) -> Tensor:
        counts = self.counts.get(name)
        if counts is None or not counts.sum():
            raise UserError(
                f"{self.owner}: {what} needs text, and layer {name!r} saw no token; give calibration=batches of the "
                "model's arguments, such as encode(load_transformers(folder), text, 4096)"
            )
        return counts

    def _sample(self, what: str, name: str) -> Tensor:
        self._of(what, name)
        if not self.layers[name].reroutes:
            raise UserError(
                f"{self.owner}: {what} routes tokens again, but the router of layer {name!r} reads more than the "
                "token; use by='frequency'"
            )
        return self._samples[name].tokens


def _reap(layer: HFLayer, x: Tensor) -> Tensor:
    routing = layer.route(x)
    parts = torch.zeros_like(routing.weights)
    for e in range(layer.num_experts):
        rows, slots = (routing.indices == e).nonzero(as_tuple=True)
        if len(rows):
            parts[rows, slots] = layer.part(x[rows], routing.weights[rows, slots], e).float().norm(dim=-1).to(parts)
    return reap(routing.indices, torch.ones_like(parts), parts, layer.num_experts)
