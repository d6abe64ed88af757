"""All functions that read private parts of torch; ``tests/test_torch_private.py`` tests each of them."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.optim import Optimizer

__all__ = [
    "class_of",
    "forward_hooks",
    "gradient_of_view",
    "has_forward_hooks",
    "has_hooks",
    "hooks_before_step",
    "in_backward",
    "is_compiled",
    "transforming",
    "whole_of",
]


def transforming() -> bool:
    """Return whether ``torch.func`` (``grad``, ``jvp``, ``vmap``, ...) or a forward-mode ``dual_level`` is active.

    Custom operators of this library know reverse mode only; there they are replaced by operations that every transform
    knows. ``torch.compile`` evaluates this while it traces.

    >>> torch.func.vmap(lambda x: x * transforming())(torch.ones(1)).item(), transforming()
    (1.0, False)
    """
    level: int = forward_ad._current_level
    return level >= 0 or torch._C._functorch.get_dynamic_layer_stack_depth() > 0


def in_backward() -> bool:
    """Return whether the calling thread is inside a backward pass, where only recomputations run a forward."""
    return torch._C._current_graph_task_id() != -1


def has_forward_hooks(module: nn.Module) -> bool:
    """Return whether a call of ``module`` runs hooks before or after its forward.

    >>> layer = nn.Linear(2, 2)
    >>> hook = layer.register_forward_hook(lambda module, x, y: None)
    >>> has_forward_hooks(layer), has_forward_hooks(nn.Linear(2, 2))
    (True, False)
    """
    return bool(module._forward_pre_hooks or module._forward_hooks)


def forward_hooks(module: nn.Module) -> list[Any]:
    """Return the hooks that run after the forward of ``module``, in their order."""
    return list(module._forward_hooks.values())


def is_compiled(model: nn.Module) -> bool:
    """Return whether ``model`` or a module in it was compiled by ``torch.compile`` or ``compile()``.

    >>> layer = nn.Linear(2, 2)
    >>> is_compiled(layer), is_compiled(torch.compile(layer))
    (False, True)
    """
    return any(
        "_orig_mod" in module._modules or getattr(module, "_compiled_call_impl", None) is not None
        for module in model.modules()
    )


def has_hooks(module: nn.Module) -> bool:
    """Return whether a call of ``module`` runs hooks of any kind, including backward hooks."""
    return has_forward_hooks(module) or bool(module._backward_pre_hooks or module._backward_hooks)


def hooks_before_step(optimizer: Optimizer) -> list[Any]:
    """Return the hooks that run before each step of ``optimizer``.

    >>> optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    >>> handle = optimizer.register_step_pre_hook(print)
    >>> hooks_before_step(optimizer)
    [<built-in function print>]
    """
    return list(optimizer._optimizer_step_pre_hooks.values())


def class_of(part: Any) -> Any:
    """Return the class of ``part`` as its author wrote it; FSDP2 puts a class of its own and a mixin in front."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    return type(part).__mro__[2] if fsdp is not None and isinstance(part, fsdp.FSDPModule) else type(part)


def whole_of(view: Tensor) -> Tensor:
    """Return the tensor that ``view`` is a view of, or ``view`` itself if it is none.

    >>> stack = torch.zeros(3, 2)
    >>> whole_of(stack[1]) is stack, whole_of(stack) is stack
    (True, True)
    """
    return view if view._base is None else view._base


def gradient_of_view(view: Tensor, gradient: Tensor) -> Tensor:
    """Return the part of ``gradient``, the gradient of ``whole_of(view)``, that belongs to ``view``.

    >>> stack, gradient = torch.zeros(2, 3), torch.tensor([[0.0, 1.0, 2.0], [3.0, 4.0, 5.0]])
    >>> gradient_of_view(stack[1, 1:], gradient)
    tensor([4., 5.])
    """
    whole = whole_of(view)
    if gradient.stride() != whole.stride():
        gradient = gradient.new_empty_strided(whole.shape, whole.stride()).copy_(gradient)
    offset = gradient.storage_offset() + view.storage_offset() - whole.storage_offset()
    return gradient.as_strided(view.shape, view.stride(), offset)
