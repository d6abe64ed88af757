"""Dispatch: how tokens reach their experts. Three forms of one sum, equal in value and gradient."""

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.dispatch.dense import Dense
from spectralmoe.dispatch.grouped import Grouped
from spectralmoe.dispatch.loop import Loop
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing

__all__ = ["DISPATCHES", "Dense", "Dispatch", "Grouped", "Loop", "pick_dispatch"]

DISPATCHES: dict[str, type[Dispatch]] = {"loop": Loop, "dense": Dense, "grouped": Grouped}


def pick_dispatch(routing: Routing, experts: Experts) -> Dispatch:
    """The fastest form for this call: dense where every token uses every expert (K = E), else grouped."""
    return Dense() if routing.soft else Grouped()
