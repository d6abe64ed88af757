"""Basis gate: each expert scores a token by the expert's own basis, so routing and experts cannot drift apart.

Cheng et al., "ERMoE: Eigen-Reparameterized Mixture-of-Experts", arXiv 2511.10971, section on routing. Authors' code:
github.com/Belis0811/ERMoE (AGPL-3.0 and no commercial use; this file is written from the equations). Differs: a
selector takes the scores as logits, and ``score="energy"`` needs no context.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.context import Rows
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import EigenExperts, Experts
from spectralmoe.scorers.base import Scorer, gamma, margin_over_slope
from spectralmoe.sharding import full, is_sharded
from spectralmoe.stacks import chosen_experts

__all__ = ["BasisScorer"]


class BasisScorer(Scorer):
    r"""Scores a token by the input bases of the experts: :math:`s_e = \cos(V_e^\top x, V_e^\top a)`.

    V_e (D, R) is the input basis of expert e in ``EigenExperts``, and a is the output of the attention in front of the
    layer for this token. The layer gets it as ``context=Context(tokens={"attended": a})``; the blocks of
    ``spectralmoe.models`` that have attention pass it themselves. With ``score="energy"``,
    :math:`s_e = \|V_e^\top x\|^2 / \|x\|^2`, which needs no context.

    The scorer has no parameters of its own; it reads those of the experts. If R = D, all experts get the same score.

    Args:
        bank: the experts whose bases are read. None, the default, takes those of the layer that the scorer is put
            into; they must be the same.
        score: "context" reads ``attended`` (N, D) from the context, "energy" reads the token alone.

    Raises:
        UserError: ``score`` is unknown; the experts are no ``EigenExperts`` or have another D or E; ``bank`` is not
            the layer's. In forward: the scorer is in no layer and has no bank, or the context has no ``attended``.

    >>> from spectralmoe import EigenExperts, MoE, Router, TopK
    >>> bank = EigenExperts(4, dim=16, rank=4)
    >>> layer = MoE(Router(BasisScorer(16, 4, bank=bank, score="energy"), TopK(1)), bank)
    >>> x = bank.right[2].T.detach()  # rows along the basis of expert 2
    >>> layer.router(x).indices.flatten().tolist()
    [2, 2, 2, 2]
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        bank: EigenExperts | None = None,
        score: Literal["context", "energy"] = "context",
    ) -> None:
        super().__init__(dim, num_experts)
        if score not in ("context", "energy"):
            raise one_of("score", score, ["context", "energy"])
        self.score, self.reads = score, ("attended",) if score == "context" else ()
        self._banks: tuple[EigenExperts, ...] = ()  # in a tuple it is no submodule: its tensors stay the layer's
        if bank is not None:
            self.bind_experts(bank)

    def spec_arguments(self) -> dict[str, object]:
        """Return the arguments to save: the bank is saved with its layer, not here."""
        return {"bank": None}

    def bind_experts(self, experts: Experts) -> None:
        if not isinstance(experts, EigenExperts):
            raise UserError(
                f"BasisScorer: reads the bases of EigenExperts, but the experts of the layer are "
                f"{type(experts).__name__}; use EigenExperts, or another scorer"
            )
        if (experts.dim, experts.num_experts) != (self.dim, self.num_experts):
            raise UserError(
                f"BasisScorer: made for D={self.dim}, E={self.num_experts}, but the experts have D={experts.dim}, "
                f"E={experts.num_experts}"
            )
        if self._banks and self._banks[0] is not experts:
            raise UserError(
                "BasisScorer: bank= is not the layer's experts; give the scorer and the layer the same ones"
            )
        self._banks = (experts,)

    def select(self, indices: Sequence[int] | Tensor) -> BasisScorer:
        """Return a scorer of these experts; the layer that it is put into gives it their bases."""
        chosen = chosen_experts("BasisScorer.select", indices, self.num_experts)
        return BasisScorer(self.dim, len(chosen), score=self.score).train(self.training)

    @property
    def bank(self) -> EigenExperts:
        """The experts whose bases are read."""
        if not self._banks:
            raise UserError("BasisScorer: has no experts to read yet; put it into an MoE layer, or pass bank=")
        return self._banks[0]

    @property
    def is_frozen(self) -> bool:
        """Whether the experts' bases are frozen."""
        return not self.bank.right.requires_grad

    def coordinates(self, x: Tensor) -> Tensor:
        """Return the coordinates of the tokens x (N, D) in the basis of each expert: (N, E, R)."""
        right = self.bank.right
        if is_sharded(right) and torch.is_grad_enabled():  # what is gathered here gets the gradient of this rank alone
            raise UserError(
                "BasisScorer: the experts are a sharded group of their own; call fully_shard on their layer or block"
            )
        bases = full(right).to(x.dtype).transpose(0, 1).flatten(1)
        coordinates: Tensor = (x @ bases).unflatten(-1, (self.num_experts, -1))
        return coordinates

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor | None:
        r"""Bound the distance to a tie of two energies; None for ``score="context"``, where no bound is known.

        The bound is :math:`(\|V_i^\top x\| - \|V_j^\top x\|) / \sqrt{2(1 + \|V_i^\top V_j\|)}`. Two energies tie
        where these two norms do, and the gradient of the norms' difference is :math:`V_i u - V_j w` with unit vectors
        u and w. The bound is the distance itself if the two bases are orthonormal and orthogonal to each other.
        Rounding in ``precision`` moves a norm by at most a share of :math:`\|x\|`, which is taken off.
        """
        if self.score != "energy":
            return None
        bases = full(self.bank.right).detach().to(x.dtype)
        sizes = self.coordinates(x).norm(dim=-1)
        products = torch.linalg.matrix_norm(bases.mT[:, None] @ bases, 2)
        squares = products.diagonal()
        slope = (2 * (torch.maximum(squares[:, None], squares) + products)).sqrt()[over, under]
        tiny, rank = torch.finfo(precision).tiny, bases.shape[-1]
        share = gamma(self.dim, precision) * bases.flatten(1).norm(dim=1)
        share = share + 2 * gamma(rank + 4, precision) * (squares.sqrt() + share) + tiny**0.5
        error = torch.stack([torch.full_like(share, (2 * rank * tiny) ** 0.5), share, torch.zeros_like(share)])
        gap = sizes.gather(1, over) - sizes.gather(1, under)
        return margin_over_slope(gap, slope, x, error[:, over] + error[:, under])

    def forward(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        if self.score == "context":
            attended = self.read(context, "attended", len(x), self.dim).to(x.dtype)
            cosines: Tensor = F.cosine_similarity(self.coordinates(x), self.coordinates(attended), dim=-1)
            return cosines
        size = x.square().sum(-1, keepdim=True).clamp_min(torch.finfo(x.dtype).tiny)
        return self.coordinates(x).square().sum(-1) / size
