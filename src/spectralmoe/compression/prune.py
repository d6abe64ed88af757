"""Pruning: it removes some experts of a model, without retraining.

The experts that stay are named, or follow from a saliency (``saliency.py``) of calibration data, as in Lasby et al.,
"REAP the Experts", arXiv 2510.13999.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import torch
from torch import nn

from spectralmoe.compression.edit import edited, layers_of, rebuilt, whole_number
from spectralmoe.compression.evidence import Evidence
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.stacks import chosen_experts
from spectralmoe.tape import Record

__all__ = ["prune"]

Model = TypeVar("Model", bound=nn.Module)
Keep = int | Sequence[int]


def prune(
    model: Model,
    keep: Keep | Mapping[str, Keep],
    *,
    by: str = "frequency",
    evidence: Iterable[Record] = (),
    seed: int = 0,
) -> Model:
    """Return a copy of ``model`` without some of its experts; the model stays as it is.

    The router loses the rows of the removed experts (``Router.select``), so the layer computes what it would if they
    had a logit of minus infinity and could not be chosen. The other experts and their selection biases keep their
    values; they are numbered from 0 in the order of ``keep``.

    Args:
        model: an ``MoE``, or a model that holds some.
        keep: how many experts each layer keeps, those of the largest saliency; or a list of experts; or layer name ->
            one of these, where other layers stay whole.
        by: the saliency by which a number of experts is chosen. "frequency", the default, needs no kept tensors;
            "reap" reads "output"; "removal" reads "input" and runs all experts on it; "wanda" reads "input" and
            "hidden"; "random" is a control. ``spectralmoe.compression.saliency`` has the equations.
        evidence: a tape of calibration data, ``with record(model, keep=("input", "output")) as tape``, with what the
            saliency reads in ``keep``.
        seed: the seed of "random".

    Raises:
        UserError: ``keep`` is empty, too large, or names an expert twice or one that does not exist; the selector
            cannot choose among so few experts; the evidence is missing, of another model, or lacks the tensors that the
            saliency reads.

    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), FeedForward(4, 8, 16))
    >>> with record(layer) as tape:
    ...     y = layer(torch.randn(100, 8))
    >>> small = prune(layer, 3, evidence=tape)
    >>> small.router.num_experts, small.experts.num_experts
    (3, 3)
    """
    layers = layers_of("prune", model)
    known = Evidence("prune", layers, evidence, seed)

    def pruned(name: str, layer: MoE, keep: Keep) -> MoE:
        total = layer.router.num_experts
        if isinstance(keep, int):
            number = whole_number("prune", f"keep of layer {name!r}", keep, 1, total)
            keep = range(total) if number == total else most_salient(known.saliency(by, name, layer), number)
        return _without_others(layer, chosen_experts("prune", keep, total))

    return edited("prune", model, layers, keep, pruned)


def most_salient(saliency: torch.Tensor, number: int) -> list[int]:
    """Return the ``number`` experts of the largest saliency (E,), in ascending order; of equal ones the first.

    >>> most_salient(torch.tensor([0.1, 0.4, 0.4, 0.3]), 2)
    [1, 2]
    """
    order: list[int] = saliency.argsort(descending=True, stable=True).tolist()
    return sorted(order[:number])


def _without_others(layer: MoE, kept: list[int]) -> MoE:
    if kept == list(range(layer.router.num_experts)):
        return copy.deepcopy(layer)
    router = layer.router.select(kept)
    rows = [layer.places(e) for e in kept]
    places = list(dict.fromkeys(place for row in rows for place in row))
    if not places:
        raise UserError(f"prune: the experts {kept} are all zero experts; keep one that computes something")
    table = [[places.index(place) for place in row] for row in rows]
    return rebuilt(layer, layer.experts.select(places), table, router)
