"""The stock gate of a Hugging Face router, and scorers that start from it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.structure import matrix_name
from spectralmoe.scorers import CosineScorer, LinearScorer, Scorer
from spectralmoe.sharding import full

__all__ = ["Gate", "gate_of", "start_from_gate"]


@dataclass(frozen=True, slots=True)
class Gate:
    """The affine map that a stock router makes its logits with.

    Attributes:
        weight: (E, D).
        bias: (E,); None without.
    """

    weight: Tensor
    bias: Tensor | None = None


def gate_of(layer: HFLayer, router: nn.Module | None = None) -> Gate:
    """The gate of a stock router, in fp32 (float64 stays).

    Args:
        router: a copy of the layer's router, whose gate is meant; None: the router itself.

    Raises:
        UserError: the router has several layers.
    """
    router = layer.router if router is None else router
    name = matrix_name(router, layer.num_experts)
    if name is None:
        raise UserError(f"{layer.name}: its router has several layers, and no single gate")
    tensors = dict(router.named_parameters())
    weight, bias = tensors[name], tensors.get(f"{name.removesuffix('weight')}bias")
    wide = torch.promote_types(weight.dtype, torch.float32)
    return Gate(full(weight).detach().to(wide), None if bias is None else full(bias).detach().to(wide))


@torch.no_grad()
def start_from_gate(scorer: Scorer, gate: Gate, *, tokens: Tensor | None = None, tempered: bool = False) -> bool:
    """Give a scorer the logits of a gate; False, and nothing done, where it has no such form.

    A linear scorer gets the matrix and the bias. A cosine scorer without projection gets the rows as keys, and the
    temperature 1 / median(|x| |w|).

    Args:
        tokens: for |x|, (N, D); None: sqrt(D), as behind a norm.
        tempered: the temperature stays as it is.
    """
    weight, bias = gate.weight, gate.bias
    if type(scorer) is LinearScorer and (bias is None or scorer.bias is not None):
        scorer.weight.copy_(weight)
        if scorer.bias is not None:
            scorer.bias.copy_(torch.zeros_like(scorer.bias) if bias is None else bias)
        return True
    if type(scorer) is CosineScorer and scorer.projection is None and bias is None:
        scorer.keys.copy_(F.normalize(weight, dim=1))
        size = scorer.dim**0.5 if tokens is None else float(tokens.to(weight).norm(dim=1).median())
        slope = size * float(weight.norm(dim=1).median())
        if not tempered and slope > 0:
            scorer.temperature = 1 / slope
        return True
    return False
