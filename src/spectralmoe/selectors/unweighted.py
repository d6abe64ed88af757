"""Unweighted: every chosen expert has the weight 1, for experts that weigh their outputs themselves.

Zheng, Zhang, Guo, Xu, Maennel & Chen, "Rethinking Gating Mechanism in Sparse MoE: Handling Arbitrary Modality Inputs
with Confidence-Guided Gate" (ConfSMoE), arXiv 2505.19525: the experts' confidence
takes the place of the gate. Written from the equations.
Differs: in the paper the router gets no gradient, so its random projection never changes (``router_grad="none"``). The
gradient of ``router_grad="confidence"`` is ours.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from spectralmoe.errors import UserError, one_of
from spectralmoe.selectors.around import Around
from spectralmoe.selectors.base import Selector, take

__all__ = ["Unweighted"]

_GRADIENTS = ("none", "confidence")


class Unweighted(Around):
    r"""Wraps a selector and gives each chosen expert the weight 1: :math:`y_t = \sum_j E_{i_{tj}}(x_t)`.

    With ``ConfidentExperts`` the outputs are then weighed by the experts' confidence c alone, as in the paper.

    With ``router_grad="none"`` the router gets no gradient; under torch's DistributedDataParallel freeze it,
    ``router.requires_grad_(False)``, or let the wrapper find unused parameters. With ``router_grad="confidence"`` the
    logit s of a chosen expert gets a straight-through gradient: :math:`w = 1 + s - \mathrm{sg}(s)` with sg the
    stop-gradient, so :math:`\partial w c / \partial s = c`, as if s were added to the logarithm of c.

    Args:
        selector: the selector that chooses.
        router_grad: "confidence", or "none", which is the paper's.

    Raises:
        UserError: ``router_grad`` is unknown, or the selector gives every token every expert, so that with equal
            weights the router would not matter.

    >>> import torch
    >>> from spectralmoe.selectors import TopK
    >>> logits = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    >>> weights = Unweighted(TopK(2)).weigh(logits, torch.tensor([[1, 2]]))
    >>> weights.tolist(), torch.autograd.grad(weights.sum(), logits)[0].tolist()
    ([[1.0, 1.0]], [[0.0, 1.0, 1.0]])
    """

    def __init__(self, selector: Selector, *, router_grad: Literal["none", "confidence"] = "confidence") -> None:
        super().__init__(selector)
        if router_grad not in _GRADIENTS:
            raise one_of("router_grad of Unweighted", str(router_grad), _GRADIENTS)
        self.router_grad = router_grad
        self.normalize = False  # k weights of 1

    def bind(self, num_experts: int) -> None:
        super().bind(num_experts)
        if self.soft:
            raise UserError("Unweighted: in soft routing equal weights leave the router no say; use TopK with k < E")

    def weigh(self, logits: Tensor, indices: Tensor) -> Tensor:
        indices = self.emptied(indices)
        filled = (indices >= 0).to(logits.dtype)
        if self.router_grad == "none":
            return filled
        chosen = take(logits, indices)
        return filled + (chosen - chosen.detach())
