"""The rows: what is copied and what is quantised, and what the network then does."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import MoE
from spectralmoe.compression import Report, replicate_and_quantize
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.layers import moe_layers
from spectralmoe.routing import Routing
from spectralmoe.tape import Tape

__all__ = ["BATCHES", "BITS", "ROWS", "imbalance_of", "made", "measured"]

BITS, BATCHES = (8, 4, 3, 2), (1, 2, 4, 8, 16, 32)
"""Of an integer, and images of a batch."""

QUANTISED, EXPERTS = 3, 8

ROWS: Mapping[str, Mapping[str, Any] | None] = {
    "raw": None,
    "quantise only": {"copies": 0},
    "replicate, quantise all": {"quantize": EXPERTS - 1},
    "replicate, quantise random": {"importance": "random"},
    "R&Q": {"importance": "removal", "scored": True},
    "R&Q, output change": {"importance": "removal"},
    "R&Q, wanda": {"importance": "wanda"},
    "R&Q, least used": {"importance": "frequency"},
    "R&Q, original full": {"importance": "removal", "scored": True, "keep_original": True},
    "random, original full": {"importance": "random", "keep_original": True},
}
"""Row -> arguments of ``replicate_and_quantize``; scored: removal by the loss of accuracy."""


def made(
    network: nn.Module, options: Mapping[str, Any] | None, bits: int, labelled: tuple[Tensor, Tensor], seed: int
) -> Report[nn.Module] | None:
    """What the row makes of ``network``, from labelled calibration images; None: nothing is done."""
    if options is None:
        return None
    images, labels = labelled

    def accuracy(model: nn.Module) -> float:
        return float((run_over(model, images).argmax(-1) == labels).double().mean())

    arguments = {"quantize": QUANTISED, "seed": seed, **options}
    score = accuracy if arguments.pop("scored", False) else None
    return replicate_and_quantize(network, [images], bits=bits, score=score, **arguments)


@torch.no_grad()
def measured(network: nn.Module, images: Tensor, labels: Tensor, before: Tensor) -> dict[str, float]:
    """Accuracy in percent, cross-entropy, images with another class than ``before``, imbalance of the whole and inside
    batches, and the bytes of a network as it is.
    """
    with Tape(moe_layers(network)) as tape:
        logits = network(images).double()
    classes = logits.argmax(-1)
    values = {
        "accuracy": 100 * float((classes == labels).double().mean()),
        "nll": float(F.cross_entropy(logits, labels)),
        "changed": float((classes != before).double().mean()),
        "bytes": 1.0,
    }
    sizes = {"imbalance": len(images)}
    for key, size in (sizes | {f"imbalance_{size}": size for size in BATCHES}).items():
        found = [imbalance_of(item.routing, item.layer, len(images) // size) for item in tape]
        values[key] = sum(found) / len(found)
    return values


def imbalance_of(routing: Routing, layer: Any, batches: int) -> float:
    """``load_imbalance(..., physical=True)`` of each of ``batches`` parts of the tokens, as if each were a forward of
    its own; their mean.
    """
    assert isinstance(layer, MoE)
    slots = routing.indices[: len(routing.indices) // batches * batches].view(batches, -1)
    counts = F.one_hot(slots, routing.num_experts).sum(1)
    places = torch.tensor([len(layer.places(e)) for e in range(routing.num_experts)])
    busiest = (-(-counts // places)).amax(1)
    return float((busiest / slots.shape[1]).double().mean() * places.sum())
