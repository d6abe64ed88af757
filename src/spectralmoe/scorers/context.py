"""Context gate: experts by what is known beside the token, such as how badly a sample is degraded.

After the gate of "MoR", arXiv 2511.16024, which reads the severity of a degradation and not the token. Differs: any
named vector will do, the gate is linear, and it may read the token too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.scorers.base import Scorer

__all__ = ["ContextScorer"]


class ContextScorer(Scorer):
    r"""Logits :math:`s = c\,C^\top + b`, C (E, P), of a vector c (N, P) of the context.

    With ``token``, :math:`x W^\top` is added, W (E, D). Rows start as N(0, 1/P) and N(0, 1/D).

    Args:
        key: the name of c in ``Context``; a value a token, or a value a sample for all of its tokens.
        width: P, how many numbers c has.
        token: whether the token x is read too.

    Raises:
        UserError: width < 1; at a forward, no c, or one of another width.

    >>> from spectralmoe import Context, FeedForward, MoE, Router, TopK
    >>> layer = MoE(Router(ContextScorer(16, 4, width=3), TopK(1)), FeedForward(4, dim=16, hidden=8))
    >>> x, severity = torch.randn(2, 5, 16), torch.rand(2, 3)
    >>> layer(x, context=Context(samples={"severity": severity})).shape
    torch.Size([2, 5, 16])
    """

    rows = ("weight", "token_weight", "bias")

    def __init__(
        self, dim: int, num_experts: int, *, key: str = "severity", width: int = 1, token: bool = False
    ) -> None:
        super().__init__(dim, num_experts)
        if width < 1:
            raise UserError(f"ContextScorer: width must be at least 1, got {width}")
        self.key, self.width, self.token, self.reads = key, width, token, (key,)
        self.weight = nn.Parameter(torch.randn(num_experts, width) * width**-0.5)
        self.token_weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5) if token else None
        self.bias = nn.Parameter(torch.zeros(num_experts))

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        c = self.read(context, self.key, len(x), self.width)
        logits = F.linear(c.to(x.dtype), self.weight.to(x.dtype), self.bias.to(x.dtype))
        return logits if self.token_weight is None else logits + F.linear(x, self.token_weight.to(x.dtype))

    @property
    def matrix(self) -> Tensor:
        """C, beside W where the token is read: (E, P) or (E, P + D)."""
        return self.weight if self.token_weight is None else torch.cat([self.weight, self.token_weight], 1)
