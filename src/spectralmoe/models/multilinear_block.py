"""The two-layer block of muMoE, whose gate mixes parameters and not outputs.

Oldfield et al., "Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization" (muMoE), arXiv
2402.12550, NeurIPS 2024: the block that replaces a transformer's MLP. The authors' code has no licence; this file is
written from the equations.
Differs: any router may give the weights.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.context import Context, Rows, rows_of
from spectralmoe.dispatch import Dense
from spectralmoe.errors import UserError
from spectralmoe.experts import MultilinearExperts
from spectralmoe.recording import Recordable
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import Entmax

__all__ = ["MultilinearBlock"]


class MultilinearBlock(Recordable):
    r"""Applies two layers of multilinear experts with the same gate: :math:`y = W_2[a]\,\mathrm{gelu}(W_1[a]\,x)`.

    :math:`W[a] = \sum_e a_e W_e` acts on [x; 1], and a are the weights of a router. Because of the GELU between the two
    layers, y is no weighted sum of experts' outputs. So this is a module of its own and no bank for ``MoE``. ``record``
    records its routing.

    Args:
        dim, hidden: D and H.
        num_experts: E of both layers.
        rank, form, bond: those of both layers, see ``MultilinearExperts``.
        router: the router that gives a; None makes a linear gate that starts at zero, and so with even weights, with
            ``Entmax(norm=True)``.

    Raises:
        UserError: the router has another width or number of experts; or as ``MultilinearExperts``.

    >>> block = MultilinearBlock(8, 16, 32, rank=6)
    >>> block(torch.randn(2, 5, 8)).shape
    torch.Size([2, 5, 8])
    """

    router: Router

    def __init__(
        self,
        dim: int,
        hidden: int,
        num_experts: int,
        *,
        rank: int,
        form: Literal["cp", "tr"] = "cp",
        bond: int = 4,
        router: Router | None = None,
    ) -> None:
        super().__init__()
        if router is None:
            scorer = LinearScorer(dim, num_experts)
            torch.nn.init.zeros_(scorer.weight)
            router = Router(scorer, Entmax(norm=True))
        if (router.scorer.dim, router.num_experts) != (dim, num_experts):
            raise UserError(
                f"MultilinearBlock: the router was made for D={router.scorer.dim}, E={router.num_experts}, "
                f"the block for D={dim}, E={num_experts}"
            )
        self.dim, self.hidden, self.num_experts = dim, hidden, num_experts
        self.rank, self.form, self.bond = rank, form, bond
        self.router = router
        self.up = MultilinearExperts(num_experts, dim, rank=rank, form=form, bond=bond, out=hidden)
        self.down = MultilinearExperts(num_experts, hidden, rank=rank, form=form, bond=bond, out=dim)

    @property
    def keepable(self) -> tuple[str, ...]:
        """The names of the tensors that ``record`` can keep: the tokens alone."""
        return ("tokens",)

    def forward(self, x: Tensor, mask: Tensor | None = None, context: Context | Rows | None = None) -> Tensor:
        """Run the block on x (..., D) -> (..., D); padding (``mask`` False) has the output and the gradient 0."""
        mask, context, replay = self.begin(x, mask, context)
        side = rows_of(context, x, mask)
        routing = self.router(x, mask=mask, context=side, replay=replay)
        seen = self.seen(x, self.names_to_keep(), streams=self.router.scorer.streams_tokens)
        rows = x.reshape(-1, self.dim)
        if torch.is_autocast_enabled(x.device.type):
            rows = rows.to(torch.get_autocast_dtype(x.device.type))
        mixed = Dense()
        y = mixed(F.gelu(mixed(rows, routing, self.up)), routing, self.down)
        self.leave(routing, None, seen, side)
        return y.reshape(*x.shape[:-1], self.dim)
