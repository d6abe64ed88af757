"""Each private fact of torch that the library rests on: a torch that changes one fails here first."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.autograd import forward_ad
from torch.utils.checkpoint import checkpoint

from spectralmoe.torch_private import (
    class_of,
    forward_hooks,
    gradient_of_view,
    has_forward_hooks,
    has_hooks,
    in_backward,
    is_compiled,
    transforming,
    whole_of,
)


class Asks(nn.Module):
    """Remembers what a question answers in each of its forwards."""

    def __init__(self, question):
        super().__init__()
        self.question, self.answers = question, []

    def forward(self, x):
        self.answers.append(self.question())
        return x.sin()


def test_only_a_recomputation_runs_inside_a_backward_pass():
    layer = Asks(in_backward)
    checkpoint(layer, torch.ones(2, requires_grad=True), use_reentrant=False).sum().backward()
    assert layer.answers == [False, True]
    assert not in_backward()


@pytest.mark.parametrize("transform", ["vmap", "grad", "jvp", "dual"])
def test_transforms_are_seen(transform):
    layer, x = Asks(transforming), torch.ones(3)
    if transform == "dual":
        with forward_ad.dual_level():
            layer(forward_ad.make_dual(x, x))
    elif transform == "jvp":
        torch.func.jvp(layer, (x,), (x,))
    else:
        getattr(torch.func, transform)(lambda x: layer(x).sum())(x)
    assert layer.answers == [True]
    assert not transforming()


HOOKS = {
    "forward_pre": (lambda module, x: None, True),
    "forward": (lambda module, x, y: None, True),
    "full_backward_pre": (lambda module, grad: None, False),
    "full_backward": (lambda module, before, after: None, False),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_every_kind_of_hook_is_seen(kind):
    layer, (hook, forward) = nn.Linear(2, 2), HOOKS[kind]
    assert not has_hooks(layer)
    handle = getattr(layer, f"register_{kind}_hook")(hook)
    assert has_hooks(layer)
    assert has_forward_hooks(layer) == forward
    handle.remove()
    assert not has_hooks(layer)


def test_the_class_of_a_sharded_module_is_its_own(one_process):
    from torch.distributed.fsdp import fully_shard

    layer = fully_shard(nn.Linear(4, 4))
    assert type(layer) is not nn.Linear
    assert class_of(layer) is nn.Linear
    assert class_of(nn.Linear(4, 4)) is nn.Linear


VIEWS = {
    "expert": lambda stack: stack[1],
    "transposed": lambda stack: stack[2].T,
    "part": lambda stack: stack[0, 1:, ::2],
    "whole": lambda stack: stack,
}


@pytest.mark.parametrize("pick", VIEWS)
@pytest.mark.parametrize("dense", [True, False], ids=["same-strides", "other-strides"])
def test_a_view_has_its_part_of_the_gradient(pick, dense):
    stack = nn.Parameter(torch.randn(3, 4, 5))
    view = VIEWS[pick](stack)
    assert whole_of(view) is stack
    gradient = torch.randn(3, 4, 5) if dense else torch.randn(5, 4, 3).permute(2, 1, 0)
    assert torch.equal(gradient_of_view(view, gradient), VIEWS[pick](gradient))


def test_hooks_are_listed_and_compiled_models_known():
    layer = nn.Linear(2, 2)
    first, second = (lambda *seen: None), (lambda *seen: None)
    layer.register_forward_hook(first)
    layer.register_forward_hook(second, with_kwargs=True)
    assert forward_hooks(layer) == [first, second]
    assert not is_compiled(nn.Sequential(layer))
    assert is_compiled(nn.Sequential(torch.compile(layer)))
    layer.compile()
    assert is_compiled(nn.Sequential(layer))
