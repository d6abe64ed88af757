"""The steps of ``fused.py`` on one block of rows; each writes into buffers that exist already."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property

import torch
from torch import Tensor

from spectralmoe.dispatch.blocks import Block

__all__ = ["Bank"]


class Bank:
    """The weights of a feed-forward bank, and its steps on a block of rows.

    Args:
        up, down, up_bias, down_bias: as in ``FeedForward``, in the dtype of the tokens.
    """

    def __init__(
        self, up: Tensor, down: Tensor, up_bias: Tensor | None, down_bias: Tensor | None, activation: str
    ) -> None:
        self.up, self.down, self.up_bias, self.down_bias = up, down, up_bias, down_bias
        self.activation = activation

    @cached_property
    def upward(self) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """The first matrix (D, H) and bias of each expert, as views that are made once for all."""
        return self.up.mT.unbind(), None if self.up_bias is None else self.up_bias.unbind()

    @cached_property
    def downward(self) -> tuple[Sequence[Tensor], Sequence[Tensor] | None]:
        """The second matrix (H, D) and bias of each expert."""
        return self.down.mT.unbind(), None if self.down_bias is None else self.down_bias.unbind()

    def lift(self, block: Block, rows: Tensor, *, hidden: Tensor, act: Tensor, silu: Tensor | None = None) -> None:
        """Compute the hidden layer of rows before (``hidden``) and after (``act``) its activation."""
        block.multiply(rows, *self.upward, out=hidden)
        self.activate(hidden, silu, out=act)

    def lower(self, block: Block, act: Tensor, *, outputs: Tensor) -> None:
        """Compute the outputs from the activations."""
        block.multiply(act, *self.downward, out=outputs)

    def activate(self, hidden: Tensor, silu: Tensor | None, *, out: Tensor) -> None:
        """Apply the activation; for swiglu also write the silu of the gate to ``silu``, if given."""
        if self.activation == "gelu":
            torch.ops.aten.gelu.out(hidden, out=out)
        elif self.activation == "relu":
            torch.clamp_min(hidden, 0, out=out)
        else:
            gate, value = hidden.chunk(2, dim=1)
            torch.mul(torch.ops.aten.silu.out(gate, out=out if silu is None else silu), value, out=out)

    def activate_backward(self, d_act: Tensor, hidden: Tensor, silu: Tensor, *, scratch: Tensor, out: Tensor) -> None:
        """Compute the gradient of the hidden layer from that of the activations; ``scratch`` has ``d_act``'s shape."""
        if self.activation == "gelu":
            torch.ops.aten.gelu_backward.grad_input(d_act, hidden, grad_input=out)
        elif self.activation == "relu":
            torch.ops.aten.threshold_backward.grad_input(d_act, hidden, 0, grad_input=out)
        else:
            (gate, value), (d_gate, d_value) = hidden.chunk(2, dim=1), out.chunk(2, dim=1)
            torch.mul(d_act, silu, out=d_value)
            torch.ops.aten.silu_backward.grad_input(torch.mul(d_act, value, out=scratch), gate, grad_input=d_gate)
