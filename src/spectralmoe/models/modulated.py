"""A block of modulated experts, whose expansion and MLP all experts share.

Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation" (MoFME),
arXiv 2312.16610, section on feature-modulated experts; written from the equations.
Differs: the router reads what the experts read, the expanded token; so A starts with features of about its size.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE

__all__ = ["ModulatedBlock"]


class ModulatedBlock(nn.Module):
    r"""A block of modulated experts between an expansion and an MLP that all of them share: x (..., D) -> (..., D).

    .. math:: b = \mathrm{gelu}(A_1 \mathrm{LN}\,x) \odot A_2 \mathrm{LN}\,x, \qquad
        y = x + \mathrm{MLP}(\mathrm{MoE}(b))

    With E ``ModulatedExperts`` its matrices have 2 E D^2 + 10 D^2 numbers; those of E networks D -> 4D -> D have
    8 E D^2.

    Args:
        moe: an MoE layer of tokens, of width D, with ``ModulatedExperts`` or any other bank.
        expansion: the hidden width of the MLP is this times D.
        residual: whether LN and the sum with x are a part of the block; if not, the network around has them.

    Raises:
        UserError: expansion < 1.

    >>> import torch
    >>> from spectralmoe import LinearScorer, Router, TopK
    >>> from spectralmoe.experts import ModulatedExperts
    >>> block = ModulatedBlock(MoE(Router(LinearScorer(16, 4), TopK(2)), ModulatedExperts(4, 16)))
    >>> block(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    def __init__(self, moe: MoE, *, expansion: int = 4, residual: bool = True) -> None:
        super().__init__()
        if not isinstance(expansion, int) or expansion < 1:
            raise UserError(f"ModulatedBlock: expansion must be at least 1, got {expansion}")
        dim = moe.router.scorer.dim
        self.expansion, self.residual, self.moe = expansion, residual, moe
        self.norm = nn.LayerNorm(dim) if residual else None
        self.gate, self.value = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        for linear in (self.gate, self.value):
            nn.init.normal_(linear.weight, std=dim**-0.5)
        self.up, self.down = nn.Linear(dim, expansion * dim, bias=False), nn.Linear(expansion * dim, dim, bias=False)

    def forward(self, x: Tensor, context: Context | None = None) -> Tensor:
        tokens = x if self.norm is None else self.norm(x)
        features = F.gelu(self.gate(tokens)) * self.value(tokens)
        added: Tensor = self.down(F.gelu(self.up(self.moe(features, context=context))))
        return x + added if self.residual else added
