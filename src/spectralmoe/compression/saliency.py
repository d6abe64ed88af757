"""Saliency: how much each expert of a layer matters, from what was recorded of it. Tensors in, (E,) float64 out.

- ``frequency``: its share of the load.
- ``reap``: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999,
  section on router-weighted expert activation pruning.
- ``removal``: how much the layer's output changes without the expert. After Lu et al., "Not All Experts are Equal",
  arXiv 2402.14800, section on expert pruning, who compare sets of experts by it. Differs: one expert at a time, so E
  sets and not all; the mean over tokens.
- ``random``: the control.
- ``wanda``: the size of its weights, each times the norm of what it meets. After Sun et al., "A Simple and Effective
  Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695, section on the pruning metric. Differs: the sum
  over a matrix, where the paper compares single weights. It needs the hidden activations, so only banks of this library
  that show them have it (``compression.prune``, ``replicate_and_quantize``).

``affinity`` says how alike the router treats two experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SALIENCIES", "affinity", "frequency", "random", "reap", "removal", "wanda"]

SALIENCIES = ("frequency", "reap", "removal", "random")
"""Names of the saliencies that any model has, for ``by=``."""


def frequency(counts: Tensor) -> Tensor:
    r"""The share :math:`c_i / \sum_j c_j` of the slots counted for each expert (E,).

    >>> frequency(torch.tensor([3, 1])).tolist()
    [0.75, 0.25]
    """
    return counts.double() / counts.sum().clamp_min(1)


def reap(indices: Tensor, weights: Tensor, norms: Tensor, num_experts: int) -> Tensor:
    r"""Mean over the tokens :math:`X_i` of an expert of its weight times the size of its output.

    .. math:: S_i = \frac{1}{|X_i|} \sum_{x \in X_i} w_i(x) \, \|E_i(x)\|_2

    0 for an expert without tokens.

    Args:
        indices, weights, norms: the expert of each slot (-1: none), its combine weight, and the norm of its output
            before that weight, all of one shape.
        num_experts: E.

    >>> reap(torch.tensor([0, 1, 0]), torch.tensor([0.5, 1.0, 1.0]), torch.tensor([2.0, 4.0, 3.0]), 3).tolist()
    [2.0, 4.0, 0.0]
    """
    slots = torch.where(indices < 0, num_experts, indices).flatten()
    sums = weights.new_zeros(num_experts + 1, dtype=torch.float64)
    counts = torch.zeros_like(sums)
    sums.index_add_(0, slots, (weights.double() * norms.double()).flatten())
    counts.index_add_(0, slots, torch.ones_like(slots, dtype=torch.float64))
    return (sums / counts.clamp_min(1))[:num_experts]


def removal(outputs: Tensor, gates: Tensor, gates_without: Tensor) -> Tensor:
    r"""Mean squared change of the layer's output when the expert is gone and its tokens go elsewhere.

    .. math:: S_i = \frac1N \sum_t \Big\| \sum_j (g_{tj} - g^{(i)}_{tj}) E_j(x_t) \Big\|_2^2

    Args:
        outputs: of every expert for every token (E, N, D).
        gates: combine weights of the whole layer (N, E), 0 where an expert was not chosen.
        gates_without: those of the layer without expert i, at i: (E, N, E).

    >>> outputs = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    >>> removal(outputs, torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])).tolist()
    [5.0, 0.0]
    """
    changes = [(gates - without).T[..., None] * outputs for without in gates_without]
    squares = [change.sum(0).double().square().sum() for change in changes]
    return torch.stack(squares) / max(outputs.shape[1], 1)


def wanda(weights: Tensor, squares: Tensor) -> Tensor:
    r"""Sum over a matrix of the size of each weight times the norm of the feature that it meets.

    .. math:: S_i = \sum_{hd} |W_{ihd}| \, \|X_{i, \cdot d}\|_2, \qquad X_i \text{ the rows of expert } i

    0 for an expert without tokens.

    Args:
        weights: one matrix an expert (E, H, D).
        squares: sums over an expert's rows of the squared features (E, D).

    >>> wanda(torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]]]), torch.tensor([[4.0, 1.0], [0.0, 0.0]])).tolist()
    [4.0, 0.0]
    """
    return torch.einsum("ehd,ed->e", weights.double().abs(), squares.double().sqrt())


def random(num_experts: int, generator: torch.Generator) -> Tensor:
    """A number between 0 and 1 for each expert."""
    return torch.rand(num_experts, generator=generator, dtype=torch.float64)


def affinity(logits: Tensor) -> Tensor:
    """Cosine of the logits (N, E) that two experts get over all tokens: (E, E) float64, on the CPU."""
    columns = torch.nn.functional.normalize(logits.detach().double(), dim=0)
    return (columns.T @ columns).cpu()
