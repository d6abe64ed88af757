"""The gate: a candidate is timed only if it gives what ``dispatch="loop"`` gives."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

__all__ = ["TOLERANCE", "difference"]

TOLERANCE = {torch.float64: 1e-10, torch.float32: 3e-5, torch.bfloat16: 6e-2, torch.float16: 5e-3}
"""The largest error of an element, as a share of the largest element: of the arithmetic in each dtype."""


def difference(found: Mapping[str, Tensor | None], truth: Mapping[str, Tensor], dtype: torch.dtype) -> str | None:
    """None if ``found`` agrees with ``truth`` (float64); else the difference in a few words.

    >>> right = {"output": torch.ones(2).double()}
    >>> difference({"output": torch.ones(2)}, right, torch.float32)
    >>> difference({"output": torch.tensor([1.0, 1.1])}, right, torch.float32)
    'output is off by 1.0e-01 (at most 3e-05 in float32)'
    """
    for name, right in truth.items():
        given = found.get(name)
        if given is None or given.shape != right.shape:
            return f"{name} has shape {None if given is None else list(given.shape)}, not {list(right.shape)}"
        error = (given.detach().double() - right).abs().max() / right.abs().max().clamp_min(1e-30)
        if not error <= TOLERANCE[dtype]:  # nan is an error
            kind = str(dtype).removeprefix("torch.")
            return f"{name} is off by {float(error):.1e} (at most {TOLERANCE[dtype]:.0e} in {kind})"
    return None
