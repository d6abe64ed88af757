"""Scorer: tokens -> logits. The part of a router that holds its geometry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.linalg import EXACT_LIMIT, power_iteration, retracted, top_right
from spectralmoe.sharding import assign_, full

if TYPE_CHECKING:
    from spectralmoe.tape import Record

__all__ = ["Scorer", "half_space_distance"]

_REFRESH_STEPS = 2


class Scorer(nn.Module):
    """Base of all scorers: ``forward(x (N, D), *, context=None) -> logits (N, E)``.

    A subclass keeps every constructor argument as an attribute of the same name (saving reads the spec back from
    the signature) and casts its parameters to ``x.dtype``, so that float64 tokens give float64 logits.

    Raises:
        UserError: ``dim`` or ``num_experts`` is not a positive integer.
    """

    manifold: tuple[str, ...] = ()
    """Names of the parameters (D, R) with orthonormal columns: no weight decay, retracted after the step."""

    streams_tokens = False
    """Whether records keep the tokens of training forwards, for ``statistics``."""

    top_direction: Tensor | None

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        for name, value in (("dim", dim), ("num_experts", num_experts)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        self.dim, self.num_experts = dim, num_experts
        self.register_buffer("top_direction", None, persistent=False)

    def __call__(self, x: Tensor, *, context: dict[str, Any] | None = None) -> Tensor:
        logits: Tensor = super().__call__(x, context=context)
        return logits

    @property
    def is_frozen(self) -> bool:
        """Whether nothing moves after a step: there are parameters, and none of them takes a gradient.

        A scorer that moves by statistics alone says so by ``is_frozen = False``.
        """
        gradients = [parameter.requires_grad for parameter in self.parameters()]
        return bool(gradients) and not any(gradients)

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

    def flip_distance(self, x: Tensor, over: Tensor, under: Tensor) -> Tensor | None:
        r"""How far x may move before logit ``under`` reaches logit ``over``: a lower bound (N, P); None if unknown.

        Margin over slope: exact where the scorer is affine, else
        :math:`(s_{over} - s_{under})/(\sqrt2 L)` with L from ``lipschitz()``. A scorer with a sharper bound of its own
        overrides it.

        Args:
            x: tokens (N, D).
            over, under: experts (N, P), P pairs a token.
        """
        if (affine := self.affine()) is not None:
            return half_space_distance(*affine, x, over, under)
        if (bound := self.lipschitz()) is None:
            return None
        logits = self(x)
        gap = logits.gather(1, over) - logits.gather(1, under)
        return torch.where(gap > 0, gap / (2**0.5 * bound), 0 * gap)

    def before_step(self, records: Sequence[Record]) -> None:
        """Called once before each optimizer step, with what this step's forwards recorded."""

    def statistics(self, records: Sequence[Record]) -> Tensor | None:
        """What the tokens of this step add to running statistics: sums, of one shape whatever the records.

        ``update`` gets them summed over all ranks. None: there are none to keep. Statistics of choices, not of tokens,
        leave out records whose choice was replayed (``record.routing.live`` is set).
        """
        return None

    def update(self, statistics: Tensor) -> None:
        """Called once after each optimizer step, before ``after_step``, where there are statistics."""

    def after_step(self, records: Sequence[Record]) -> None:
        """Called once after each optimizer step, without gradient. A subclass that overrides it calls super."""
        self.retract(trained_only=True)
        self.refresh_spectrum()

    @torch.no_grad()
    def retract(self, *, trained_only: bool = False) -> None:
        """Put the parameters in ``manifold`` back on it, by QR; those that are on it up to rounding keep their bits.

        Args:
            trained_only: leave parameters without gradient alone.
        """
        for basis in (getattr(self, name) for name in self.manifold):
            if basis.requires_grad or not trained_only:
                assign_(basis, retracted(basis))

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


def half_space_distance(weight: Tensor, offset: Tensor, x: Tensor, over: Tensor, under: Tensor) -> Tensor:
    r"""Distance (N, P) of x (N, D) from where :math:`w_{over} x + o_{over} > w_{under} x + o_{under}` ends.

    0 for a tie, infinite where the rows w are equal and the offsets o decide.
    """
    weight, offset = weight.to(x.dtype), offset.to(x.dtype)
    values, offsets = x @ weight.T + offset, offset.expand(x.shape[0], -1)
    slope = (weight[:, None] - weight).norm(dim=-1)[over, under]
    source = [torch.where(slope > 0, values.gather(1, e), offsets.gather(1, e)) for e in (over, under)]
    gap = source[0] - source[1]
    return torch.where(gap > 0, gap / slope, 0 * gap)
