"""Whether a forward runs inside a transform of ``torch.func``, or with dual numbers."""

from __future__ import annotations

import torch
from torch.autograd import forward_ad

__all__ = ["transforming"]


def transforming() -> bool:
    """Whether ``torch.func`` (``grad``, ``jvp``, ``vmap``, ...) or a forward-mode ``dual_level`` is at work.

    Operators of our own know reverse mode only: there they give way to operations that every transform knows.
    ``torch.compile`` reads the answer while it traces, so a graph without transforms holds nothing of it.

    >>> torch.func.vmap(lambda x: x * transforming())(torch.ones(1)).item(), transforming()
    (1.0, False)
    """
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._functorch.get_dynamic_layer_stack_depth() > 0
