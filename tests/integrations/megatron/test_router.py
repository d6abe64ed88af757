"""The router inside Megatron-core's MoE layer, beside Megatron's own: one process, gloo, a CPU."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import get_default_pg_collection
from megatron_layers import DIM, EXPERTS, SCALE, B, K, S, config, layer_with, padding, router_of, tokens
from seeds import generator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spectralmoe import attach, feed, record
from spectralmoe.integrations.megatron import SpectralRouter
from spectralmoe.regularizers import load_balance, router_z

pytestmark = [pytest.mark.usefixtures("megatron"), pytest.mark.filterwarnings("ignore:::megatron")]

TERMS = {"load_balance": 0.3, "router_z": 0.2}
LINEAR = {"scorer": "linear", "selector": {"type": "topk", "normalize": True}}


def tracked(name: str) -> Tensor:
    return moe_utils.get_moe_layer_wise_logging_tracker()[name]["values"][0]


CASES = {
    "softmax": ({}, {"normalize": True}),
    "softmax first": ({"moe_router_pre_softmax": True}, {}),
    "sigmoid": ({"moe_router_score_function": "sigmoid"}, {"normalize": True, "score": "sigmoid"}),
    "scaled": ({"moe_router_pre_softmax": True, "moe_router_topk_scaling_factor": 2.5}, {}),
}


@pytest.mark.grid(case=CASES, padded=[False, True], per_token=[False, True])
def test_losses_output_and_gradients_are_those_of_megatrons_own_router(case, padded, per_token, close):
    settings, selector = CASES[case]
    settings = {**settings, "calculate_per_token_loss": per_token}
    stock = layer_with(None, moe_aux_loss_coeff=0.3, moe_z_loss_coeff=0.2, **settings)
    row = {"scorer": "linear", "selector": {"type": "topk", **selector}, "terms": TERMS}
    ours = layer_with(row, **settings)
    ours.experts.load_state_dict(stock.experts.state_dict())
    with torch.no_grad():
        ours.router.router.scorer.weight.copy_(stock.router.weight.normal_(generator=generator(1)))
    direction, real = torch.randn(S, B, DIM, generator=generator(2)), torch.ones(S, B, 1)
    if padded:
        real = (~padding().T)[..., None].float()
    found = []
    for layer in (stock, ours):
        x = tokens().requires_grad_()
        y, _ = layer(x, padding_mask=padding() if padded else None)
        (y * direction * real).sum().backward()
        found.append((y * real, x.grad * real))
    for one, two in zip(*found, strict=True):
        close(one, two)
    exact = {"rtol": 1e-6, "atol": 1e-6}
    torch.testing.assert_close(tracked("load_balance"), tracked("load_balancing_loss"), **exact)
    torch.testing.assert_close(tracked("router_z"), tracked("z_loss"), **exact)
    close(ours.router.router.scorer.weight.grad, stock.router.weight.grad)
    for one, two in zip(ours.experts.parameters(), stock.experts.parameters(), strict=True):
        close(one.grad, two.grad)


@pytest.mark.parametrize("per_token", [False, True])
def test_terms_reach_the_gradient_in_the_scale_of_megatrons_losses(per_token, close):
    """Two ranks share the sequence here: each adds half of its own value."""
    groups = SimpleNamespace(tp=None, tp_cp=SimpleNamespace(size=lambda: 2), tp_dp_cp=None)
    settings = config(calculate_per_token_loss=per_token)
    router = SpectralRouter.configure({**LINEAR, "terms": TERMS})(config=settings, pg_collection=groups)
    mask, (weight,) = padding().T, router.router.scorer.parameters()
    probs, _ = router(tokens(), mask)
    (got,) = torch.autograd.grad((probs * 0).sum(), weight)
    routing = router.router(tokens(), mask=~mask)
    total = sum(w * fn(routing) for w, fn in zip(TERMS.values(), (load_balance, router_z), strict=True))
    (want,) = torch.autograd.grad(total, weight)
    close(got, want * SCALE / 2 * (float((~mask).sum()) if per_token else 1))
    probs, _ = router.eval()(tokens(), mask)
    (got,) = torch.autograd.grad((probs * 0).sum(), weight)
    close(got, torch.zeros_like(got))


@pytest.mark.grid(dispatcher=["allgather", "alltoall"])
def test_every_scorer_and_selector_in_a_layer(scorer_name, selector_name, dispatcher, make_router, close):
    """The output is the sum over the experts that the router's own routing says; padding is 0."""
    layer = layer_with("linear", moe_token_dispatcher_type=dispatcher)
    made = make_router(scorer_name, selector_name, DIM, EXPERTS)
    preset = SimpleNamespace(make_router=lambda *_, k: made, terms={})
    layer.router = SpectralRouter(layer.config, get_default_pg_collection(), preset=preset)
    x = tokens()
    with record(layer) as tape:
        y, _ = layer(x, padding_mask=padding())
    gates = tape[0].routing.gates()
    outputs = torch.stack([expert(x.reshape(-1, DIM))[0] for expert in layer.experts.local_experts], 1)
    close(y.reshape(-1, DIM), (gates[..., None] * outputs).sum(1))
    assert not y.transpose(0, 1)[padding()].any()
    y.square().sum().backward()


def test_the_loss_free_bias_moves_by_real_tokens(close):
    layer = layer_with({"preset": "linear+balanced", "rate": 0.01})
    optimizer = torch.optim.SGD(layer.parameters(), lr=0.1)
    attach(optimizer, layer)
    with record(layer) as tape:
        y, _ = layer(tokens(), padding_mask=padding())
    y.sum().backward()
    optimizer.step()
    counts = tape[0].routing.counts().double()
    assert int(counts.sum()) == K * int((~padding()).sum())
    close(layer.router.router.selector.bias.double(), 0.01 * (counts.mean() - counts).sign(), torch.float32)


@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_changes_no_gradient_and_counts_once(reentrant, close):
    layer = layer_with({"preset": "sr-moe", "terms": TERMS})
    other = layer_with({"preset": "sr-moe", "terms": TERMS})
    other.load_state_dict(layer.state_dict())
    optimizer = torch.optim.SGD(other.parameters(), lr=0.0)
    attach(optimizer, other)
    x, again = tokens().requires_grad_(), tokens().requires_grad_()
    layer(x)[0].square().sum().backward()
    checkpoint(other, again, use_reentrant=reentrant)[0].square().sum().backward()
    close(again.grad, x.grad)
    for one, two in zip(other.parameters(), layer.parameters(), strict=True):
        close(one.grad, two.grad)
    with record(layer) as tape:
        layer(x)
    counts = tape[0].routing.counts().double()
    optimizer.step()
    close(other.router.router.selector.bias.double(), 0.01 * (counts.mean() - counts).sign(), torch.float32)


def test_a_model_in_16_bits_keeps_its_router_in_fp32():
    layer = layer_with("sr-moe").bfloat16()
    assert {p.dtype for p in layer.router.parameters()} == {torch.float32}
    assert layer.router(tokens().bfloat16())[0].dtype == torch.float32
    y, _ = layer(tokens().bfloat16())
    assert y.dtype == torch.bfloat16


def test_parameters_are_marked_for_sequence_parallelism():
    settings = config()
    settings.sequence_parallel = True
    router = SpectralRouter.configure("sr-moe")(config=settings, pg_collection=get_default_pg_collection())
    assert all(parameter.sequence_parallel for parameter in router.parameters())
    assert not any(parameter.sequence_parallel for parameter in router_of("sr-moe").parameters())


def test_context_and_replay_come_by_feed():
    layer = layer_with(LINEAR)
    with record(layer) as tape:
        layer(tokens())
    with torch.no_grad():
        layer.router.router.scorer.weight.neg_()
    with feed(layer, replay=tape), record(layer) as again:
        layer(tokens())
    assert torch.equal(again[0].routing.indices, tape[0].routing.indices)


ORDERS = {
    "moe_aux_loss_coeff": 0.01,
    "moe_z_loss_coeff": 1e-3,
    "moe_input_jitter_eps": 0.1,
    "moe_expert_capacity_factor": 1.0,
    "moe_router_load_balancing_type": "sinkhorn",
    "moe_enable_routing_replay": True,
}


@pytest.mark.parametrize("name", ORDERS)
def test_an_order_to_megatrons_own_router_is_refused(name, user_error):
    with user_error(name, "own router"):
        router_of("linear", **{name: ORDERS[name]})


@pytest.mark.parametrize(
    ("term", "word"),
    [
        ({"output_overlap": 0.1}, "output"),
        ({"path_coupling": 0.1}, "all layers"),
        ({"load_balance": {"weight": 0.1, "layers": "0"}}, "layers="),
    ],
)
def test_a_term_that_needs_more_than_one_router_is_refused(term, word, user_error):
    with user_error(next(iter(term)), word):
        router_of({"scorer": "linear", "terms": term})


def test_a_dispatcher_that_counts_on_k_experts_gets_them(user_error):
    fused = {"moe_token_dispatcher_type": "alltoall", "moe_permute_fusion": True}
    router = router_of(LINEAR)
    router.config.__dict__.update(fused)
    assert int(router(tokens())[1].sum()) == S * B * K
    with user_error("alltoall", "padding mask"):
        router(tokens(), padding().T)
    uneven = router_of({"scorer": "linear", "selector": "topp", "p": 0.5})
    uneven.config = router.config
    with user_error("moe_permute_fusion", f"k = {K}"):
        uneven(tokens())
