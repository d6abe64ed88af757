"""Splits the output of an expert into the parts that its hidden units add."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from spectralmoe.attribution.stream import slack
from spectralmoe.diagnostics.watch import OwnLayer, Watched
from spectralmoe.errors import UserError
from spectralmoe.experts import Answer
from spectralmoe.hf.layer import HFLayer

__all__ = ["expert_part", "neuron_parts"]


def expert_part(layer: Watched, x: Tensor, weights: Tensor, e: int) -> Tensor:
    """Return what expert ``e`` adds for tokens x (n, D) with combine weights (n,): (n, D), in fp32 or float64."""
    if isinstance(layer, HFLayer):
        part = layer.part(x, weights, e)
    else:
        part = layer.expert(x, e) * weights[:, None].to(x.dtype)
    return part.to(torch.promote_types(part.dtype, torch.float32))


def neuron_parts(layer: Watched, x: Tensor, weights: Tensor, e: int) -> Tensor:
    r"""Return the vectors :math:`g\, a_q W_2[:, q]` of all hidden units q: (n, H, D), in fp32 or float64.

    They add up to ``expert_part`` without the expert's output bias.

    Raises:
        UserError: the expert's output is no sum over hidden units.
    """
    parts, rest = _hf_parts(layer, x, weights, e) if isinstance(layer, HFLayer) else _own_parts(layer, x, weights, e)
    whole = expert_part(layer, x, weights, e)
    if (parts.sum(1) + rest - whole).abs().max() > 10 * slack(x.dtype) * whole.abs().max() + 1e-9:
        raise UserError(
            f"attribute_experts: the experts of {layer.name} are no sums over hidden units; take level='expert'"
        )
    return parts


def _own_parts(layer: Watched, x: Tensor, weights: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """From what the bank makes of each hidden activation alone."""
    assert isinstance(layer, OwnLayer)
    bank, places = layer.layer.experts, layer.layer.places(e)
    if not places:
        return x.new_zeros(len(x), 0, x.shape[1]), x.new_zeros(())
    counts = torch.zeros(bank.num_experts, dtype=torch.int64, device=x.device)
    counts[places[0]] = len(x)
    hidden = bank.hidden(x, counts)
    if hidden is None:
        raise UserError(f"attribute_experts: {type(bank).__name__} has no hidden units; use level='expert'")
    alone = torch.diag_embed(hidden).flatten(0, 1)
    made = _rows(bank.project(alone, counts * hidden.shape[1])).unflatten(0, hidden.shape)
    fixed = _rows(bank.project(torch.zeros_like(hidden), counts))
    weights = weights.to(x.dtype)
    return (made - fixed[:, None]) * weights[:, None, None], fixed * weights[:, None]


def _rows(answer: Tensor | Answer) -> Tensor:
    return answer.gained if isinstance(answer, Answer) else answer


class _LastProduct(TorchFunctionMode):
    """Remembers what went into the last product with a matrix: the rows (..., H) and the matrix (H, D)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.matrix = torch.empty(0), torch.empty(0)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear:
            self.rows, self.matrix = args[0], args[1].mT
        elif func in (torch.matmul, torch.bmm, torch.Tensor.matmul, torch.Tensor.__matmul__, torch.Tensor.bmm):
            self.rows, self.matrix = args[:2]
        return func(*args, **(kwargs or {}))


def _hf_parts(layer: HFLayer, x: Tensor, weights: Tensor, e: int) -> tuple[Tensor, Tensor]:
    """From the last product with a matrix in the expert's own forward."""
    with _LastProduct() as product:
        whole = expert_part(layer, x, weights, e)
    rows, matrix = product.rows.reshape(len(x), -1), product.matrix.reshape(-1, x.shape[1])
    if rows.shape[1] != len(matrix):
        raise UserError(
            f"attribute_experts: the experts of {layer.name} are no sums over hidden units; take level='expert'"
        )
    parts = rows.to(whole.dtype)[:, :, None] * matrix.to(whole.dtype)
    parts = parts if layer.weighs_inputs else parts * weights.to(whole.dtype)[:, None, None]
    bias = [value[e] for value in layer.experts.parameters() if value.shape == (layer.num_experts, x.shape[1])]
    return parts, sum((b.to(whole) * weights.to(whole)[:, None] for b in bias), torch.zeros_like(whole))
