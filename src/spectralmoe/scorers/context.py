"""Context gate: side information chooses the experts, such as how badly a sample is degraded.

After the gate of "MoR", arXiv 2511.16024, which reads the severity of a degradation and not the token. Differs: any
named vector will do, the gate is linear or has one hidden layer, and it may read the token too.
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
    r"""Scores experts by side information c (N, P) instead of the token: :math:`s = c\,C^\top + b`, C (E, P), b (E,).

    With ``hidden=H``, :math:`s = \mathrm{gelu}(c\,G^\top + a)\,C^\top + b`, G (H, P), a (H,) and C (E, H), so that a
    logit may rise and fall again along c. With ``token=True``, :math:`x W^\top` is added, W (E, D).

    Start values: the rows of C and G are N(0, 1/P), those of C behind a hidden layer N(0, 1/H), those of W N(0, 1/D).
    b is 0, and a is uniform in [-1, 1], so that the hidden units bend at different values of c.

    Args:
        key: the name of c in ``Context``: one vector for each token, or one for each sample and all of its tokens.
        width: P, how many numbers c has.
        token: whether the token x is read as well.
        hidden: H, the width of a hidden layer; None makes the gate linear.

    Raises:
        UserError: width < 1 or hidden < 1. In forward: the context has no c, or c has another width.

    >>> from spectralmoe import Context, FeedForward, MoE, Router, TopK
    >>> layer = MoE(Router(ContextScorer(16, 4, width=3), TopK(1)), FeedForward(4, dim=16, hidden=8))
    >>> x, severity = torch.randn(2, 5, 16), torch.rand(2, 3)
    >>> layer(x, context=Context(samples={"severity": severity})).shape
    torch.Size([2, 5, 16])
    """

    rows = ("weight", "token_weight", "bias")

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        key: str = "severity",
        width: int = 1,
        token: bool = False,
        hidden: int | None = None,
    ) -> None:
        super().__init__(dim, num_experts)
        if width < 1:
            raise UserError(f"ContextScorer: width must be at least 1, got {width}")
        if hidden is not None and hidden < 1:
            raise UserError(f"ContextScorer: hidden must be at least 1, got {hidden}; None is a linear gate")
        self.key, self.width, self.token, self.hidden, self.reads = key, width, token, hidden, (key,)
        last = hidden or width
        self.weight = nn.Parameter(torch.randn(num_experts, last) * last**-0.5)
        self.token_weight = nn.Parameter(torch.randn(num_experts, dim) * dim**-0.5) if token else None
        self.bias = nn.Parameter(torch.zeros(num_experts))
        self.hidden_weight = nn.Parameter(torch.randn(hidden, width) * width**-0.5) if hidden else None
        self.hidden_bias = nn.Parameter(torch.empty(hidden).uniform_(-1, 1)) if hidden else None

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        c = self.read(context, self.key, len(x), self.width).to(x.dtype)
        if self.hidden_weight is not None and self.hidden_bias is not None:
            c = F.gelu(F.linear(c, self.hidden_weight.to(x.dtype), self.hidden_bias.to(x.dtype)))
        logits = F.linear(c, self.weight.to(x.dtype), self.bias.to(x.dtype))
        return logits if self.token_weight is None else logits + F.linear(x, self.token_weight.to(x.dtype))

    @property
    def matrix(self) -> Tensor:
        """C, with W beside it if the token is read: (E, P) or (E, P + D); with a hidden layer H stands for P."""
        return self.weight if self.token_weight is None else torch.cat([self.weight, self.token_weight], 1)
