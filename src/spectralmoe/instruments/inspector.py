"""An inspection: every value of every MoE layer from one run over data, as JSON."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from spectralmoe.diagnostics import paths, similarity
from spectralmoe.diagnostics.association import label_table
from spectralmoe.diagnostics.entropy import are_probabilities
from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.stability import sound_flips
from spectralmoe.diagnostics.statistics import LayerStatistics
from spectralmoe.diagnostics.table import FEWEST, NEEDS
from spectralmoe.diagnostics.watch import Seen, Watched
from spectralmoe.errors import UserError
from spectralmoe.instruments.document import layer_names, value_blocks
from spectralmoe.instruments.samples import BestTokens, Place, TokenSample
from spectralmoe.routing import Routing

__all__ = ["Describe", "Inspector"]

_NUMBERS = 2**24  # in the outputs of all experts of a layer for the same tokens
_COORDINATES = 2**20  # of an expert's weights
_OUTPUTS = 256  # tokens that go through every expert
_EXAMPLES, _FLOWS = 8, 3

Describe = Callable[[Watched, Place], dict[str, Any]]
"""Gives the picture or the text of a token: {"text": ...} or {"image": a data URI, ...}."""


class Inspector:
    """Gathers the calls of a run batch by batch, and makes the "layers" and "paths" of an inspection document of them.

    Args:
        layers: of a ``Watch``.
        labels: the names of the classes or topics, where the data has any.
        sample: how many tokens of each layer are kept; all of them show what noise and precision change, the first
            256 how alike the experts' outputs are.
        seed: of the sample and of the noise.

    Raises:
        UserError: a layer's weights are not in memory.

    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
    >>> from spectralmoe.diagnostics.watch import watch
    >>> model = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> with watch(model) as seen:
    ...     inspector = Inspector(seen.layers)
    ...     y = model(torch.randn(500, 8))
    ...     inspector.add(seen.drain())
    >>> inspector.layers()[0]["load"]["max_vio"]["data"]
    1000
    """

    def __init__(
        self, layers: Sequence[Watched], *, labels: Sequence[str] = (), sample: int = 2048, seed: int = 0
    ) -> None:
        for layer in layers:
            if (matrix := layer.matrix) is not None and matrix.is_meta:
                raise UserError(
                    f"layer {layer.name!r} is not in memory (accelerate moves weights to disk); load the whole model"
                )
        self._labels, self._seed = tuple(labels), seed
        self._gathered = [_Gathered(layer, sample, seed + place) for place, layer in enumerate(layers)]
        self._joints: dict[tuple[int, int], Tensor] = {}

    @torch.no_grad()
    def add(self, calls: Sequence[Seen], labels: Tensor | None = None) -> None:
        """Take the calls of one batch, all of the same sequences.

        Args:
            labels: (B,) the class of each sequence, or (N,) of each token.
        """
        places = {id(item.layer): place for place, item in enumerate(self._gathered)}
        first: dict[int, Routing] = {}
        for call in calls:
            place = places[id(call.layer)]
            self._gathered[place].add(call, labels, len(self._labels))
            first.setdefault(place, call.routing)
        for item in self._gathered:
            item.best.next_batch()
        order = sorted(first)
        for a, b in pairwise(order):
            if len(first[a].logits) == len(first[b].logits) and self._stack(a) == self._stack(b):
                rows, columns = (self._gathered[place].layer.num_experts for place in (a, b))
                joint = paths.joint_counts(first[a], first[b])[:rows, :columns].cpu()
                self._joints[a, b] = self._joints[a, b] + joint if (a, b) in self._joints else joint

    @property
    def tokens(self) -> int:
        """Real tokens seen by the layer that saw most."""
        return max((item.statistics.number("tokens") for item in self._gathered), default=0)

    def layers(self, describe: Describe | None = None) -> list[dict[str, Any]]:
        """The values of every layer, with example tokens where ``describe`` tells what a token is."""
        sound = cache(sound_flips)
        return [item.report(self._labels, describe, self._seed, sound) for item in self._gathered]

    def paths(self) -> list[dict[str, Any]]:
        """Between each two consecutive layers: the largest flows of tokens, and their mutual information."""
        return [
            {
                "from": a,
                "to": b,
                "flows": _largest(joint, _FLOWS * max(joint.shape)),
                "out": joint.sum(1).tolist(),
                "into": joint.sum(0).tolist(),
                "mutual_information": paths.mutual_information(joint).as_json(),
            }
            for (a, b), joint in self._joints.items()
        ]

    def _stack(self, place: int) -> str:
        return self._gathered[place].layer.stack


class _Gathered:
    """The sums and samples of one layer, and the values made from them."""

    def __init__(self, layer: Watched, sample: int, seed: int) -> None:
        self.layer = layer
        self.statistics = LayerStatistics(layer.num_experts, layer.top_k)
        self.sample, self.best = TokenSample(sample, seed), BestTokens(layer.num_experts, 4 * _EXAMPLES)
        self.table: Tensor | None = None

    def add(self, call: Seen, labels: Tensor | None, num_labels: int) -> None:
        routing = call.routing
        self.statistics.add(routing)
        if len(call.tokens):
            self.sample.add(call.tokens[(routing.indices >= 0).any(-1)])
        self.best.add(routing)
        if labels is not None and num_labels:
            table = label_table(routing, labels, num_labels)[:, : self.layer.num_experts].cpu()
            self.table = table if self.table is None else self.table + table

    @torch.no_grad()
    def report(
        self, labels: Sequence[str], describe: Describe | None, seed: int, sound: Callable[..., Measure]
    ) -> dict[str, Any]:
        """The layer's part of the document."""
        layer, statistics, matrix = self.layer, self.statistics, self.layer.matrix
        tokens = self.sample.tokens if layer.reroutes else self.sample.tokens[:0]
        vectors, finite, empty = self.weights()
        evidence = Evidence(
            counts=statistics,
            statistics=statistics,
            matrix=torch.empty(0, 0) if matrix is None else matrix,
            weight_cosines=similarity.weight_cosine(vectors),
            weights=(vectors.shape[1], "coordinates"),
            layer=layer,
            tokens=tokens,
            outputs=self.outputs(),
            labels=torch.empty(0, 0) if self.table is None else self.table,
            seed=seed,
            sound=sound,
        )
        given = set(NEEDS) if self.table is not None else set(NEEDS) - {"labels"}
        return {
            **layer_names(layer),
            "width": tokens.shape[-1] if matrix is None else matrix.shape[1],
            "finite": finite and (matrix is None or bool(matrix.isfinite().all())),
            "finite_scores": statistics.finite(),
            "empty_experts": empty,
            "logits_are_probabilities": len(tokens) > 0 and are_probabilities(layer.raw_logits(tokens)),
            **value_blocks(evidence, given, labels),
            "weights": statistics.weights(),
            "examples": [self.examples(e, describe) for e in range(layer.num_experts)] if describe else [],
        }

    def outputs(self) -> Tensor:
        """As many of the kept tokens through every expert as their outputs have room for (E, n, D)."""
        e, tokens = self.layer.num_experts, self.sample.tokens[:_OUTPUTS]
        tokens = tokens[: max(FEWEST, _NUMBERS // max(1, e * tokens.shape[-1]))]
        return similarity.expert_outputs(self.layer, tokens) if len(tokens) else torch.empty(e, 0, 1)

    def weights(self) -> tuple[Tensor, bool, list[int]]:
        """Every few coordinates of each expert's weights (E, P), P = 0 where the experts differ in size; whether all
        of them are finite; the experts whose weights are all zero."""
        vectors, finite, empty = [], True, []
        for e in range(self.layer.num_experts):
            vector = self.layer.expert_weights(e)
            finite = finite and bool(vector.isfinite().all())
            if len(vector) and not vector.any():
                empty.append(e)
            vectors.append(vector[:: 1 + len(vector) // _COORDINATES].float())
        same = len({len(vector) for vector in vectors}) == 1
        return torch.stack(vectors) if same else torch.empty(len(vectors), 0), finite, empty

    def examples(self, e: int, describe: Describe) -> list[dict[str, Any]]:
        """The tokens with the largest weight, no two alike."""
        different: dict[str, dict[str, Any]] = {}
        for weight, place in self.best.found[e]:
            shown = describe(self.layer, place)
            different.setdefault(str(shown), {**shown, "weight": round(weight, 4)})
        return list(different.values())[:_EXAMPLES]


def _largest(joint: Tensor, number: int) -> list[list[int]]:
    """The largest entries of a table of counts, as [row, column, count]."""
    top = joint.flatten().topk(min(joint.numel(), number))
    width = joint.shape[1]
    pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
    return [[place // width, place % width, count] for place, count in pairs if count]
