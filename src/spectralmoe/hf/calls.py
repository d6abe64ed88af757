"""The call of the stack around swapped routers, which they cannot see themselves: its sequences and their padding."""

from __future__ import annotations

import copy
import threading
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.hf.frames import Frame, frame_of, parameter_names
from spectralmoe.recording import recomputing

__all__ = ["Calls"]


class _Here(threading.local):
    """The frame of the calling thread's last call. A copy starts empty."""

    def __init__(self) -> None:
        self.frame = Frame()

    def __reduce__(self) -> tuple[type[_Here], tuple[()]]:
        return _Here, ()


class Calls:
    """The frames of the calls of one stack, for the routers inside it.

    A recomputation gets the frame of the last call with gradient, whatever thread it runs in.

    Args:
        stack: the module that holds the numbered layers.
    """

    def __init__(self, stack: nn.Module) -> None:
        self.stack, self.names = stack, parameter_names(stack)
        self.hooks = (
            stack.register_forward_pre_hook(self.enter, with_kwargs=True),
            stack.register_forward_hook(self.leave),
        )
        self.here = _Here()
        self.last, self.recomputed, self.mixed = Frame(), True, False

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "last": Frame(), "recomputed": True, "mixed": False}

    def __deepcopy__(self, memo: dict[int, Any]) -> Calls:
        """The same object if a router is copied without its stack, as by PEFT; else that of the copied stack."""
        if id(self.stack) not in memo:
            return self
        copied = memo[id(self)] = Calls.__new__(Calls)
        copied.__dict__.update(copy.deepcopy(self.__getstate__(), memo))
        return copied

    def close(self) -> None:
        """See no more calls."""
        for hook in self.hooks:
            hook.remove()

    def enter(self, stack: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The stack is called: its forward pre-hook."""
        if recomputing():
            return
        self.here.frame = frame_of(self.names, args, kwargs)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            waits = getattr(stack, "gradient_checkpointing", False) and not self.recomputed
            self.mixed = waits and (self.mixed or _differ(self.last.mask, self.here.frame.mask))
            self.last, self.recomputed = self.here.frame, False

    def leave(self, *_: Any) -> None:
        """The call has ended: its forward hook. A router that is called directly belongs to no call."""
        if not recomputing():
            self.here.frame = Frame()

    def frame(self) -> Frame:
        """The frame of the running call.

        Raises:
            UserError: a recomputation that may be of one of several calls.
        """
        if not recomputing():
            return self.here.frame
        if self.mixed:
            raise UserError(
                "several forwards with different attention masks wait for their backward under gradient "
                "checkpointing, and a recomputation cannot tell its own; call backward after each forward"
            )
        self.recomputed = True
        return self.last


def _differ(one: Tensor | None, other: Tensor | None) -> bool:
    if one is None or other is None:
        return one is not other
    return one.shape != other.shape or not torch.equal(one, other)
