"""Soft routing balanced without a loss: each expert has a bias, which its load moves.

The idea of Wang et al., "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts", arXiv 2408.15664, for
gates without a choice. Differs: the weights see the bias (in soft routing nothing else could), and it moves in
proportion to how far the load is from even.
"""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.routing import apply_score
from spectralmoe.selectors.soft import Soft
from spectralmoe.sharding import assign_

__all__ = ["SoftBalanced"]


class SoftBalanced(Soft):
    r"""Gives each token all experts with the weights :math:`\mathrm{softmax}(s + b)`; the bias b evens the load.

    After each optimizer step :math:`\bar f \leftarrow \bar f + a (f - \bar f)` and
    :math:`b_i \leftarrow b_i + u\,\mathrm{clip}(1 - E \bar f_i, -1, 1)`. f is the load of the step: f_i is the share of
    tokens whose largest weight is that of expert i, counted over all micro-batches and ranks. ``after_step`` or
    ``attach`` does this; without one of them b stays at 0.

    Args:
        rate: u >= 0.
        memory: a, the weight of a step in the running load, in (0, 1].

    Raises:
        UserError: rate or memory is out of range, or another router has the selector already.

    >>> selector = SoftBalanced(rate=0.1, memory=1.0)
    >>> selector.bind(2)
    >>> selector.update(torch.tensor([30, 10]))
    >>> [round(b, 4) for b in selector.bias.tolist()]
    [-0.05, 0.05]
    """

    bias: Tensor
    load: Tensor

    def __init__(self, *, rate: float = 1e-2, memory: float = 0.05) -> None:
        super().__init__()
        if rate < 0 or not 0 < memory <= 1:
            raise UserError(f"SoftBalanced: rate must be at least 0 and memory in (0, 1], got {rate} and {memory}")
        self.rate, self.memory = rate, memory

    def bind(self, num_experts: int) -> None:
        if "bias" in self._buffers:
            raise UserError("SoftBalanced: this selector belongs to another router already; give each router its own")
        self.register_buffer("bias", torch.zeros(num_experts))
        self.register_buffer("load", torch.full((num_experts,), 1 / num_experts))

    def scored(self, logits: Tensor) -> Tensor:
        return apply_score(self.score, logits + self.bias.to(logits.dtype))

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor:
        return counts

    def update(self, counts: Tensor) -> None:
        total = counts.sum()
        if not total:
            return
        load = self.load + self.memory * (counts / total - self.load)
        assign_(self.load, load)
        assign_(self.bias, self.bias + self.rate * (1 - len(load) * load).clamp(-1, 1))
