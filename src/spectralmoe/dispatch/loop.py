"""Loop dispatch: two plain loops over tokens and slots, against which the other dispatches are tested."""

from __future__ import annotations

import torch
from torch import Tensor

from spectralmoe.dispatch.base import Dispatch
from spectralmoe.dispatch.dense import Dense
from spectralmoe.experts import Experts
from spectralmoe.routing import Routing
from spectralmoe.torch_private import transforming

__all__ = ["Loop"]


class Loop(Dispatch):
    r"""Computes :math:`y_t = \sum_j w_{tj} E_{i_{tj}}(x_t)` by its definition, one token and one slot at a time.

    It takes any dtype and any bank, and is slow: the other dispatches are tested against it. Inside the transforms of
    ``torch.func`` ``Dense`` runs instead.
    """

    def __call__(self, x: Tensor, routing: Routing, experts: Experts) -> Tensor:
        if transforming():
            return Dense()(x, routing, experts)
        outputs = [experts.expert(x[:0], 0).to(x.dtype) if experts.reshapes else x[:0]]
        zero = x.new_zeros(1, *outputs[0].shape[1:])
        for token, chosen in enumerate(routing.indices.tolist()):
            row = x[token : token + 1]
            y = zero
            for slot, e in enumerate(chosen):
                if 0 <= e < experts.num_experts:
                    y = y + routing.weights[token, slot].to(x.dtype) * experts.expert(row, e).to(x.dtype)
            outputs.append(y)
        return torch.cat(outputs)
