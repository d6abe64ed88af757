"""The router inside Megatron-core's MoE layer, beside Megatron's own: one process, gloo, a CPU."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import pytest
import torch
from seeds import generator
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from spectralmoe import Monitor, attach, feed, record
from spectralmoe.regularizers import load_balance, router_z

pytest.importorskip("megatron.core", reason="needs megatron-core")

from megatron.core import dist_checkpointing, parallel_state
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.models.gpt.gpt_model import GPTModel
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.tensor_parallel.random import initialize_rng_tracker
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, get_default_pg_collection
from megatron.core.transformer.spec_utils import build_module
from megatron.core.transformer.transformer_config import TransformerConfig

from spectralmoe.integrations.megatron import SpectralRouter

pytestmark = pytest.mark.filterwarnings("ignore:::megatron", "ignore:::torch.distributed")

DIM, EXPERTS, K, S, B = 12, 6, 2, 5, 3
SCALE = 0.5
TERMS = {"load_balance": 0.3, "router_z": 0.2}
LINEAR = {"scorer": "linear", "selector": {"type": "topk", "normalize": True}}


@pytest.fixture(scope="module", autouse=True)
def _megatron() -> Iterator[None]:
    """A process group of this process alone, and what Megatron-core asks of CUDA on a CPU."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "current_device", lambda: "cpu")
        patched.setattr(torch.cuda, "synchronize", lambda: None)
        patched.setattr(torch.cuda, "Stream", MagicMock)  # of the dispatcher alltoall
        patched.setattr(torch.cuda, "current_stream", MagicMock)
        patched.setattr(torch.cuda, "stream", nullcontext)
        patched.setattr(moe_utils, "te_general_gemm", None, raising=False)
        torch.distributed.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=0, world_size=1)
        parallel_state.initialize_model_parallel()
        initialize_rng_tracker(inference_rng_tracker=True, force_reset=True)  # draws nothing on CUDA
        MoEAuxLossAutoScaler.set_loss_scale(torch.tensor(SCALE))
        yield
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@pytest.fixture(autouse=True)
def _fresh_tracker() -> None:
    moe_utils.get_moe_layer_wise_logging_tracker().clear()


def config(**settings: Any) -> TransformerConfig:
    sizes = {"num_layers": 2, "hidden_size": DIM, "num_attention_heads": 2, "num_moe_experts": EXPERTS}
    plain = {"moe_router_topk": K, "use_cpu_initialization": True, "add_bias_linear": False}
    return TransformerConfig(**sizes, **plain, **{"moe_token_dispatcher_type": "allgather", **settings})


def layer_with(row: Any, **settings: Any) -> Any:
    """Megatron's MoE layer with the router of ``row``; with its own for None."""
    spec = get_moe_module_spec(use_te=False, num_experts=EXPERTS, moe_grouped_gemm=False)
    if row is not None:
        spec.submodules.router = SpectralRouter.configure(row)
    layer = build_module(spec, config=config(**settings), layer_number=1)
    layer.set_layer_number(1)
    return layer


def router_of(row: Any, **settings: Any) -> SpectralRouter:
    return SpectralRouter.configure(row)(config=config(**settings), pg_collection=get_default_pg_collection())


def tokens(seed: int = 0) -> Tensor:
    return torch.randn(S, B, DIM, generator=generator(seed))


def padding() -> Tensor:
    """(B, S), True for padding, as ``MoELayer`` gets it."""
    mask = torch.zeros(B, S, dtype=torch.bool)
    mask[1, 3:] = mask[2, 1:] = True
    return mask


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


@pytest.mark.parametrize("row", ["sr-moe", *(pytest.param(row, marks=pytest.mark.full) for row in ("emoe", "l2r"))])
def test_a_small_gpt_trains(row):
    spec = get_gpt_layer_local_spec(num_experts=EXPERTS, moe_grouped_gemm=False)
    spec.submodules.mlp.submodules.router = SpectralRouter.configure(row)
    still = {"attention_dropout": 0.0, "hidden_dropout": 0.0, "bias_dropout_fusion": False}
    settings = config(masked_softmax_fusion=False, **still)
    model = GPTModel(config=settings, transformer_layer_spec=spec, vocab_size=16, max_sequence_length=S)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
    attach(optimizer, model)
    text, places = torch.randint(16, (B, S + 1), generator=generator(4)), torch.arange(S).expand(B, S)
    later, losses = torch.ones(1, 1, S, S, dtype=torch.bool).triu(1), []
    with Monitor(model, every=8) as monitor:
        for _ in range(8):
            loss = model(text[:, :-1], places, later, labels=text[:, 1:], padding_mask=padding())
            losses.append(loss[~padding()].mean())
            optimizer.zero_grad()
            losses[-1].backward()
            optimizer.step()
            monitor.step()
    assert losses[-1] < losses[0]
    assert monitor.last["tokens"] == 8 * int((~padding()).sum())
    with record(model) as tape:
        model(text[:, :-1], places, later, padding_mask=padding())
    assert [item.name for item in tape] == ["decoder.layers.0.mlp", "decoder.layers.1.mlp"]
    assert [int(item.routing.counts().sum()) for item in tape] == [K * int((~padding()).sum())] * 2


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


@pytest.mark.full
def test_a_distributed_checkpoint_holds_weights_and_bias(tmp_path):
    layer, other = layer_with("sr-moe"), layer_with("sr-moe")
    layer.router.router.selector.bias.copy_(torch.randn(EXPERTS, generator=generator(3)))
    dist_checkpointing.save(layer.sharded_state_dict(prefix="mlp."), tmp_path)
    loaded = dist_checkpointing.load(other.sharded_state_dict(prefix="mlp."), tmp_path)
    other.load_state_dict({name.removeprefix("mlp."): value for name, value in loaded.items()})
    for name, value in layer.router.state_dict().items():
        assert torch.equal(other.router.state_dict()[name], value), name


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
