"""Part: the base class of scorers, selectors and banks of experts; it does their work after an optimizer step."""

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
    """The base class of scorers, selectors and banks of experts, the parts of an MoE layer.

    A part may have state that moves after each optimizer step. Then ``statistics`` is called for each forward of
    training, ``update`` with its sums over micro-batches and ranks, and ``after_step``; ``attach`` or
    ``spectralmoe.after_step`` does so for all parts of a model, also for those that another part wraps. A wrapper
    forwards none of these calls.

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
    """Names of the parameters (..., D, R) whose columns are kept orthonormal; they get no weight decay."""

    streams_tokens = False
    """Whether ``statistics`` needs the tokens of training forwards; scorers and banks may set it."""

    reads: tuple[str, ...] = ()
    """Names of the side information that the part reads; experts get it behind their rows, in this order."""

    @property
    def is_frozen(self) -> bool:
        """Whether the part is frozen: it has parameters, and none takes a gradient. Then nothing moves after a step.

        A part that shall move by statistics alone sets ``is_frozen = False``.
        """
        gradients = [parameter.requires_grad for parameter in self.parameters()]
        return bool(gradients) and not any(gradients)

    def read(self, context: Rows | None, name: str, tokens: int, width: int | None = None) -> Tensor:
        """Return the side information ``name``, one vector for each token: (N, P).

        Args:
            tokens: N.
            width: the expected P; None takes any.

        Raises:
            UserError: the context has none of this name, or it has another number of rows or another width.
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
        """Return what one training forward adds to running statistics: sums, whose shape does not depend on N.

        None means that the part has no statistics. It is also called with no tokens and counts of 0.

        Args:
            tokens: the real tokens that the router read (N, D), without gradient; (0, D) if no part asks for them
                (``streams_tokens``).
            counts: (E,) int64, the slots of each expert by the router's own choice; 0 if the choice was replayed.
        """
        return None

    def update(self, statistics: Tensor) -> None:
        """Take the sums of ``statistics`` over micro-batches and ranks; called before ``after_step``."""

    def after_step(self) -> None:
        """Do the work after an optimizer step, without gradient; a subclass that overrides this calls super."""
        self.retract(trained_only=True)

    @torch.no_grad()
    def retract(self, *, trained_only: bool = False) -> None:
        """Make the columns of the parameters in ``manifold`` orthonormal again, by QR.

        A parameter whose columns are orthonormal up to rounding stays exactly as it is.

        Args:
            trained_only: whether parameters that take no gradient stay as they are.
        """
        for basis in (getattr(self, name) for name in self.manifold):
            if basis.requires_grad or not trained_only:
                assign_(basis, retracted(basis))


def in_full_precision(fn: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return ``fn``, an argument of ``Module._apply``, changed so that it moves tensors but casts none to 16 bits."""

    def keep_precision(tensor: Tensor) -> Tensor:
        moved = fn(tensor)
        if moved.dtype in (torch.float16, torch.bfloat16):
            return tensor.to(device=moved.device, dtype=torch.float32)
        return moved

    return keep_precision
