"""Load metrics: pure functions of one layer's load vector (E,), the share of the load that each expert carries.

All read ``Routing.load()``. An all-zero load (no token seen) has no metric: nan (all experts dead), never "balanced".
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["DEAD_SHARE", "dead_experts", "gini", "max_vio", "min_share"]

DEAD_SHARE = 0.1
"""An expert is dead when it carries less than this share of an even load."""


def max_vio(load: Tensor) -> float:
    """MaxVio: largest load over the mean load, minus 1; 0 is even, E - 1 is collapse (arXiv 2408.15664).

    >>> max_vio(torch.tensor([0.5, 0.25, 0.25, 0.0]))
    1.0
    """
    return float(load.max() / load.mean() - 1) if load.sum() else float("nan")


def gini(load: Tensor) -> float:
    """Gini coefficient: 0 is even, (E - 1)/E is collapse.

    >>> gini(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    0.75
    """
    e = load.numel()
    rank = torch.arange(1, e + 1, dtype=load.dtype, device=load.device)
    ordered = load.sort().values
    return float(2 * (rank * ordered).sum() / (e * ordered.sum()) - (e + 1) / e) if load.sum() else float("nan")


def dead_experts(load: Tensor) -> int:
    """How many experts carry less than ``DEAD_SHARE`` of an even load.

    >>> dead_experts(torch.tensor([0.5, 0.49, 0.01, 0.0]))
    2
    """
    return int((load < DEAD_SHARE / load.numel()).sum())


def min_share(load: Tensor) -> float:
    """The smallest share that an expert carries (1/E is even)."""
    return float(load.min()) if load.sum() else float("nan")
