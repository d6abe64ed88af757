"""Modulated experts: each scales and shifts features that all of them share.

Zhang et al., "Efficient Deweather Mixture-of-Experts with Uncertainty-aware Feature-wise Linear Modulation" (MoFME),
arXiv 2312.16610, section on feature-modulated experts; written from the equations. The form with plain vectors is that
of FiLM (Perez et al., arXiv 1709.07871, without the conditioning).
Differs: modulations start near the identity; the shared parts around them are ``models.ModulatedBlock``.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import check_whole, one_of
from spectralmoe.experts.base import Experts
from spectralmoe.experts.feed_forward import add_bias
from spectralmoe.experts.grouped_gemm import grouped_linear, supports_grouped_mm

__all__ = ["ModulatedExperts"]

_FORMS = ("linear", "vector")


class ModulatedExperts(Experts):
    r"""Holds E experts that scale and shift a row b (D,): :math:`F_e(b) = \gamma_e(b) \odot b + \beta_e(b)`.

    - ``"linear"``: :math:`\gamma_e(b) = G_e b + g_e` and :math:`\beta_e(b) = B_e b + c_e`, with 2 (D^2 + D) numbers an
      expert.
    - ``"vector"``: :math:`\gamma_e = g_e` and :math:`\beta_e = c_e`, 2 D numbers an expert.

    An expert is linear in its parameters. So a weighted sum of outputs is the output of one expert with the weighted
    sum of the parameters, and ``mix`` runs that one. The experts are meant for ``spectralmoe.models.ModulatedBlock``,
    whose expansion and MLP they share.

    Args:
        dim: D.
        form: "linear" or "vector".

    Attributes:
        weight: [G; B] (E, 2D, D), which starts as in ``nn.Linear``; None in form "vector".
        bias: [g; c] (E, 2D), which starts uniform within 1/sqrt(D) of 1 (g) and of 0 (c).

    Raises:
        UserError: a size is below 1, or the form is unknown.

    >>> bank = ModulatedExperts(2, dim=8)
    >>> x = torch.randn(5, 8)
    >>> scale, shift = (x[3:] @ bank.weight[1].T + bank.bias[1]).chunk(2, -1)
    >>> torch.allclose(bank(x, torch.tensor([3, 2]))[3:], scale * x[3:] + shift, atol=1e-6)
    True
    """

    row_dims = 1

    def __init__(self, num_experts: int, dim: int, *, form: str = "linear") -> None:
        super().__init__(num_experts)
        check_whole("ModulatedExperts", "the width D", dim)
        if form not in _FORMS:
            raise one_of("form of ModulatedExperts", form, _FORMS)
        self.dim, self.form, bound = dim, form, dim**-0.5
        weight = torch.empty(num_experts, 2 * dim, dim).uniform_(-bound, bound) if form == "linear" else None
        bias = torch.empty(num_experts, 2 * dim).uniform_(-bound, bound)
        bias[:, :dim] += 1
        self.weight = None if weight is None else nn.Parameter(weight)
        self.bias = nn.Parameter(bias)

    def expert(self, x: Tensor, e: int) -> Tensor:
        bias = self.bias[e].to(x.dtype)
        return _modulated(x, bias if self.weight is None else F.linear(x, self.weight[e].to(x.dtype), bias))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        linear = x.new_zeros(()) if self.weight is None else grouped_linear(x, self.weight, counts)
        return _modulated(x, add_bias(linear.expand(len(x), 2 * self.dim), self.bias, counts))

    def reads_loads(self, x: Tensor) -> bool:
        return self.weight is not None and not supports_grouped_mm(x, self.weight)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Modulate each row of x (N, D) once, by the sum of the experts' parameters weighed by ``weights`` (N, E)."""
        mean = weights @ self.bias.to(x.dtype)
        if self.weight is None:
            return _modulated(x, mean)
        weighed = (weights.unsqueeze(-1) * x.unsqueeze(1)).flatten(1)
        return _modulated(x, mean + weighed @ self.weight.to(x.dtype).transpose(1, 2).flatten(0, 1))

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return {name: parameter[e] for name, parameter in self.named_parameters(recurse=False)}

    @property
    def first_weight(self) -> nn.Parameter | None:
        return self.weight

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Return the operations of each expert on one row (E,): its matrices, and scaling and shifting."""
        return super().costs() + 2 * self.dim


def _modulated(x: Tensor, modulation: Tensor) -> Tensor:
    """gamma * x + beta, from [gamma; beta] (..., 2D)."""
    scale, shift = modulation.chunk(2, -1)
    return scale * x + shift
