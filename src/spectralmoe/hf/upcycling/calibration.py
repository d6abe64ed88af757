"""Sums over the inputs of a dense model's MLPs on calibration text, layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.hf.language import batch_arguments
from spectralmoe.hf.upcycling.dense import Dense

__all__ = ["Batch", "Calibration", "Reads", "read_calibration"]

Batch = Mapping[str, Any] | Tensor
Calibration = Sequence[Batch | Sequence[Batch]]
"""Sets of text: each a batch, which is a table of the model's arguments or ids (B, S), or several."""


@dataclass(slots=True)
class Reads:
    """Sums over the inputs of one layer's MLP, for T sets of text.

    Attributes:
        counts: tokens of each set (T,).
        sums: of the tokens of each set (T, D).
        products: sum of x x^T over all tokens (D, D); None where it was not asked for.
    """

    counts: Tensor
    sums: Tensor
    products: Tensor | None


@torch.no_grad()
def read_calibration(
    dense: Dense, calibration: Calibration, layers: Sequence[int], *, products: bool
) -> dict[int, Reads]:
    """Run the model on every set; padding, by ``attention_mask``, is left out.

    Args:
        calibration: sets of text.

    Raises:
        UserError: there is none, one without a token, or something that is no batch.
    """
    sets = [[batches] if isinstance(batches, Mapping | Tensor) else list(batches) for batches in calibration]
    reads = {layer: _nothing(len(sets), dense.width, products) for layer in layers}
    with evaluation_mode(dense.model):
        for number, batches in enumerate(sets):
            for batch in batches:
                arguments = batch_arguments("upcycle", dense.model, batch)
                with _tapped(dense, layers) as seen:
                    dense.model.model(**arguments, use_cache=False)
                for layer, x in seen.items():
                    _add(reads[layer], number, _real(x, arguments.get("attention_mask")))
    if not sets or not all(layer.counts.all() for layer in reads.values()):
        raise UserError(
            "upcycle: calibration must hold sets of text with tokens; one of them has none, or there is none"
        )
    return reads


@contextmanager
def _tapped(dense: Dense, layers: Sequence[int]) -> Iterator[dict[int, Tensor]]:
    """What the MLPs read while the block runs, by layer."""
    seen: dict[int, Tensor] = {}

    def tap(layer: int) -> Any:
        return lambda module, args: seen.__setitem__(layer, args[0].detach())

    with ExitStack() as stack:
        for layer in layers:
            handle = dense.model.model.layers[layer].mlp.register_forward_pre_hook(tap(layer))
            stack.callback(handle.remove)
        yield seen


def _real(x: Tensor, mask: Tensor | None) -> Tensor:
    x = x.flatten(0, 1)
    return (x if mask is None else x[mask.flatten().bool().to(x.device)]).double().cpu()


def _nothing(sets: int, width: int, products: bool) -> Reads:
    square = torch.zeros(width, width, dtype=torch.float64) if products else None
    return Reads(torch.zeros(sets, dtype=torch.int64), torch.zeros(sets, width, dtype=torch.float64), square)


def _add(reads: Reads, number: int, x: Tensor) -> None:
    reads.counts[number] += len(x)
    reads.sums[number] += x.sum(0)
    if reads.products is not None:
        reads.products += x.T @ x
