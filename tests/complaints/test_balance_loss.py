"""The balance loss: wrong, off without a word, or of the wrong size.

Threads: transformers #28255, #31464, #44242, #44243, #44274, #44284, #44586, #45120, #45131; NeMo Automodel #1408,
#3359; trl #6083; Tutel #167; st-moe-pytorch #6.
"""

from __future__ import annotations

import pytest
import torch
from grids import one_of_each
from small_parts import make_regularizer
from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Term, TopK, feed, penalty, record
from spectralmoe.regularizers import REGULARIZERS, load_balance
from spectralmoe.selectors import SELECTORS

E = 4
BALANCE = {"balance": Term(load_balance, 0.01)}


def by_hand(logits, indices):
    """E sum_i f_i P_i in float64, one slot and one token at a time."""
    n, e = logits.shape
    fraction, mean = [0.0] * e, [0.0] * e
    for row, chosen in zip(logits.double(), indices.tolist(), strict=True):
        shares = row.exp() / row.exp().sum()
        for i in range(e):
            mean[i] += float(shares[i]) / n
        for i in chosen:
            fraction[i] += 1 / indices.numel()
    return e * sum(f * p for f, p in zip(fraction, mean, strict=True))


@pytest.mark.parametrize("k", [1, 2, 3])
def test_transformers_28255_the_fraction_is_a_share_of_all_slots(chooser, close, k):
    """transformers #28255: A fraction of tokens averaged along the wrong axis made the loss of Mixtral blind to the
    actual load.

    Here it follows equation 4 of Switch for any k: it equals the definition and rises with the skew.
    """
    layer, x = chooser(TopK(k)), torch.randn(60, 16)
    values = []
    for skew in (0.0, 1.0, 3.0):
        with torch.no_grad():
            x[:, 0] += skew
        with record(layer) as tape:
            layer(x)
        routing, value = tape[0].routing, load_balance(tape[0]).detach()
        close(value, by_hand(routing.logits.detach(), routing.indices))
        values.append(float(value))
    assert values == sorted(values)
    assert values[-1] > values[0] + 0.2


def test_transformers_31464_opposite_imbalances_of_two_layers_do_not_cancel(chooser, tokens_for):
    """transformers #31464: Mixtral pools all layers into one loss: two collapsed layers that favour different experts
    look even.

    Here each layer has a loss of its own, and the mean of two collapsed layers is a collapsed value.
    """
    model = torch.nn.ModuleList([chooser(TopK(1)) for _ in range(E)])
    with record(model) as tape:
        for expert, layer in enumerate(model):
            layer(tokens_for([expert] * 40, logit=20.0))
    pooled = torch.cat([item.routing.logits for item in tape]), torch.cat([item.routing.indices for item in tape])
    assert by_hand(*(tensor.detach() for tensor in pooled)) == pytest.approx(1, abs=1e-3)
    assert float(penalty(tape, BALANCE)[1]["balance"]) == pytest.approx(E, abs=1e-3)


def test_transformers_44242_no_flag_stands_between_the_coefficient_and_the_loss(make_net, router_grads, user_error):
    """transformers #44242: Mixtral trains without any balance loss, coefficient or not, until an unrelated output flag
    is set.

    Here a term in ``penalty`` reaches every router of a plain training step; what would make it silently zero (no
    forward recorded, no gradient recorded, a pattern that names no layer) is an error.
    """
    net, x = make_net().train(), torch.randn(40, 16)
    with record(net) as tape:
        net(x)
    penalty(tape, BALANCE)[0].backward()
    assert len(router_grads(net)) == 2
    assert all(grad.any() for grad in router_grads(net))
    with user_error("the tape is empty"), record(net) as tape:
        penalty(tape, BALANCE)
    with torch.no_grad(), record(net) as tape:
        net(x)
    with user_error("'balance' has no gradient"):
        penalty(tape, BALANCE)
    with record(net) as tape:
        net(x)
    with user_error("matches no MoE layer"):
        penalty(tape, {"balance": Term(load_balance, 0.01, layers="layers.*")})


def test_transformers_45120_one_softmax_and_no_more(chooser, tokens_for, close):
    """transformers #45120: Routers returned probabilities under the name of logits, and the loss took a second softmax
    of them.

    Here a tape holds raw logits, and the loss sees probabilities that went through one softmax.
    """
    layer, x = chooser(TopK(2)), tokens_for([0] * 30 + [1] * 10, logit=6.0)
    with record(layer) as tape:
        layer(x)
    routing = tape[0].routing
    assert torch.equal(routing.logits, x @ torch.eye(E, 16).T)
    close(routing.probs, routing.logits.softmax(-1))
    close(load_balance(routing).detach(), by_hand(routing.logits.detach(), routing.indices))
    twice = by_hand(routing.probs.detach(), routing.indices)
    assert load_balance(routing).item() > twice + 0.1


@pytest.mark.parametrize("copies", [1, 50])
def test_automodel_1408_the_gradient_arrives_and_has_its_size(chooser, close, copies):
    """NeMo Automodel #1408: Three faults in a row: the scaled loss was thrown away, its coefficient ignored, and once
    it flowed the number of tokens made it 180,000 times too strong.

    Here the gradient of the routing matrix is the coefficient times the derivative of the definition, for 40 tokens and
    for the same tokens 50 times over.
    """
    layer, x = chooser(TopK(2)), torch.randn(40, 16)
    with record(layer) as tape:
        layer(x.repeat(copies, 1))
    penalty(tape, BALANCE)[0].backward()
    weight = layer.router.scorer.weight.detach().double().requires_grad_()
    logits = x.double() @ weight.T
    fraction = torch.bincount(logits.topk(2).indices.flatten(), minlength=E) / 80
    (E * (fraction * logits.softmax(-1).mean(0)).sum()).backward()
    close(layer.router.scorer.weight.grad / 0.01, weight.grad)


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_automodel_3359_and_trl_6083_accumulation_does_not_change_the_coefficient(make_net, close, micro_batches):
    """NeMo Automodel #3359, trl #6083: The task loss was divided by the number of accumulation steps and the balance
    loss was not (or was, where the task loss was not): the coefficient meant something else for every number of steps.

    Here both are one sum that the caller divides once: equal micro-batches give the gradient of one batch.
    """
    reference, net, x = make_net(), make_net(), torch.randn(40, 16)
    for model, parts in ((reference, 1), (net, micro_batches)):
        for _ in range(parts):
            with record(model) as tape:
                y = model(x)
            ((y.square().mean() + penalty(tape, BALANCE)[0]) / parts).backward()
    for one, two in zip(net.parameters(), reference.parameters(), strict=True):
        close(one.grad, two.grad)


@one_of_each(name=sorted(REGULARIZERS), selector=list(SELECTORS))
def test_tutel_167_every_loss_works_where_one_does(make_router, name, selector, user_error):
    """Tutel #167: The second loss of the library failed on a model that trained well with the first.

    Here every regularizer takes the records of every selector: in training, in bf16, with padding, without a token.
    One that could have no gradient where all experts are used says so.
    """
    layer = nn.Sequential(*(MoE(make_router("linear", selector, 12, 6), FeedForward(6, 12, 8)) for _ in range(2)))
    terms = {name: Term(make_regularizer(name), 1.0)}
    if name == "path_coupling" and layer[0].router.soft:
        with user_error("path_coupling has no gradient"), record(layer) as tape:
            layer(torch.randn(30, 12))
            penalty(tape, terms)
        return
    for x, mask in (
        (torch.randn(30, 12), None),
        (torch.randn(3, 10, 12, dtype=torch.bfloat16), torch.rand(3, 10) < 0.7),
        (torch.randn(5, 12), torch.zeros(5, dtype=torch.bool)),
        (torch.randn(0, 12), None),
    ):
        with feed(layer, mask=mask), record(layer, terms=terms) as tape:
            layer(x)
        layer.zero_grad()
        value, _ = penalty(tape, terms)
        value.backward()
        assert value.shape == ()
        assert value.dtype == torch.float32
        assert value.isfinite()
        assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize("experts", [3, 8, 64])
@pytest.mark.parametrize("k", [1, 2])
def test_st_moe_6_the_loss_has_values_to_compare_with(close, experts, k):
    """st-moe-pytorch #6: A loss of 5.0, and nobody could say whether that was balanced: the scale depended on the
    settings.

    Here an even load gives 1 whatever E, k and N, and the collapse of all tokens onto the same k experts gives E/k.
    """
    router = Router(LinearScorer(experts, experts), TopK(k))
    with torch.no_grad():
        router.scorer.weight.copy_(torch.eye(experts))
    even, collapsed = torch.eye(experts) + 0.5 * torch.eye(experts).roll(1, 1), torch.zeros(30, experts)
    collapsed[:, :k] = 50.0
    for tokens, value in ((even, 1), (even.repeat(7, 1), 1), (collapsed, experts / k)):
        close(load_balance(router(tokens)).detach(), value)
