"""Feed-forward experts D -> H -> D, whose weights are stacked."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts.base import Experts
from spectralmoe.experts.grouped_gemm import grouped_linear, row_experts, supports_grouped_mm

__all__ = ["Activation", "FeedForward", "activate", "add_bias"]

Activation = Literal["gelu", "relu", "swiglu"]


class FeedForward(Experts):
    r"""Holds E networks of two layers, :math:`W_2\,a(W_1 x + b_1) + b_2`, with their weights stacked.

    With "swiglu" a network is :math:`W_2(\mathrm{silu}(G x) \odot U x)`, and ``up`` is [G; U] with 2H rows (Shazeer,
    arXiv 2002.05202). Weights start as in ``nn.Linear``.

    Args:
        num_experts: E.
        dim: D.
        hidden: H.
        activation: a, "gelu", "relu" or "swiglu".
        bias: whether there are b_1 and b_2.
        spare: how many hidden units each expert has beyond H that are zero. They add nothing to the output and get no
            gradient, so training leaves them zero. A later correction of one expert can write into them
            (``spectralmoe.adaptation``).

    Attributes:
        up: (E, H + spare, D), twice as many rows for "swiglu".
        down: (E, D, H + spare).
        up_bias, down_bias: (E, rows of ``up``) and (E, D); None without ``bias``.

    Raises:
        UserError: a size is below 1, ``spare`` is negative, or the activation is unknown.

    >>> bank = FeedForward(2, dim=8, hidden=16)
    >>> x = torch.randn(5, 8)
    >>> y = bank(x, counts=torch.tensor([3, 2]))
    >>> torch.allclose(y[3:], bank.expert(x[3:], 1), atol=1e-6)
    True
    """

    row_dims = 1

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden: int,
        *,
        activation: Activation = "gelu",
        bias: bool = False,
        spare: int = 0,
    ) -> None:
        super().__init__(num_experts)
        if activation not in ("gelu", "relu", "swiglu"):
            raise one_of("activation", activation, ["gelu", "relu", "swiglu"])
        if dim < 1 or hidden < 1:
            raise UserError(f"{type(self).__name__}: widths D and H must be at least 1, got {dim} and {hidden}")
        self.dim, self.width, self.activation, self.spare = dim, hidden, activation, 0
        halves = 2 if activation == "swiglu" else 1
        self.up, self.down = _uniform(num_experts, halves * hidden, dim), _uniform(num_experts, dim, hidden)
        self.up_bias = _uniform(num_experts, halves * hidden, fan_in=dim) if bias else None
        self.down_bias = _uniform(num_experts, dim, fan_in=hidden) if bias else None
        self.add_spare(spare)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        return {"hidden": self.width, "bias": self.up_bias is not None}

    def add_spare(self, units: int) -> None:
        """Append ``units`` hidden units that are zero to every expert; what it computes stays.

        The parameters are new tensors, so make the optimizer afterwards.

        Raises:
            UserError: ``units`` is negative.
        """
        if units < 0:
            raise UserError(f"{type(self).__name__}: spare must not be negative, got {units}")
        if not units:
            return
        width = self.down.shape[2]
        self.up = nn.Parameter(F.pad(self.up.data.unflatten(1, (-1, width)), (0, 0, 0, units)).flatten(1, 2))
        self.down = nn.Parameter(F.pad(self.down.data, (0, units)))
        if self.up_bias is not None:
            padded = F.pad(self.up_bias.data.unflatten(1, (-1, width)), (0, units))
            self.up_bias = nn.Parameter(padded.flatten(1, 2))
        self.spare += units

    def free_units(self, e: int) -> list[int]:
        """Return the hidden units of expert ``e`` whose weights are all zero: spare ones that no correction uses."""
        up, down = self.up[e].unflatten(0, (-1, self.down.shape[2])), self.down[e]
        used = up.ne(0).any(-1).any(0) | down.ne(0).any(0)
        if self.up_bias is not None:
            used |= self.up_bias[e].unflatten(0, (-1, self.down.shape[2])).ne(0).any(0)
        return [int(unit) for unit in used.logical_not().nonzero().flatten()]

    def expert(self, x: Tensor, e: int) -> Tensor:
        up_bias = None if self.up_bias is None else self.up_bias[e].to(x.dtype)
        down_bias = None if self.down_bias is None else self.down_bias[e].to(x.dtype)
        h = activate(self.activation, F.linear(x, self.up[e].to(x.dtype), up_bias))
        return F.linear(h, self.down[e].to(x.dtype), down_bias)

    def forward(self, x: Tensor, counts: Tensor) -> Tensor:
        return self.project(self.hidden(x, counts), counts)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor:
        return activate(self.activation, add_bias(grouped_linear(x, self.up, counts), self.up_bias, counts))

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor:
        return add_bias(grouped_linear(hidden, self.down, counts), self.down_bias, counts)

    def reads_loads(self, x: Tensor) -> bool:
        return not (supports_grouped_mm(x, self.up) and supports_grouped_mm(x, self.down))

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """Run all experts on all rows by two GEMMs; the hidden activations are multiplied by ``weights`` (N, E)."""
        h = F.linear(x, self.up.flatten(0, 1).to(x.dtype), self._flat(self.up_bias, x.dtype))
        h = activate(self.activation, h.unflatten(-1, (self.num_experts, -1))) * weights.unsqueeze(-1)
        y = h.flatten(1) @ self.down.to(x.dtype).transpose(1, 2).flatten(0, 1)
        return y if self.down_bias is None else y + weights @ self.down_bias.to(x.dtype)

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        return {name: parameter[e] for name, parameter in self.named_parameters(recurse=False)}

    @property
    def first_weight(self) -> nn.Parameter:
        return self.up

    @staticmethod
    def _flat(bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        return None if bias is None else bias.flatten().to(dtype)


def activate(activation: Activation, h: Tensor) -> Tensor:
    """Apply the activation: (..., H) from the output (..., H) of the first layer, for "swiglu" (..., 2H)."""
    if activation == "swiglu":
        gate, value = h.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(h) if activation == "gelu" else F.relu(h)


def _uniform(*shape: int, fan_in: int | None = None) -> nn.Parameter:
    """Uniform in +-1/sqrt(fan in), as ``nn.Linear`` starts."""
    bound = (fan_in or shape[-1]) ** -0.5
    return nn.Parameter(torch.empty(shape).uniform_(-bound, bound))


def add_bias(y: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
    """Add to each row of y (M, H) the bias of its expert; rows behind the last expert's get 0 and no gradient."""
    if bias is None:
        return y
    padded = torch.cat([bias, bias.new_zeros(1, bias.shape[1])]).to(y.dtype)
    return y + padded[row_experts(counts, y.shape[0], y.device)]
