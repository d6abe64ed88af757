"""Together: several optimizers that act as one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.optim import Optimizer

from spectralmoe.errors import UserError

__all__ = ["Together"]


class Together(Optimizer):
    """Combines several optimizers into one, which steps them one after the other.

    The parts share its ``param_groups`` and its ``state``, so schedulers, ``attach``, gradient scalers and checkpoints
    see one optimizer. Its groups come in the order of the parts.

    Args:
        parts: optimizers of different parameters.

    Raises:
        UserError: a group is added later, which no part would train.

    >>> matrix, vector = torch.nn.Parameter(torch.ones(2, 2)), torch.nn.Parameter(torch.ones(2))
    >>> both = Together(torch.optim.SGD([matrix], lr=0.5), torch.optim.AdamW([vector], lr=0.1, weight_decay=0.0))
    >>> (matrix.sum() + vector.sum()).backward()
    >>> both.step()
    >>> matrix[0, 0].item(), round(vector[0].item(), 4)
    (0.5, 0.9)
    """

    def __init__(self, *parts: Optimizer) -> None:
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        """Give the parts this optimizer's state and groups, which loading a state replaces."""
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state = self.state
            part.param_groups = [next(groups) for _ in part.param_groups]

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group of one of the parts; only the constructor does so."""
        if not any(param_group is group for part in self.parts for group in part.param_groups):
            raise UserError("Together: no part would train this group; add it to a part before they are put together")
        super().add_param_group(param_group)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Take one step with each part; a closure runs once, before the first."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "parts": self.parts}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()
