"""Part: what scorers, selectors, banks of experts and their wrappers share, a life around the optimizer step."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from spectralmoe.context import Rows
from spectralmoe.errors import UserError
from spectralmoe.linalg import retracted
from spectralmoe.sharding import assign_

__all__ = ["Part", "in_full_precision"]


class Part(nn.Module):
    """Base of scorers, selectors, banks and what wraps them: state that moves at the optimizer step alone.

    After each step every part of a layer, those inside other parts too, goes through ``statistics`` (summed over
    micro-batches and ranks), ``update`` with the sums, and ``after_step``. A wrapper forwards none of them.

    >>> class Mean(Part):  # of the tokens that its layer saw
    ...     streams_tokens = True
    ...
    ...     def statistics(self, tokens, counts):
    ...         return torch.cat([tokens.sum(0), tokens.new_tensor([len(tokens)])])
    ...
    ...     def update(self, statistics):
    ...         self.mean = statistics[:-1] / statistics[-1]
    >>> part = Mean()
    >>> part.update(part.statistics(torch.eye(2), torch.zeros(3)))
    >>> part.mean.tolist()
    [0.5, 0.5]
    """

    manifold: tuple[str, ...] = ()
    """Names of the parameters (..., D, R) with orthonormal columns: no weight decay, retracted after the step."""

    streams_tokens = False
    """Whether records keep the tokens of training forwards, for ``statistics``; read of scorers and banks."""

    reads: tuple[str, ...] = ()
    """Names of the side information that ``read`` asks for; experts get it in this order behind their rows."""

    @property
    def is_frozen(self) -> bool:
        """Whether nothing moves after a step: there are parameters, and none of them takes a gradient.

        A part that moves by statistics alone says so by ``is_frozen = False``.
        """
        gradients = [parameter.requires_grad for parameter in self.parameters()]
        return bool(gradients) and not any(gradients)

    def read(self, context: Rows | None, name: str, tokens: int, width: int | None = None) -> Tensor:
        """The side information ``name``, one vector a token: (N, P).

        Args:
            tokens: N.
            width: the P that is expected; None: any.

        Raises:
            UserError: it is not there, of another number of rows, or of another width.
        """
        who = f"{type(self).__name__} reads {name!r} from the context, which"
        if context is None or name not in context:
            there = ", ".join(context or {}) or "nothing"
            raise UserError(
                f"{who} holds {there}; pass context=Context(tokens={{{name!r}: ...}}) or Context(samples=...) to the "
                "layer or to feed()"
            )
        value = context[name]
        if value.shape[:1] != (tokens,):
            raise UserError(
                f"{who} has it in shape {tuple(value.shape)}, not as one row for each of {tokens} tokens; "
                "Context(samples=...) spreads values of samples"
            )
        vectors = value.unsqueeze(-1) if value.dim() == 1 else value.flatten(1)
        if width is not None and vectors.shape[1] != width:
            raise UserError(f"{who} has it {vectors.shape[1]} wide, not {width}")
        return vectors

    def statistics(self, tokens: Tensor, counts: Tensor) -> Tensor | None:
        """What one training forward adds to running statistics: sums, of one shape whatever the tokens.

        None: there are none to keep. It is also asked with no tokens and counts of 0.

        Args:
            tokens: the real tokens that the router read (N, D), without gradient; (0, D) where no part streams them.
            counts: (E,) int64, slots of each expert by the router's own choice; 0 where the choice was replayed.
        """
        return None

    def update(self, statistics: Tensor) -> None:
        """Called once after each optimizer step, before ``after_step``, where there are statistics."""

    def after_step(self) -> None:
        """Called once after each optimizer step, without gradient. A subclass that overrides it calls super."""
        self.retract(trained_only=True)

    @torch.no_grad()
    def retract(self, *, trained_only: bool = False) -> None:
        """Put the parameters in ``manifold`` back on it, by QR; those that are on it up to rounding keep their bits.

        Args:
            trained_only: leave parameters without gradient alone.
        """
        for basis in (getattr(self, name) for name in self.manifold):
            if basis.requires_grad or not trained_only:
                assign_(basis, retracted(basis))


def in_full_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """``fn``, what ``Module._apply`` does to each tensor, but for a cast to 16 bits: then the tensor moves alone."""

    def keep_precision(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype in (torch.float16, torch.bfloat16):
            return tensor.to(device=moved.device, dtype=torch.float32)
        return moved

    return keep_precision
