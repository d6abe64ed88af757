"""Scorer: tokens -> logits. The part of a router that holds its geometry."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Self

import torch
from torch import Tensor

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.experts import Experts
from spectralmoe.linalg import EXACT_LIMIT, power_iteration, top_right
from spectralmoe.parts import Part
from spectralmoe.sharding import full
from spectralmoe.stacks import chosen_experts, copy_with

__all__ = ["Scorer", "gamma", "half_space_distance", "margin_over_slope"]

_REFRESH_STEPS = 2


class Scorer(Part):
    """Base of all scorers: ``forward(x (N, D), *, context=None) -> logits (N, E)``.

    A subclass keeps every constructor argument as an attribute of the same name (saving reads the spec back from
    the signature) and casts its parameters to ``x.dtype``, so that float64 tokens give float64 logits.

    Raises:
        UserError: ``dim`` or ``num_experts`` is not a positive integer.
    """

    rows: tuple[str, ...] = ()
    """Names of the parameters and buffers with one row an expert, where a logit reads its own rows alone."""

    top_direction: Tensor | None

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.dim, self.num_experts = dim, num_experts
        self.register_buffer("top_direction", None, persistent=False)

    def __call__(self, x: Tensor, *, context: Rows | None = None) -> Tensor:
        logits: Tensor = super().__call__(x, context=context)
        return logits

    def meet(self, experts: Experts) -> None:
        """Called once by the layer with its bank; a scorer that reads the experts keeps a reference to them.

        A wrapper of a scorer passes it on.
        """

    def select(self, indices: Sequence[int] | Tensor) -> Self:
        """A scorer of the experts ``indices`` alone, in this order: what is left has the logits that it had.

        Takes the ``rows`` of these experts; a scorer whose logits depend on more than their rows overrides it.

        Raises:
            UserError: no index, or one out of range; a scorer that names no rows.
        """
        if not self.rows:
            raise UserError(
                f"{type(self).__name__} cannot be cut down to some of its experts: it names no rows of theirs"
            )
        stacks = [stack for name in self.rows if (stack := getattr(self, name)) is not None]
        chosen = chosen_experts(f"{type(self).__name__}.select", indices, self.num_experts)
        return self._cut(chosen, {stack: stack.detach()[chosen] for stack in stacks})

    def _cut(self, chosen: list[int], tensors: Mapping[Tensor, Tensor]) -> Self:
        """A copy for the chosen experts, with other tensors in the place of some."""
        scorer = copy_with(self, tensors)
        scorer.num_experts, scorer.top_direction = len(chosen), None
        return scorer

    @property
    def matrix(self) -> Tensor | None:
        """What the spectral terms look at, one row an expert; None where there is no such matrix."""
        return None

    def affine(self) -> tuple[Tensor, Tensor] | None:
        """(A (E, D), b (E,)) with logits = x A' + b up to a shift common to all experts; None if not affine."""
        return None

    def lipschitz(self) -> float | None:
        """A global Lipschitz constant of the logits in x, up to a shift common to all experts; None if unknown."""
        return None

    def rounding(self, x: Tensor, precision: torch.dtype) -> Tensor | None:
        r"""How wrong the logits are when they are computed in ``precision``: coefficients c (3, E); None if unknown.

        Logit e of a token y, wherever it lies, is wrong by at most
        :math:`c_{0e} + c_{1e}\|y\| + c_{2e}\|y\|^2`, up to a shift common to all experts. That of an inner product
        over D terms where the scorer is affine; where it has a ``lipschitz()`` bound alone, it is taken to round as
        such a product does: a scorer that rounds worse overrides it.

        Args:
            x: tokens (N, D) of the device and precision in which the coefficients are wanted.
            precision: of the tokens that the router sees, float32 or float64.
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
        r"""How far x may move before logit ``under`` reaches logit ``over``: a lower bound (N, P); None if unknown.

        Margin over slope: exact where the scorer is affine, else
        :math:`(s_{over} - s_{under})/(\sqrt2 L)` with L from ``lipschitz()``; less what ``rounding`` may do to both
        logits. A scorer with a sharper bound of its own overrides it.

        Args:
            x: tokens (N, D), float64.
            over, under: experts (N, P), P pairs a token.
            precision: in which the router computes the logits, float32 or float64.
        """
        error = self.rounding(x, precision)
        if (affine := self.affine()) is not None and error is not None:
            return half_space_distance(*affine, x, over, under, error=error)
        if (bound := self.lipschitz()) is None or error is None:
            return None
        logits = self(x)
        gap = logits.gather(1, over) - logits.gather(1, under)
        return margin_over_slope(gap, torch.full_like(gap, 2**0.5 * bound), x, error[:, over] + error[:, under])

    def after_step(self) -> None:
        super().after_step()
        self.refresh_spectrum()

    def spectral_direction(self) -> Tensor | None:
        """Warm start of the leading right singular vector of ``matrix``; None where the spectrum is exact."""
        matrix = self.matrix
        if matrix is None or min(matrix.shape) <= EXACT_LIMIT:
            return None
        if self.top_direction is None:
            self.refresh_spectrum()
        return self.top_direction

    @torch.no_grad()
    def refresh_spectrum(self) -> None:
        """Move the kept direction of a large ``matrix`` by a few power iterations; small ones need none.

        It starts exact, and starts again where the iteration has nothing to go by (a matrix that was zero so far).
        """
        matrix = self.matrix
        if matrix is None or min(matrix.shape) <= EXACT_LIMIT:
            return
        whole, v = full(matrix), self.top_direction
        if v is not None:
            v = power_iteration(whole, v, _REFRESH_STEPS)
        self.top_direction = top_right(whole) if v is None or not v.any() else v


def gamma(terms: int, precision: torch.dtype) -> float:
    r"""Relative error of a chain of so many rounded operations: :math:`nu/(1 - nu)`, u the unit roundoff.

    Higham, "Accuracy and Stability of Numerical Algorithms", section 3.1: a sum of n products is wrong by at most this
    times the sum of the sizes, in whatever order it is taken. Here u is that of ``precision`` and of the float64 of
    whoever checks it, together.
    """
    unit = terms * (torch.finfo(precision).eps + torch.finfo(torch.float64).eps) / 2
    return unit / (1 - unit)


def half_space_distance(
    weight: Tensor, offset: Tensor, x: Tensor, over: Tensor, under: Tensor, *, error: Tensor
) -> Tensor:
    r"""Distance (N, P) of x (N, D) from where :math:`w_{over} x + o_{over} > w_{under} x + o_{under}` ends.

    Both sides may be wrong by ``error`` (3, E), coefficients as in ``Scorer.rounding``. 0 for a tie.
    """
    weight, offset = weight.to(x.dtype), offset.to(x.dtype)
    values, offsets = x @ weight.T + offset, offset.expand(x.shape[0], -1)
    slope = (weight[:, None] - weight).norm(dim=-1)[over, under]
    source = [torch.where(slope > 0, values.gather(1, e), offsets.gather(1, e)) for e in (over, under)]
    return margin_over_slope(source[0] - source[1], slope, x, error[:, over] + error[:, under])


def margin_over_slope(gap: Tensor, slope: Tensor, x: Tensor, error: Tensor) -> Tensor:
    r"""The largest r (N, P) with :math:`gap - slope\,r \ge c_0 + c_1 R + c_2 R^2`, R = |x| + r, c of ``error``."""
    size = x.norm(dim=-1, keepdim=True)
    left = gap - error[0] - error[1] * size - error[2] * size.square()
    steep = slope + error[1] + 2 * error[2] * size
    return torch.where(left > 0, 2 * left / (steep + (steep.square() + 4 * error[2] * left).sqrt()), left.clamp_min(0))
