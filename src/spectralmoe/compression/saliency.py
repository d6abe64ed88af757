"""Saliencies say how much each expert of a layer matters; they take recorded tensors and return (E,) float64.

- ``frequency``: the expert's share of the load.
- ``reap``: Lasby et al., "REAP the Experts: Why Pruning Prevails for One-Shot MoE Compression", arXiv 2510.13999,
  section on router-weighted expert activation pruning.
- ``removal``: how much the layer's output changes without the expert. After Lu et al., "Not All Experts are Equal",
  arXiv 2402.14800, section on expert pruning, who compare all sets of experts by it. Differs: one expert at a time; the
  mean over tokens.
- ``random``: a control.
- ``wanda``: the sum of the absolute weights, each times the norm of its input feature. After Sun et al., "A Simple and
  Effective Pruning Approach for Large Language Models" (Wanda), arXiv 2306.11695, section on the pruning metric.
  Differs: the sum over a matrix, where the paper compares single weights. It reads hidden activations, so it works for
  ``FeedForward`` experts alone.

``affinity`` says how alike the router treats two experts.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["SALIENCIES", "affinity", "frequency", "random", "reap", "removal", "wanda"]

SALIENCIES = ("frequency", "reap", "removal", "random")
"""The saliencies that exist for experts of any kind, for the argument ``by``."""


def frequency(counts: Tensor) -> Tensor:
    r"""Compute each expert's share of the slots, :math:`c_i / \sum_j c_j`, by the counts c (E,).

    >>> frequency(torch.tensor([3, 1])).tolist()
    [0.75, 0.25]
    """
    return counts.double() / counts.sum().clamp_min(1)


def reap(indices: Tensor, weights: Tensor, norms: Tensor, num_experts: int) -> Tensor:
    r"""Compute the mean over an expert's tokens :math:`X_i` of its combine weight times the norm of its output.

    .. math:: S_i = \frac{1}{|X_i|} \sum_{x \in X_i} w_i(x) \, \|E_i(x)\|_2

    It is 0 for an expert without tokens.

    Args:
        indices, weights, norms: for each slot its expert (-1 if it is empty), its combine weight, and the norm of the
            expert's output before that weight; all have the same shape.
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
    r"""Compute the mean squared change of the layer's output if an expert is removed and its tokens go to others.

    .. math:: S_i = \frac1N \sum_t \Big\| \sum_j (g_{tj} - g^{(i)}_{tj}) E_j(x_t) \Big\|_2^2

    Args:
        outputs: the output of every expert for every token (E, N, D).
        gates: g, the combine weights of the whole layer (N, E), 0 where an expert was not chosen.
        gates_without: at i the combine weights of the layer without expert i: (E, N, E).

    >>> outputs = torch.tensor([[[1.0, 0.0]], [[0.0, 2.0]]])
    >>> removal(outputs, torch.tensor([[1.0, 0.0]]), torch.tensor([[[0.0, 1.0]], [[1.0, 0.0]]])).tolist()
    [5.0, 0.0]
    """
    changes = [(gates - without).T[..., None] * outputs for without in gates_without]
    squares = [change.sum(0).double().square().sum() for change in changes]
    return torch.stack(squares) / max(outputs.shape[1], 1)


def wanda(weights: Tensor, squares: Tensor) -> Tensor:
    r"""Sum the absolute weights of each expert's matrix, each times the norm of its input feature over the tokens.

    .. math:: S_i = \sum_{hd} |W_{ihd}| \, \|X_{i, \cdot d}\|_2, \qquad X_i \text{ the rows of expert } i

    It is 0 for an expert without tokens.

    Args:
        weights: W, one matrix for each expert (E, H, D).
        squares: the sums of the squared features over the rows of each expert (E, D).

    >>> wanda(torch.tensor([[[1.0, -2.0]], [[3.0, 0.0]]]), torch.tensor([[4.0, 1.0], [0.0, 0.0]])).tolist()
    [4.0, 0.0]
    """
    return torch.einsum("ehd,ed->e", weights.double().abs(), squares.double().sqrt())


def random(num_experts: int, generator: torch.Generator) -> Tensor:
    """Draw a number between 0 and 1 for each expert."""
    return torch.rand(num_experts, generator=generator, dtype=torch.float64)


def affinity(logits: Tensor) -> Tensor:
    """Compute the cosines between two experts' columns of the logits (N, E): (E, E) float64, on the CPU."""
    columns = torch.nn.functional.normalize(logits.detach().double(), dim=0)
    return (columns.T @ columns).cpu()
