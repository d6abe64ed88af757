"""Experts: a bank of E networks D -> D that sees rows sorted by expert."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.parts import Part

__all__ = ["Answer", "Experts", "per_row"]


class Answer(NamedTuple):
    """What experts make of rows (M, *S), where it is more than rows of the same shape.

    Attributes:
        y: (M, *S).
        gain: (M,), multiplies the combine weight of each row; None: 1.
        said: what they say of themselves, name -> (M, ...); ``record(model, keep=name)`` keeps it.
    """

    y: Tensor
    gain: Tensor | None = None
    said: dict[str, Tensor] | None = None

    @property
    def gained(self) -> Tensor:
        """The rows times their gain (M, *S)."""
        return self.y if self.gain is None else self.y * per_row(self.gain.to(self.y.dtype), self.y)


class Experts(Part):
    """Base of all expert banks. A subclass must define ``expert`` or ``answer``; the rest has slow, correct defaults.

    Rows are (M, D), or (M, *S) where the layer routes wider units (``spectralmoe.units``). A bank whose experts have a
    hidden layer defines ``hidden`` and ``project`` as well, so that the hidden activations can be recorded.
    """

    row_dims: int | None = None
    """How many dimensions a row has: 1 for (D,), 3 for (C, H, W); None: any."""

    says: tuple[str, ...] = ()
    """The names of what its answers say of themselves."""

    def __init__(self, num_experts: int) -> None:
        super().__init__()
        if num_experts < 1:
            raise UserError(f"{type(self).__name__}: num_experts must be at least 1, got {num_experts}")
        self.num_experts = num_experts

    def expert(self, x: Tensor, e: int) -> Tensor:
        """The definition: expert ``e`` applied to x (M, *S) -> (M, *S), gain included."""
        if type(self).answer is Experts.answer:
            raise NotImplementedError
        return self.answer(x, e).gained

    def answer(self, x: Tensor, e: int) -> Answer:
        """The same with its gain apart, and with what the expert says of itself; for banks that have either."""
        return Answer(self.expert(x, e))

    def forward(self, x: Tensor, counts: Tensor) -> Tensor | Answer:
        """All experts on rows sorted by expert: x (M, *S), counts (E,) int64 -> (M, *S), or an ``Answer``.

        An expert without rows gets an empty batch: its gradient is zero then and not missing, which DDP would take for
        an unused parameter.
        """
        sizes = counts.tolist()
        *blocks, rest = x.split([*sizes, x.shape[0] - sum(sizes)])
        answers = [self.answer(block, e) for e, block in enumerate(blocks)]
        y = _joined([answer.y for answer in answers], len(rest))
        gains = [answer.gain for answer in answers if answer.gain is not None]
        said = {name: [(answer.said or {})[name] for answer in answers] for name in answers[0].said or {}}
        if not gains and not said:
            return y
        told = {name: _joined(values, len(rest)) for name, values in said.items()}
        return Answer(y, _joined(gains, len(rest)) if gains else None, told)

    def mix(self, x: Tensor, weights: Tensor) -> Tensor:
        """The dense form: sum_e weights[:, e] * expert_e(x), for x (N, *S) and weights (N, E)."""
        outputs = [per_row(weights[:, e], x) * self.expert(x, e) for e in range(self.num_experts)]
        return torch.stack(outputs).sum(0)

    def hidden(self, x: Tensor, counts: Tensor) -> Tensor | None:
        """Hidden activations (M, H) of rows sorted by expert; None if the bank has none to show.

        Where there are any, ``forward(x)`` must be ``project(hidden(x))``, gain included.
        """
        return None

    def project(self, hidden: Tensor, counts: Tensor) -> Tensor | Answer:
        """What ``forward`` returns, from what ``hidden`` returned."""
        raise NotImplementedError

    def expert_parameters(self, e: int) -> dict[str, Tensor]:
        """Views of the parameters that belong to expert ``e`` alone; empty: it cannot be adapted alone."""
        return {}

    def costs(self, shape: Sequence[int] = ()) -> Tensor:
        """Floating-point operations of each expert on one row, (E,) float64; multiply and add are two.

        By default two for each number of the expert's own matrices, which every row meets once.

        Args:
            shape: of a row (*S), for banks whose work depends on it.

        Raises:
            UserError: a bank without ``expert_parameters``, which has to say it itself.
        """
        owned = [self.expert_parameters(e).values() for e in range(self.num_experts)]
        if not all(owned):
            raise UserError(f"{type(self).__name__} does not say what its experts cost; define costs()")
        numbers = [sum(part.numel() for part in parts if part.dim() > 1) for parts in owned]
        return 2 * torch.tensor(numbers, dtype=torch.float64)


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """``values`` (M,) with as many dimensions as ``rows`` (M, *S), to be multiplied with them."""
    return values.reshape(-1, *[1] * (rows.dim() - 1))


def _joined(parts: list[Tensor], rest: int) -> Tensor:
    """The rows of all experts, and zeros for ``rest`` rows of nobody."""
    return torch.cat([*parts, parts[0].new_zeros(rest, *parts[0].shape[1:])])
