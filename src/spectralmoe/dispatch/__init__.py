"""Dispatch: how tokens reach their experts. Three forms of one sum, equal in value and gradient."""

import torch

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.dispatch.dense import Dense
from spectralmoe.dispatch.grouped import Grouped
from spectralmoe.dispatch.loop import Loop
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing

__all__ = ["DISPATCHES", "Dense", "Dispatch", "Grouped", "Loop", "pick_dispatch"]

_SMALL = 2**18  # numbers in a bank

DISPATCHES: dict[str, type[Dispatch]] = {"loop": Loop, "dense": Dense, "grouped": Grouped}


def pick_dispatch(routing: Routing, experts: Experts) -> Dispatch:
    """The fastest form for this call: dense where every token uses every expert (K = E), else grouped.

    A single token on a CPU (a decoding step, a correction) goes to its experts one after the other: there is nothing to
    sort. Not with gradients of a large bank, of which each slot would make its own.
    """
    if routing.soft:
        return Dense()
    alone = routing.indices.shape[0] == 1 and routing.indices.device.type == "cpu"
    if not alone or torch.compiler.is_compiling():
        return Grouped()
    small = not torch.is_grad_enabled() or sum(part.numel() for part in experts.parameters()) <= _SMALL
    return Loop() if small else Grouped()
