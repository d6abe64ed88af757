"""Answer: what a bank returns if its experts give more than outputs; and rows of many experts as one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Answer", "joined", "per_row"]


class Answer(NamedTuple):
    """What a bank returns if its experts give more than outputs: a weight of their own, or values to be recorded.

    Attributes:
        y: the outputs (M, *S).
        gain: (M,), a factor for the combine weight of each row; None is 1.
        said: further values by name, each (M, ...); ``record(model, keep=name)`` keeps them.
    """

    y: Tensor
    gain: Tensor | None = None
    said: dict[str, Tensor] | None = None

    @property
    def gained(self) -> Tensor:
        """The outputs times their gain (M, *S)."""
        return self.y if self.gain is None else self.y * per_row(self.gain.to(self.y.dtype), self.y)


def per_row(values: Tensor, rows: Tensor) -> Tensor:
    """Give ``values`` (M,) as many dimensions as ``rows`` (M, *S), so that they multiply row by row."""
    return values.reshape(-1, *[1] * (rows.dim() - 1))


def joined(answers: Sequence[Answer], rest: int) -> Tensor | Answer:
    """The answers of all experts as one; rows alone if the answers hold nothing else.

    The last ``rest`` rows, which belong to no expert, are zeros.

    >>> joined([Answer(torch.ones(1, 2)), Answer(torch.full((1, 2), 2.0))], 1).tolist()
    [[1.0, 1.0], [2.0, 2.0], [0.0, 0.0]]
    """
    y = _stacked([answer.y for answer in answers], rest)
    gains = [answer.gain for answer in answers if answer.gain is not None]
    said = {name: [(answer.said or {})[name] for answer in answers] for name in answers[0].said or {}}
    if not gains and not said:
        return y
    told = {name: _stacked(values, rest) for name, values in said.items()}
    return Answer(y, _stacked(gains, rest) if gains else None, told)


def _stacked(parts: list[Tensor], rest: int) -> Tensor:
    """The rows of all experts, and zeros for the last ``rest`` rows, which belong to no expert."""
    return torch.cat([*parts, parts[0].new_zeros(rest, *parts[0].shape[1:])])
