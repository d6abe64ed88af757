"""Confident experts: each estimates how sure it is, and this weighs its output.

Zheng, Zhang, Guo, Xu, Maennel & Chen, "Rethinking Gating Mechanism in Sparse MoE: Handling Arbitrary Modality Inputs
with Confidence-Guided Gate" (ConfSMoE), arXiv 2505.19525: a gate made by the experts themselves. Written from the
equations.
Differs: the gain multiplies the router's combine weight, which the paper sets to 1 (``Unweighted`` does so); the target
of ``confidence_loss`` has no gradient by default; the residual path and the norm behind it stay with the model.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.experts.answer import Answer
from spectralmoe.experts.base import Experts
from spectralmoe.experts.feed_forward import add_bias
from spectralmoe.experts.grouped_gemm import grouped_linear
from spectralmoe.stacks import copy_with

__all__ = ["ConfidentExperts"]


class ConfidentExperts(Experts):
    r"""Wraps a bank F and weighs each output by a confidence :math:`c = \sigma(v_e^\top \mathrm{LN}(F_e(x)) + b_e)`.

    c lies in (0, 1) and multiplies the combine weight. In the paper it replaces the combine weight: choose the experts
    with ``Unweighted``. The confidences of a token do not sum to 1, so put a normalisation behind the layer.
    ``confidence_loss`` trains c to be the probability of being right. LN has no weights, since v can do their work.

    ``record(model, keep=...)`` can keep "confidence", c (M,), and "unweighed", F(x) (M, D) before c weighs it.

    Args:
        experts: the bank F of width D.
        detach_target: whether the target of ``confidence_loss`` gets no gradient; False is the paper's.

    Attributes:
        direction: v (E, D), which starts at zero, so that every confidence is 1/2.
        bias: b (E,), which starts at zero.

    Raises:
        UserError: the bank has no attribute ``dim``, or its outputs are not as wide as its rows.

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), ConfidentExperts(FeedForward(4, 8, 16)))
    >>> with record(layer, keep="confidence") as tape:
    ...     y = layer(torch.randn(3, 8))
    >>> tape[0].tensor("confidence").tolist()
    [0.5, 0.5, 0.5, 0.5, 0.5, 0.5]
    """

    row_dims = 1

    def __init__(self, experts: Experts, *, detach_target: bool = True) -> None:
        super().__init__(experts.num_experts)
        if not isinstance(dim := getattr(experts, "dim", None), int):
            raise UserError(
                f"ConfidentExperts needs a bank that says its width D as 'dim', {type(experts).__name__} does not"
            )
        if experts.reshapes:
            raise UserError(
                f"ConfidentExperts needs outputs as wide as rows, which those of {type(experts).__name__} are not"
            )
        self.experts, self.dim, self.detach_target = experts, dim, detach_target
        self.says = ("confidence", "unweighed", *experts.says)
        self.direction = nn.Parameter(torch.zeros(experts.num_experts, dim))
        self.bias = nn.Parameter(torch.zeros(experts.num_experts))

    def answer(self, x: Tensor, e: int) -> Answer:
        row = slice(e, e + 1)
        return self._weighed(
            self.experts.answer(x, e),
            lambda rows: F.linear(rows, self.direction[row].to(rows.dtype), self.bias[row].to(rows.dtype)),
        )

    def forward(self, x: Tensor, counts: Tensor) -> Answer:
        return self._sorted(self.experts(x, counts), counts)

    def reads_loads(self, x: Tensor) -> bool:
        return True  # heads are one wide

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor | None:
        return self.experts.hidden(x, counts)

    def project(self, hidden: Tensor, counts: Tensor) -> Answer:
        return self._sorted(self.experts.project(hidden, counts), counts)

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        inner = {f"experts.{name}": value for name, value in self.experts.expert_parameters(e).items()}
        return {"direction": self.direction[e], "bias": self.bias[e], **inner} if inner else {}

    @property
    def first_weight(self) -> nn.Parameter | None:
        return self.experts.first_weight

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the operations of each expert on one row (E,): those of the wrapped bank, and the confidence."""
        return self.experts.costs(shape) + 2 * self.dim

    def select(self, indices: Sequence[int] | Tensor) -> Experts:
        bank = cast(ConfidentExperts, super().select(indices))
        bank.experts = self.experts.select(indices)
        return bank

    def averaged(self, groups: Sequence[Sequence[int]], weights: Sequence[Sequence[float]] | None = None) -> Experts:
        bank = cast(ConfidentExperts, super().averaged(groups, weights))
        bank.experts = self.experts.averaged(groups, weights)
        return bank

    def _restacked(self, change: Callable[[Tensor], Tensor], num_experts: int) -> Experts:
        """Restack the tensors of this class; the wrapped bank restacks its own."""
        bank = copy_with(self, {stack: change(stack.detach()) for stack in (self.direction, self.bias)})
        bank.num_experts = num_experts
        return bank

    def _sorted(self, result: Tensor | Answer, counts: Tensor) -> Answer:
        """The bank's result on rows sorted by expert, weighed."""
        return self._weighed(
            result if isinstance(result, Answer) else Answer(result),
            lambda rows: add_bias(grouped_linear(rows, self.direction[:, None], counts), self.bias[:, None], counts),
        )

    def _weighed(self, answer: Answer, head: Callable[[Tensor], Tensor]) -> Answer:
        """The answer with its confidence, in fp32 or better; ``head`` maps rows (M, D) to their logits (M, 1)."""
        y = answer.gained
        with torch.autocast(y.device.type, enabled=False):
            rows = F.layer_norm(y.to(torch.promote_types(y.dtype, torch.float32)), (self.dim,))
            confidence = head(rows).squeeze(1).sigmoid()
        return Answer(y, confidence, {"confidence": confidence, "unweighed": y, **(answer.said or {})})
