"""A scorer is the part of a router that turns tokens into logits, one for each expert."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from spectralmoe.context import Rows
from spectralmoe.errors import UserError, check_whole
from spectralmoe.experts import Experts
from spectralmoe.parts import Part
from spectralmoe.stacks import chosen_experts, copy_with

__all__ = ["Scorer", "gamma", "half_space_distance", "margin_over_slope"]


class Scorer(Part):
    """The base class of all scorers: ``forward(x (N, D), *, context=None)`` returns logits (N, E).

    A subclass must keep every constructor argument as an attribute of the same name, because saving reads the
    arguments back by the names in the signature. Its ``forward`` casts the parameters to ``x.dtype``, so that float64
    tokens give float64 logits. Only ``forward`` is required.

    Args:
        dim: D, the width of a token.
        num_experts: E.

    Raises:
        UserError: ``dim`` or ``num_experts`` is not a positive integer.
    """

    rows: tuple[str, ...] = ()
    """Names of the parameters and buffers of which row e is read by the logit of expert e and by no other."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            check_whole(type(self).__name__, name, value)
        self.dim, self.num_experts = dim, num_experts

    def __call__(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        logits: Tensor = super().__call__(x, context=context)
        return logits

    def bind_experts(self, experts: Experts) -> None:
        """Take note of the layer's experts; the layer calls this once, when it is made.

        A scorer that reads the experts' parameters keeps a reference to them. Others do nothing. A scorer around
        another scorer passes the call on.
        """

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """Return a scorer of the experts ``indices`` alone, in this order; they keep the logits that they had.

        It copies the ``rows`` of these experts. A scorer whose logits depend on more than ``rows`` overrides this.

        Raises:
            UserError: ``indices`` is empty or names an expert that does not exist; the scorer has no ``rows``.
        """
        if not self.rows:
            raise UserError(
                f"{type(self).__name__} cannot be cut down to some of its experts: its class names no rows; "
                "set rows = (...), the parameters with one row for each expert"
            )
        stacks = [stack for name in self.rows if (stack := getattr(self, name)) is not None]
        chosen = chosen_experts(f"{type(self).__name__}.select", indices, self.num_experts)
        return self._cut(chosen, {stack: stack.detach()[chosen] for stack in stacks})

    def _cut(self, chosen: list[int], tensors: Mapping[Tensor, Tensor]) -> Self:
        """A copy for the chosen experts, with other tensors in the place of some."""
        scorer = copy_with(self, tensors)
        scorer.num_experts = len(chosen)
        return scorer

    @property
    def matrix(self) -> Tensor | None:
        """The routing matrix, one row for each expert, which the spectral terms read; None if there is none."""
        return None

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """Return (A (E, D), b (E,)) with logits = x A' + b up to a shift common to all experts; None if not affine."""
        return None

    def lipschitz(self) -> float | None:
        """Return a Lipschitz constant of the logits as a function of x, valid for all x; None if none is known.

        The constant is in 2-norms and leaves out a shift that is common to all experts.
        """
        return None

    def rounding(self, x: Tensor, precision: torch.dtype) -> Tensor | None:
        r"""Bound the rounding error of the logits computed in ``precision``: coefficients c (3, E); None if unknown.

        The logit of expert e for any token y is wrong by at most
        :math:`c_{0e} + c_{1e}\|y\| + c_{2e}\|y\|^2`, up to a shift common to all experts. For an affine scorer this
        is the bound of an inner product over D terms. A scorer that has only a ``lipschitz()`` bound is assumed to
        round like such a product; one that rounds worse overrides this method.

        Args:
            x: tokens (N, D); the coefficients get their device and dtype.
            precision: the dtype in which the router computes the logits, float32 or float64.
        """
        relative, least = gamma(self.dim + 2, precision), self.dim * torch.finfo(precision).tiny
        if (affine := self.affine()) is not None:
            size, offset = affine[0].to(x.dtype).norm(dim=1), affine[1].to(x.dtype).abs()
        elif (bound := self.lipschitz()) is not None:
            offset = self(x.new_zeros(1, self.dim)).abs()[0]
            size = torch.full_like(offset, bound)
        else:
            return None
        return torch.stack([relative * offset + least, relative * size, torch.zeros_like(size)])

    def flip_distance(
        self, x: Tensor, over: Tensor, under: Tensor, *, precision: torch.dtype = torch.float64
    ) -> Tensor | None:
        r"""Bound from below how far x may move until logit ``under`` reaches logit ``over``: (N, P); None if unknown.

        The bound is the margin divided by the slope: the exact distance where the scorer is affine, else
        :math:`(s_{over} - s_{under})/(\sqrt2 L)` with L from ``lipschitz()``. In both cases the rounding error that
        ``rounding`` allows both logits is taken off. A scorer with a sharper bound overrides this method.

        Args:
            x: tokens (N, D), float64.
            over, under: experts (N, P), for P pairs of experts a token.
            precision: the dtype in which the router computes the logits, float32 or float64.
        """
        error = self.rounding(x, precision)
        if (affine := self.affine()) is not None and error is not None:
            return half_space_distance(*affine, x, over, under, error=error)
        if (bound := self.lipschitz()) is None or error is None:
            return None
        logits = self(x)
        gap = logits.gather(1, over) - logits.gather(1, under)
        return margin_over_slope(gap, torch.full_like(gap, 2**0.5 * bound), x, error[:, over] + error[:, under])


def gamma(terms: int, precision: torch.dtype) -> float:
    r"""Bound the relative error of a chain of n = ``terms`` rounded operations by :math:`nu/(1 - nu)`.

    Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: a sum of n products, taken in any order, is
    wrong by at most this times the sum of the products' absolute values. Here u is the unit roundoff of ``precision``
    plus that of float64, in which the error is checked.
    """
    unit = terms * (torch.finfo(precision).eps + torch.finfo(torch.float64).eps) / 2
    return unit / (1 - unit)


def half_space_distance(
    weight: Tensor, offset: Tensor, x: Tensor, over: Tensor, under: Tensor, *, error: Tensor
) -> Tensor:
    r"""Return the distance (N, P) from x (N, D) to where :math:`w_{over} x + o_{over} = w_{under} x + o_{under}`.

    Each side may be wrong by ``error`` (3, E), coefficients as in ``Scorer.rounding``, which shortens the distance.
    The distance of a tie is 0.
    """
    weight, offset = weight.to(x.dtype), offset.to(x.dtype)
    values, offsets = x @ weight.T + offset, offset.expand(x.shape[0], -1)
    slope = (weight[:, None] - weight).norm(dim=-1)[over, under]
    source = [torch.where(slope > 0, values.gather(1, e), offsets.gather(1, e)) for e in (over, under)]
    return margin_over_slope(source[0] - source[1], slope, x, error[:, over] + error[:, under])


def margin_over_slope(gap: Tensor, slope: Tensor, x: Tensor, error: Tensor) -> Tensor:
    r"""Return the largest r (N, P) with :math:`gap - slope\,r \ge c_0 + c_1 R + c_2 R^2`.

    R = |x| + r is the largest norm of a token that lies within r of x; c are the three coefficients in ``error``.
    """
    size = x.norm(dim=-1, keepdim=True)
    left = gap - error[0] - error[1] * size - error[2] * size.square()
    steep = slope + error[1] + 2 * error[2] * size
    return torch.where(left > 0, 2 * left / (steep + (steep.square() + 4 * error[2] * left).sqrt()), left.clamp_min(0))
