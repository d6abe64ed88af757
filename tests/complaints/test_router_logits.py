"""Access to what the router computed.

Threads: transformers #39203, #48911; unsloth #4812.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from spectralmoe import Balanced, MoE, SoftBalanced, Term, penalty, record
from spectralmoe.regularizers import load_balance

BALANCE = {"balance": Term(load_balance, 0.5)}


@pytest.mark.parametrize("selector", [lambda: Balanced(2), SoftBalanced], ids=["balanced", "soft_balanced"])
def test_transformers_48911_balancing_by_a_bias_hides_nothing(make_net, router_grads, selector):
    """transformers #48911: 17 models that balance with a bias compute their logits and drop them: no loss, no
    statistics.

    Here a tape holds the logits as the scorer gave them, without the bias, and with their gradient.
    """
    net, x = make_net(selector), torch.randn(40, 16)
    for block in net.blocks:
        block.moe.router.selector.bias += torch.tensor([3.0, 0.0, 0.0, -3.0])
    with record(net) as tape:
        net(x)
    scorer = net.blocks[0].moe.router.scorer
    assert torch.equal(tape[0].routing.logits, scorer(net.blocks[0].linear(x).tanh()))
    penalty(tape, BALANCE)[0].backward()
    assert len(router_grads(net)) == 2
    assert all(grad.any() for grad in router_grads(net))


def test_transformers_39203_dense_layers_in_between(make_net):
    """transformers #39203: A model with some dense layers put None into its list of router logits, and asking for them
    failed.

    Here dense layers leave no record, and the others keep the numbers that they have in the model.
    """
    net = make_net(depth=5)
    for dense in (0, 2, 3):
        net.blocks[dense] = nn.Linear(16, 16)
    with record(net) as tape:
        net(torch.randn(10, 16))
    assert [item.name for item in tape] == ["blocks.1.moe", "blocks.4.moe"]
    assert penalty(tape, BALANCE)[0].requires_grad


@pytest.mark.parametrize("how", ["subclass", "class rewritten", "compiled before", "method replaced"])
def test_unsloth_4812_capture_does_not_go_by_the_identity_of_a_class(make_net, how):
    """unsloth #4812: Router outputs were collected from modules of one class; once a tool had rewritten that class, the
    list was empty and the balance loss broke.

    Here a layer is found by what it is, also as another class, with another forward, or compiled before any tape.
    """
    torch.compiler.reset()
    net, x = make_net(), torch.randn(10, 16)
    call, layer = net, net.blocks[0].moe
    if how == "subclass":
        layer.__class__ = type("Mine", (MoE,), {})
    elif how == "class rewritten":
        layer.__class__ = type("MoE", (MoE,), {"forward": lambda self, x: 2 * MoE.forward(self, x)})
    elif how == "method replaced":
        layer.forward = lambda x: 2 * MoE.forward(layer, x)
    else:
        call = torch.compile(net, backend="aot_eager")
        call(x)
    with record(net) as tape:
        call(x)
    assert [item.name for item in tape] == ["blocks.0.moe", "blocks.1.moe"]
    assert penalty(tape, BALANCE)[0].requires_grad


def test_unsloth_4812_a_class_of_the_same_name_is_not_taken_for_a_layer(make_net, user_error):
    """unsloth #4812: The other half of the thread: what cannot be captured must not look like an empty, balanced
    record.
    """

    class Copied(nn.Module):
        def __init__(self, layer):
            super().__init__()
            self.router, self.experts = layer.router, layer.experts

        def forward(self, x):
            return x

    net = make_net(depth=1)
    net.blocks[0].moe = Copied(net.blocks[0].moe)
    with user_error("blocks.0.moe (Copied)", "returns Routing"), record(net):
        net(torch.randn(10, 16))
