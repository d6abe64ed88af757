"""Routers of this library in Hugging Face models: the same model, which is recorded and trained as our own."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, SIZES, batch, build, left_padded, stock_of
from torch import Tensor

from spectralmoe import Term, attach, feed, penalty, record
from spectralmoe.hf import swap_routers
from spectralmoe.hf.layers import find_layers
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import load_balance, router_z
from spectralmoe.selectors import Balanced

pytest.importorskip("transformers")

ALL = [*FAMILIES, *MORE]
every_family = pytest.mark.parametrize("family", ALL)
TERMS = {"z": Term(router_z, 0.1), "balance": Term(load_balance, 0.1)}


def swapped_of(family: str, *args: Any, **options: Any) -> Any:
    """A copy of it with routers of this library."""
    model = copy.deepcopy(stock_of(family))
    swap_routers(model, *args, **options)
    return model


def balanced_of(router: Any) -> list[Balanced]:
    return [part for part in router.selector.modules() if isinstance(part, Balanced)]


def trained(model: Any, inputs: dict[str, Tensor], terms: dict[str, Term] = TERMS) -> tuple[Any, Tensor]:
    """The tape of one forward in training mode, and the loss with the terms."""
    targets = inputs.get("decoder_input_ids", inputs["input_ids"])
    with record(model) as tape:
        loss = model(**inputs, labels=targets).loss
    return tape, loss + penalty(tape, terms)[0]


@every_family
@torch.no_grad()
def test_from_the_gate_the_model_stays_as_it_was(family):
    stock, model = stock_of(family), copy.deepcopy(stock_of(family))
    inputs = batch(stock)
    swapped = swap_routers(model)
    assert swapped.layers == [layer.name for layer in find_layers(stock)] == list(moe_layers(model))
    assert swapped.agreement is None
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)


@every_family
@torch.no_grad()
def test_greedy_text_is_that_of_the_stock_model_with_and_without_cache(family):
    stock, model = stock_of(family), swapped_of(family)
    ids = left_padded(stock)
    ids.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 4, "do_sample": False}
    texts = [
        one.generate(**ids, **options, use_cache=cache) for one, cache in ((stock, True), (model, True), (model, False))
    ]
    assert torch.equal(texts[0], texts[1])
    assert torch.equal(texts[0], texts[2])


@every_family
def test_terms_give_every_router_parameter_a_gradient(family):
    model = swapped_of(family).train()
    inputs = batch(model)
    tape, _ = trained(model, inputs)
    for item in tape:
        stack_length = inputs["decoder_input_ids" if "decoder" in item.name else "input_ids"].shape[1]
        assert item.routing.shape == (2, stack_length)
    penalty(tape, TERMS)[0].backward()
    for layer in moe_layers(model).values():
        for parameter in layer.router.parameters():
            assert parameter.grad is not None
            assert parameter.grad.abs().sum() > 0
        assert not any(tensor.requires_grad for tensor in layer.buffers())


@every_family
def test_undo_puts_the_stock_modules_back(family):
    model = copy.deepcopy(stock_of(family))
    before = dict(model.named_modules())
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    swapped = swap_routers(model)
    model.to(torch.float64).to(torch.float32)
    saved = model.state_dict()
    assert all(torch.equal(saved[name], tensor) for name, tensor in tensors.items())
    swapped.undo()
    swapped.undo()
    assert dict(model.named_modules()) == before
    after = model.state_dict()
    assert list(after) == list(tensors)
    assert all(torch.equal(after[name], tensor) for name, tensor in tensors.items())
    assert not any(module._forward_pre_hooks for module in model.modules())


@pytest.mark.parametrize("training", [True, False])
def test_undo_leaves_the_mode_that_the_model_is_in(training):
    model = stock_of("mixtral").train(not training)
    swapped = swap_routers(model)
    model.train(training)
    swapped.undo()
    assert {module.training for module in model.modules()} == {training}


@every_family
@torch.no_grad()
def test_copies_and_pickles_are_models_of_their_own(family):
    model = swapped_of(family)
    inputs = left_padded(model)
    want = model(**inputs).logits
    copies = [copy.deepcopy(model), pickle.loads(pickle.dumps(model))]
    for parameter in model.parameters():
        parameter.zero_()
    for one in copies:
        with record(one) as tape:
            assert torch.equal(one(**inputs).logits, want)
        assert tape[0].routing.mask is not None
        assert type(moe_layers(one)[tape[0].name]) is type(moe_layers(model)[tape[0].name])
        assert moe_layers(one)[tape[0].name].router is not moe_layers(model)[tape[0].name].router


@every_family
@torch.no_grad()
def test_stock_models_beside_it_are_as_before(family):
    stock, other = stock_of(family), build(family)
    inputs = batch(stock)
    want, kinds = stock(**inputs).logits, [type(module) for module in stock.modules()]
    attributes = {kind: dict(vars(kind)) for kind in set(kinds)}
    model = copy.deepcopy(stock)
    swap_routers(model, init="fresh")
    model(**inputs)
    assert [type(module) for module in stock.modules()] == kinds
    assert all(dict(vars(kind)) == attributes[kind] for kind in set(kinds))
    assert torch.equal(stock(**inputs).logits, want)
    assert torch.equal(other(**inputs).logits, want)
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stock.modules())


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4", "switch"])
def test_checkpointing_leaves_one_record_and_the_same_gradients(family, close):
    grads = []
    for checkpointed in (False, True):
        model = swapped_of(family).train()
        if checkpointed:
            model.gradient_checkpointing_enable()
        tape, loss = trained(model, left_padded(model))
        loss.backward()
        assert len(tape) == len(moe_layers(model))
        grads.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        close(grads[1][name], grad)


def test_a_recomputation_that_cannot_tell_its_mask_says_so(user_error):
    model = swapped_of("mixtral").train()
    model.gradient_checkpointing_enable()
    inputs = left_padded(model)
    model(**inputs).logits.sum().backward()
    losses = [model(**inputs).logits.sum(), model(**inputs).logits.sum()]  # the same mask
    sum(losses).backward()
    losses = [model(**inputs).logits.sum(), model(input_ids=inputs["input_ids"]).logits.sum()]
    with torch.no_grad():
        model(input_ids=inputs["input_ids"][:, :5])
    with user_error("different attention masks", "call backward after each forward"):
        sum(losses).backward()


@pytest.mark.parametrize("family", ["deepseek_v3", "glm4_moe", "ernie4_5_moe"])
def test_the_selection_bias_of_the_family_moves_with_attach(family):
    model = swapped_of(family).train()
    routers = [layer.router for layer in moe_layers(model).values()]
    stock = [layer.correction_bias for layer in find_layers(stock_of(family))]
    for router, bias in zip(routers, stock, strict=True):
        assert torch.equal(balanced_of(router)[0].bias, bias)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    attach(optimizer, model)
    counts = []
    for _ in range(2):  # two micro-batches
        tape, loss = trained(model, left_padded(model))
        loss.backward()
        counts.append([item.routing.counts() for item in tape])
    optimizer.step()
    for place, (router, bias) in enumerate(zip(routers, stock, strict=True)):
        load = sum(one[place] for one in counts)
        want = bias + 1e-3 * (load.sum() - load * load.numel()).sign()
        torch.testing.assert_close(balanced_of(router)[0].bias, want)
    kept = [tensor for name, tensor in model.state_dict().items() if name.endswith("correction_bias")]
    assert all(torch.equal(tensor.flatten(), bias) for tensor, bias in zip(kept, stock, strict=True))


@torch.no_grad()
def test_padding_has_no_expert_and_changes_no_other_token():
    stock, model = stock_of("mixtral"), swapped_of("mixtral")
    inputs = left_padded(stock)
    real = inputs["attention_mask"].bool()
    with record(model) as tape:
        got = model(**inputs).logits
    torch.testing.assert_close(got[real], stock(**inputs).logits[real], rtol=0, atol=1e-5)
    for item in tape:
        assert torch.equal(item.routing.mask, real.flatten())
        assert bool((item.routing.indices[~real.flatten()] == -1).all())


@torch.no_grad()
def test_a_cached_step_masks_its_own_token_alone():
    model = swapped_of("qwen3_moe")
    inputs = left_padded(model)
    past = model(**inputs, use_cache=True).past_key_values
    mask = torch.cat([inputs["attention_mask"], torch.tensor([[1], [0]])], 1)
    with record(model) as tape:
        model(input_ids=torch.tensor([[5], [6]]), attention_mask=mask, past_key_values=past)
    assert tape[0].routing.mask.tolist() == [True, False]
    assert tape[0].routing.shape == (2, 1)


@torch.no_grad()
def test_a_router_by_itself_is_of_no_call(close):
    model = swapped_of("mixtral")
    inputs, x = left_padded(model), torch.randn(48, 32)
    layer = next(iter(moe_layers(model).values()))
    before = layer(x)
    model(**inputs)
    assert inputs["input_ids"].numel() == len(x)
    close(layer(x)[1], before[1])
    assert layer(x[:0])[2].shape == (0, 2)


@torch.no_grad()
def test_calls_of_two_threads_keep_their_masks():
    model = swapped_of("mixtral")
    inner, outer = {**left_padded(model)}, {**left_padded(model)}
    inner["attention_mask"] = 1 - inner["attention_mask"].flip(0)
    masks: dict[str, Any] = {}

    def other() -> None:
        with record(model) as tape:
            model(**inner)
        masks["inner"] = tape[-1].routing.mask

    def between(*_: Any) -> None:
        thread = threading.Thread(target=other)
        handle.remove()
        thread.start()
        thread.join()

    handle = model.model.layers[1].register_forward_pre_hook(between)
    with record(model) as tape:
        model(**outer)
    assert torch.equal(tape[-1].routing.mask, outer["attention_mask"].flatten().bool())
    assert torch.equal(masks["inner"], inner["attention_mask"].flatten().bool())


@torch.no_grad()
def test_feed_reaches_the_routers():
    model = swapped_of("mixtral")
    inputs = batch(model)
    mask = torch.rand(inputs["input_ids"].shape) < 0.5
    with feed(model, mask=mask), record(model) as masked:
        model(**inputs)
    assert torch.equal(masked[0].routing.mask, mask.flatten())
    other = swapped_of("mixtral", init="fresh")
    with record(model) as tape:
        model(**inputs)
    with feed(other, replay=tape), record(other) as replayed:
        other(**inputs)
    for one, two in zip(tape, replayed, strict=True):
        assert torch.equal(one.routing.indices, two.routing.indices)
        assert not torch.equal(two.routing.live.indices, two.routing.indices)


@pytest.mark.parametrize("family", ["mixtral", "granitemoe"])
def test_stock_router_logits_and_loss_go_on_though_hooks_were_there(family):
    stock, model = stock_of(family), build(family)
    inputs = {**batch(stock), "labels": batch(stock)["input_ids"], "output_router_logits": True}
    want = stock(**inputs)
    model(**inputs, output_hidden_states=True)  # installs the hooks of transformers
    swapped = swap_routers(model)
    got = model(**inputs, output_hidden_states=True)
    assert len(got.router_logits) == len(want.router_logits) == len(swapped.layers)
    assert len(got.hidden_states) == model.config.num_hidden_layers + 1
    torch.testing.assert_close(got.aux_loss, want.aux_loss, rtol=0, atol=1e-5)
    torch.testing.assert_close(got.loss, want.loss, rtol=0, atol=1e-5)
    swapped.undo()
    assert torch.equal(model(**inputs).loss, want.loss)


@torch.no_grad()
def test_a_capacity_drops_the_tokens_that_the_stock_router_drops():
    stock = build("switch", expert_capacity=2)
    model = copy.deepcopy(stock)
    swap_routers(model)
    inputs = batch(stock)
    with record(model) as tape:
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)
    assert all(float(item.routing.dropped()) > 0 for item in tape)


@pytest.mark.parametrize(
    "changes", [{"norm_topk_prob": False}, {"n_group": 1, "topk_group": 1}, {"routed_scaling_factor": 0.5}]
)
@torch.no_grad()
def test_the_rule_is_read_from_the_router(changes):
    stock = build("deepseek_v3", **changes)
    model, inputs = copy.deepcopy(stock), batch(stock)
    swap_routers(model)
    torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)


def test_a_router_that_is_given_a_bias_by_its_layer_takes_it_once():
    transformers = pytest.importorskip("transformers")
    sizes = {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 8}
    stock = transformers.MiniMaxM2ForCausalLM(transformers.MiniMaxM2Config(**{**SIZES, **sizes})).eval()
    biases = [tensor for name, tensor in stock.named_buffers() if name.endswith("correction_bias")]
    for tensor in biases:
        tensor.copy_(torch.rand(8))
    model, inputs = copy.deepcopy(stock), batch(stock)
    swap_routers(model)
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs).logits, stock(**inputs).logits, rtol=0, atol=1e-5)
    for layer, bias in zip(moe_layers(model).values(), biases, strict=True):
        assert torch.equal(balanced_of(layer.router)[0].bias, bias)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.no_grad()
def test_in_half_precision_the_router_stays_in_fp32(dtype):
    model = swapped_of("deepseek_v3")
    weights = [layer.router.scorer.weight.clone() for layer in moe_layers(model).values()]
    model.to(dtype)
    for layer, weight in zip(moe_layers(model).values(), weights, strict=True):
        assert torch.equal(layer.router.scorer.weight, weight)
        assert layer.weight.dtype == dtype
        assert layer(torch.randn(3, 32, dtype=dtype))[1].dtype == dtype
    with record(model) as tape:
        assert model(**batch(model)).logits.isfinite().all()
    assert tape[0].routing.logits.dtype == torch.float32
