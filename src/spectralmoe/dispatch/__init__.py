"""A dispatch brings tokens to their experts and adds up the outputs; its three forms agree in value and gradient."""

import torch
from torch import Tensor

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.dispatch.dense import Dense
from spectralmoe.dispatch.fused import can_fuse
from spectralmoe.dispatch.grouped import Grouped
from spectralmoe.dispatch.loop import Loop
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing
from spectralmoe.torch_private import transforming

__all__ = ["DISPATCHES", "Dense", "Dispatch", "Grouped", "Loop", "pick_dispatch"]

_SMALL = 2**18  # numbers in a bank

DISPATCHES: dict[str, type[Dispatch]] = {"loop": Loop, "dense": Dense, "grouped": Grouped}


def pick_dispatch(routing: Routing, experts: Experts) -> Dispatch:
    """Return the fastest dispatch for this call, which ``dispatch="auto"`` uses.

    It is ``Dense`` if every token uses every expert (soft routing), and inside the transforms of ``torch.func``;
    ``Loop`` for a single token of a plain ``FeedForward`` bank on a CPU, such as a decoding step, where there is
    nothing to sort; and ``Grouped`` otherwise.
    """
    if routing.soft or transforming():
        return Dense()
    return Loop() if _one_by_one(routing, experts) else Grouped()


def _one_by_one(routing: Routing, experts: Experts) -> bool:
    indices = routing.indices
    if torch.compiler.is_compiling() or len(indices) != 1 or type(indices) is not Tensor:
        return False
    if not can_fuse(experts, indices):
        return False
    if not torch.is_grad_enabled():
        return True
    # the loop's backward makes a gradient of the whole bank for each slot, so only small banks;
    # and with no expert chosen it would leave the bank without gradients, which DDP waits for
    small = sum(part.numel() for part in experts.parameters()) <= _SMALL
    return small and bool(((indices >= 0) & (indices < experts.num_experts)).any())
