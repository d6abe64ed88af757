"""Replication: a busy expert gets copies, and its tokens go to them in turn.

The first half of "Replicate-and-Quantize" (R&Q), arXiv 2602.19938, which replicates the busiest expert of a layer.
Differs: several copies may be added, each of the expert with the largest load per copy, as in DeepSeek's EPLB
(github.com/deepseek-ai/EPLB, MIT).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

from torch import Tensor, nn

from spectralmoe.compression.edit import edited, layers_of, rebuilt, whole_number
from spectralmoe.compression.evidence import Evidence
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.tape import Record

__all__ = ["replicas_by_load", "replicate"]

Model = TypeVar("Model", bound=nn.Module)
Copies = int | Sequence[int]

_MOST = 2**16  # places added to a layer


def replicate(model: Model, copies: Copies | Mapping[str, Copies], *, evidence: Iterable[Record] = ()) -> Model:
    """Return a copy of ``model`` whose busy experts have replicas; the model stays as it is.

    The new layer computes what the old one did. Router and choices stay; in each forward an expert's tokens go to its
    replicas in turn (``Placement``), so that their loads differ by one at most. It is for inference: training would let
    the replicas drift apart.

    Args:
        model: an ``MoE``, or a model that holds some.
        copies: how many copies are added to each layer, of its busiest experts (``replicas_by_load``); or for each
            expert how many places it shall have in all; or layer name -> one of these.
        evidence: a tape of calibration data, ``with record(model) as tape``; only a number of copies needs it.

    Raises:
        UserError: there is not one number for each expert, a number is below the places that the expert has, or a zero
            expert shall have places; the scorer reads the experts; the evidence is missing or of another model.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 3), TopK(1)), FeedForward(3, 8, 16))
    >>> replicate(layer, [1, 3, 1]).placement.table.tolist()
    [[0, -1, -1], [1, 3, 4], [2, -1, -1]]
    """
    layers = layers_of("replicate", model)
    known = Evidence("replicate", layers, evidence, 0)

    def replicated(name: str, layer: MoE, copies: Copies) -> MoE:
        rows = [layer.places(e) for e in range(layer.router.num_experts)]
        if isinstance(copies, int):
            more = whole_number("replicate", f"the places added to layer {name!r}", copies, 0, _MOST)
            copies = replicas_by_load(known.counts(name, layer), [len(row) for row in rows], more) if more else ()
        elif len(copies) != len(rows):
            raise UserError(
                f"replicate: layer {name!r} has E={len(rows)} experts, but {len(copies)} numbers were given"
            )
        order, table = list(range(layer.experts.num_experts)), [list(row) for row in rows]
        for e, number in enumerate(copies):
            least = len(rows[e])
            whole_number("replicate", f"the places of expert {e}", number, least, _MOST if least else 0)
            for _ in range(number - least):
                table[e].append(len(order))
                order.append(rows[e][0])
        return rebuilt(layer, layer.experts.select(order), table)

    return edited("replicate", model, layers, copies, replicated)


def replicas_by_load(counts: Tensor, places: Sequence[int], more: int) -> list[int]:
    """Add ``more`` places one by one, each to the expert with the largest load per place; return the places of each.

    Args:
        counts: the load of each expert (E,).
        places: how many places each expert has so far; an expert without any gets none.

    >>> import torch
    >>> replicas_by_load(torch.tensor([90, 50, 10]), [1, 1, 1], 3)
    [3, 2, 1]
    """
    numbers, loads = list(places), counts.tolist()
    for _ in range(more):
        busiest = max(range(len(numbers)), key=lambda e: loads[e] / numbers[e] if numbers[e] else -1.0)
        numbers[busiest] += 1
    return numbers
