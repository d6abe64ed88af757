"""Calibration: loads and tokens of a Hugging Face model's experts from a run over text, for saliencies."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn

from spectralmoe.compression.evidence import dense_gates
from spectralmoe.compression.saliency import SALIENCIES, affinity, frequency, random, reap, removal
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.language import TransformersModel, batch_arguments, run
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.routers.rules import put_bias, read_rule
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments.samples import TokenSample
from spectralmoe.spec import build

__all__ = ["Batches", "Calibration"]

Batches = Iterable[Mapping[str, Any] | Tensor]
"""Tables of the model's arguments, as ``encode`` makes them of text, or token ids (B, S)."""

_NUMBERS = 2**24  # in the outputs of all experts of a layer for the same tokens
_BELOW = 4.0  # scores lie between 0 and 1


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
                run(loaded, [batch_arguments(owner, model, batch)])
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
        if by not in SALIENCIES:
            raise one_of("saliency, by", by, SALIENCIES)
        layer = self.layers[name]
        if by == "random":
            return random(layer.num_experts, self.generator)
        if by == "frequency":
            return frequency(self.load(by, name))
        values = (_reap if by == "reap" else _removal)(layer, self._sample(by, name))
        if not values.isfinite().all():
            raise UserError(f"{self.owner}: by={by!r} of layer {name!r} is not a finite number; calibrate in float32")
        return values.cpu()

    @torch.no_grad()
    def affinity(self, name: str) -> Tensor:
        """How alike the router of layer ``name`` treats two experts: (E, E) float64.

        Raises:
            UserError: as ``saliency``.
        """
        return affinity(self.layers[name].route(self._sample("merging", name)).logits)

    def load(self, what: str, name: str) -> Tensor:
        """The slots that each expert of layer ``name`` got (E,) int64.

        Raises:
            UserError: nothing was run, so ``what`` has nothing to go by.
        """
        counts = self.counts.get(name)
        if counts is None or not counts.sum():
            raise UserError(
                f"{self.owner}: {what} needs text, and layer {name!r} saw no token; give calibration=batches of the "
                "model's arguments, such as encode(load_transformers(folder), text, 4096)"
            )
        return counts

    def _sample(self, what: str, name: str) -> Tensor:
        self.load(what, name)
        if not self.layers[name].reroutes:
            raise UserError(
                f"{self.owner}: {what} routes tokens again, but in layer {name!r} tokens compete, or its router "
                "reads more than the token; use by='frequency'"
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


def _removal(layer: HFLayer, x: Tensor) -> Tensor:
    """By the layer's own rule, where the expert that is gone has a logit of minus infinity, and no bias lifts it."""
    rule, spec = read_rule(layer)
    if spec is None:
        raise UserError(
            f"by='removal' needs to know how {layer.name} chooses, and its rule is not known; use by='reap'"
        )
    every, bias = range(layer.num_experts), layer.correction_bias
    selector = build(spec).to(x.device)
    selector.bind(layer.num_experts)

    def gates_without(logits: Tensor, gone: int) -> Tensor:
        here = torch.tensor(gone, device=logits.device)
        put_bias(selector, None if bias is None else bias.index_fill(0, here, float(bias.min()) - _BELOW))
        left = logits.index_fill(1, here, -torch.inf)
        indices = selector.limit(selector.choose(left), layer.num_experts)
        return dense_gates(indices, selector.weigh(left, indices) * rule.scale, every, layer.num_experts)

    total = torch.zeros(layer.num_experts, dtype=torch.float64)
    for part in x.split(max(_NUMBERS // (layer.num_experts * x.shape[1]), 1)):
        routing = layer.route(part)
        gates = dense_gates(routing.indices, routing.weights, every, layer.num_experts)
        without = torch.stack([gates_without(routing.logits, e) for e in every])
        alone = selector.scores(routing.logits) * rule.scale  # what an expert would weigh, whoever is beside it
        outputs = [layer.part(part, alone[:, e], e) if layer.weighs_inputs else layer.expert(part, e) for e in every]
        if layer.weighs_inputs:
            gates, without = (gates > 0).to(gates), (without > 0).to(gates)
        total += removal(torch.stack(outputs).to(gates), gates, without).cpu() * len(part)
    return total / max(len(x), 1)
