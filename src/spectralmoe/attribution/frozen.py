"""The final norm with fixed statistics, and the log-probability of a target that is computed through it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from spectralmoe.errors import UserError

__all__ = ["Readout", "frozen_norm"]

_NUMBERS = 2**25  # logits at a time


def frozen_norm(norm: nn.Module, states: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    r"""Return the affine map that an RMSNorm or a LayerNorm becomes if its statistics are those of ``states`` (B, D).

    .. math:: v \mapsto k_b\, w \odot (v - \mu_b) + \beta

    k and mu are those of token b (mu = 0 for an RMSNorm). They are found by calling the norm, so it does not matter how
    a family of models names its weight, or whether it adds 1 to it.

    Returns:
        A function of vectors (R, D) and of the tokens (R,) that they belong to.

    Raises:
        UserError: the norm is of another kind.
    """
    ones = torch.ones_like(states[0])
    shift = wide(norm, torch.zeros_like(ones))
    centres = bool((wide(norm, ones) - shift).abs().max() < 1e-3 * (wide(norm, states[0]) - shift).abs().max())
    probe = torch.where(torch.arange(len(ones), device=ones.device) % 2 == 0, ones, -ones)
    probe = probe - probe.mean() if centres else ones
    weight = (wide(norm, probe) - shift) / probe
    means = states.mean(-1, keepdim=True) if centres else states.new_zeros(len(states), 1)
    normed, scaled = wide(norm, states), (states - means) * weight
    scale = ((normed - shift) * scaled).sum(-1, keepdim=True) / scaled.square().sum(-1, keepdim=True)
    off = (scale * scaled + shift - normed).abs().amax()
    if not off <= 1e-3 * normed.abs().amax():
        raise UserError(f"attribute_experts: norm is a {type(norm).__name__}, which is no RMSNorm or LayerNorm")
    return lambda vectors, token: scale[token] * (vectors - means[token]) * weight + shift


def wide(function: Callable[[Tensor], Tensor], values: Tensor) -> Tensor:
    """Call ``function`` on ``values``; if it is a module, its parameters are cast to their dtype."""
    if not isinstance(function, nn.Module):
        return function(values)
    tensors = [*function.named_parameters(), *function.named_buffers()]
    cast = {name: tensor.to(values.dtype) for name, tensor in tensors if tensor.is_floating_point()}
    made: Any = functional_call(function, cast, (values,))
    return made  # type: ignore[no-any-return]


class Readout:
    """Computes the log-probability of each token's target from states of the residual stream.

    Args:
        norm: the final norm; its statistics are fixed to those of ``states``.
        unembed: a function from vectors (R, D) to logits (R, V).
        states: what the final norm read in the forward (B, D).
        target: the id of each sequence's next token (B,).
    """

    def __init__(self, norm: nn.Module, unembed: Callable[[Tensor], Tensor], states: Tensor, target: Tensor) -> None:
        self.norm, self.unembed, self.target = frozen_norm(norm, states), unembed, target
        self.vocabulary = wide(unembed, wide(norm, states[:1])).shape[-1]
        if wrong := [int(t) for t in target if not 0 <= t < self.vocabulary]:
            raise UserError(
                f"attribute_experts: target {wrong[0]} is no token of a vocabulary of 0 to {self.vocabulary - 1}"
            )
        self.log_prob = self(states, torch.arange(len(states), device=states.device))

    def __call__(self, states: Tensor, token: Tensor) -> Tensor:
        """Return log p (R,) for states (R, D) that belong to the tokens (R,)."""
        parts = []
        rows = max(1, _NUMBERS // self.vocabulary)
        for state, of in zip(states.split(rows), token.split(rows), strict=True):
            logits = wide(self.unembed, self.norm(state, of))
            parts.append(logits.log_softmax(-1).gather(1, self.target[of, None]).squeeze(1))
        return torch.cat(parts) if parts else states.new_zeros(0)
