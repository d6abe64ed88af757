"""Multilinear experts: many linear maps that are slices of one factorised tensor.

Oldfield et al., "Multilinear Mixture of Experts: Scalable Expert Specialization through Factorization" (muMoE), arXiv
2402.12550, NeurIPS 2024, sections on the CP and the tensor-ring form. The authors' code has no licence; this file is
written from the equations.
Differs: a token may also use a few experts, chosen by any selector. The two outer ranks of the tensor ring are equal.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import check_whole, one_of
from spectralmoe.experts.base import Experts
from spectralmoe.experts.grouped_gemm import row_experts
from spectralmoe.stacks import copy_with

__all__ = ["MultilinearExperts"]


class MultilinearExperts(Experts):
    r"""Holds E linear maps :math:`W_e` (O, D + 1) on z = [x; 1], the slices of a factorised tensor that is never built.

    .. math:: W_e = U_3\,\mathrm{diag}(u_e)\,U_2 \quad\text{(cp)}, \qquad
        (W_e z)_o = \mathrm{tr}\Big[G_e \Big(\sum_i z_i G_{2,i}\Big) G_{3,o}\Big] \quad\text{(tr)}

    The soft sum :math:`\sum_e a_e W_e z` (``mix``) first sums the experts' factors with the weights a, so that it costs
    R (E + D + O) multiplications a token in form "cp". All experts share U_2 and U_3; an expert's own are the R numbers
    u_e, or the r_1 r_2 numbers G_e. The rank of W_e is at most min(R, D + 1), in form "tr" min(r_1 r_3, D + 1).

    Args:
        rank: R in form "cp"; r_3, the rank between input and output, in form "tr".
        form: "cp" or "tr" (tensor ring).
        bond: r_1 = r_2 in form "tr".
        out: O; None is D.
        bias: whether z has the 1 behind x.

    Attributes:
        expert_factor: u (E, R), which starts as N(1, 1); or G (E, r_1, r_2), which starts diagonal with N(1, 1).
        input_factor, input_bias: U_2, as (R, D) and (R,), or (r_2 r_3, D) and (r_2 r_3,); the bias may be None.
        output_factor: U_3, (O, R) or (O, r_1 r_3).

    Raises:
        UserError: a size is below 1, or the form is unknown.

    >>> bank = MultilinearExperts(64, dim=8, rank=6, out=3)
    >>> x, gates = torch.randn(5, 8), torch.rand(5, 64)
    >>> each = torch.stack([bank.expert(x, e) for e in range(64)], 1)
    >>> torch.allclose(bank.mix(x, gates), (gates[:, :, None] * each).sum(1), atol=1e-4)
    True
    >>> sum(p.numel() for p in bank.parameters()) == 6 * (64 + 8 + 1 + 3)
    True
    """

    row_dims = 1

    def __init__(
        self,
        num_experts: int,
        dim: int,
        *,
        rank: int,
        form: Literal["cp", "tr"] = "cp",
        bond: int = 4,
        out: int | None = None,
        bias: bool = True,
    ) -> None:
        super().__init__(num_experts)
        if form not in ("cp", "tr"):
            raise one_of("form of MultilinearExperts", form, ["cp", "tr"])
        for name, size in (("dim", dim), ("rank", rank), ("bond", bond), ("out", dim if out is None else out)):
            check_whole("MultilinearExperts", name, size)
        self.dim, self.rank, self.form, self.bond, self.out = dim, rank, form, bond, out
        width = rank if form == "cp" else bond * rank
        spread = torch.randn(num_experts, rank if form == "cp" else bond)
        self.expert_factor = nn.Parameter(1 + spread if form == "cp" else (1 + spread).diag_embed())
        self.input_factor = _uniform(width, dim, fan=dim)
        self.input_bias = _uniform(width, fan=dim) if bias else None
        self.output_factor = _uniform(dim if out is None else out, width, fan=width)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"bias": self.input_bias is not None}

    def expert(self, x: Tensor, e: int) -> Tensor:
        return self._project(self._meet(self._coordinates(x), self.expert_factor[e].to(x.dtype)))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self._project(self.hidden(x, counts))

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor:
        """Return what the output factor reads, (M, R) or (M, r_1 r_3); 0 for rows without an expert."""
        padded = torch.cat([self.expert_factor, torch.zeros_like(self.expert_factor[:1])]).to(x.dtype)
        return self._meet(self._coordinates(x), padded[row_experts(counts, x.shape[0], x.device)])

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return self._project(hidden)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run all experts on all rows by three GEMMs: ``weights`` (N, E) multiply the experts' factors first."""
        mixed = weights @ self.expert_factor.to(x.dtype).flatten(1)
        return self._project(self._meet(self._coordinates(x), mixed.unflatten(1, self.expert_factor.shape[1:])))

    def mix_cost(self, shape: Sequence[int] = ()) -> float:
        """Return the floating-point operations of ``mix`` on one row."""
        return float(self.costs(shape)[0]) + 2 * self.expert_factor.numel()

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the operations of each expert on one row (E,): the products with the factors, the same for all."""
        met = 0 if self.form == "cp" else self.bond**2 * self.rank
        each = 2.0 * (self.input_factor.numel() + met + self.output_factor.numel())
        return torch.full((self.num_experts,), each, dtype=torch.float64)

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return {"expert_factor": self.expert_factor[e]}

    @property
    def reshapes(self) -> bool:
        """Whether outputs have another width than rows."""
        return self.out not in (None, self.dim)

    def _coordinates(self, x: Tensor) -> Tensor:
        """U_2 z (N, R), or the matrices sum_i z_i G_i (N, r_2, r_3)."""
        bias = None if self.input_bias is None else self.input_bias.to(x.dtype)
        coordinates = F.linear(x, self.input_factor.to(x.dtype), bias)
        return coordinates if self.form == "cp" else coordinates.unflatten(1, (self.bond, self.rank))

    def _meet(self, coordinates: Tensor, factor: Tensor) -> Tensor:
        """The coordinates under the factor of an expert, of one for each row, or of a mixture of experts."""
        return coordinates * factor if self.form == "cp" else (factor @ coordinates).flatten(1)

    def _project(self, hidden: Tensor) -> Tensor:
        return F.linear(hidden, self.output_factor.to(hidden.dtype))

    def _restacked(self, change: Callable[[Tensor], Tensor], num_experts: int) -> Experts:
        """As of any bank, of the experts' factor alone: an average of factors is that of the matrices W, too."""
        bank = copy_with(self, {self.expert_factor: change(self.expert_factor.detach())})
        bank.num_experts = num_experts
        return bank


def _uniform(*shape: int, fan: int) -> nn.Parameter:
    """Uniform in +-1/sqrt(fan)."""
    return nn.Parameter(torch.empty(shape).uniform_(-(fan**-0.5), fan**-0.5))
