"""Swapped routers as the instruments, PEFT, files and torch.compile see them."""

from __future__ import annotations

import copy
import json
from typing import Any

import pytest
import torch
from families import batch, build, left_padded, stock_of

from spectralmoe import Term, attach, penalty, record
from spectralmoe.diagnostics.watch import watch
from spectralmoe.hf import swap_routers, trainer_callback
from spectralmoe.hf.language import training_facts
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments import Inspector, Monitor
from spectralmoe.layers import moe_layers
from spectralmoe.regularizers import load_balance

transformers = pytest.importorskip("transformers")


def swapped_of(family: str, *args: Any, **options: Any) -> Any:
    """A copy of it with routers of this library."""
    model = copy.deepcopy(stock_of(family))
    swap_routers(model, *args, **options)
    return model


@pytest.mark.parametrize("family", ["mixtral", "deepseek_v3", "llama4", "switch", "ernie4_5_moe"])
@torch.no_grad()
def test_every_watch_sees_what_it_sees_of_the_stock_model(family):
    stock, model = stock_of(family), swapped_of(family)
    inputs = left_padded(stock)
    calls = []
    for one, watching in ((stock, watch_transformers), (model, watch_transformers), (model, watch)):
        with watching(one) as seen:
            one(**inputs)
            calls.append(seen.drain())
    assert [call.layer.name for call in calls[0]] == [call.layer.name for call in calls[1]]
    assert [call.layer.name for call in calls[0]] == [call.layer.name for call in calls[2]]
    for theirs, *ours in zip(*calls, strict=True):
        real = slice(None) if theirs.routing.mask is None else theirs.routing.mask
        for mine in ours:
            assert torch.equal(mine.routing.counts(), theirs.routing.counts())
            assert mine.routing.shape == theirs.routing.shape
            torch.testing.assert_close(mine.tokens[real], theirs.tokens[real], rtol=0, atol=1e-5)
            torch.testing.assert_close(mine.layer.matrix, theirs.layer.matrix)
            assert (mine.layer.num_experts, mine.layer.top_k) == (theirs.layer.num_experts, theirs.layer.top_k)
            x = mine.tokens[:3]
            torch.testing.assert_close(mine.layer.expert(x, 1), theirs.layer.expert(x, 1))
            assert torch.equal(mine.layer.expert_weights(1), theirs.layer.expert_weights(1))
            assert torch.equal(mine.layer.route(x).counts(), theirs.layer.route(x).counts())
            assert mine.layer.reroutes == theirs.layer.reroutes


def test_an_inspection_reads_the_router_that_is_in():
    stock, model = stock_of("mixtral"), swapped_of("mixtral", "prototype", init="fresh")
    inspections = []
    for one in (stock, model):
        with watch_transformers(one) as seen, torch.no_grad():
            inspector = Inspector(seen.layers, seed=0)
            one(**left_padded(one))
            inspector.add(seen.drain(), None)
            inspections.append(inspector.layers())
    theirs, ours = inspections
    assert [layer["name"] for layer in theirs] == [layer["name"] for layer in ours]
    assert [layer.keys() for layer in theirs] == [layer.keys() for layer in ours]
    assert training_facts(model)["top_k"] == 2
    assert training_facts(swapped_of("deepseek_v3"))["correction_bias"]


def test_a_monitor_counts_what_the_tapes_count():
    model = swapped_of("mixtral").train()
    with Monitor(model, every=2) as monitor:
        for _ in range(2):
            with record(model) as tape:
                model(**left_padded(model))
            monitor.step()
    assert monitor.last["tokens"] == 2 * int(tape[0].routing.mask.sum())


def test_a_part_of_the_layers_is_seen_beside_stock_ones():
    model = swapped_of("mixtral", layers="*.1.mlp")
    with watch_transformers(model) as seen, torch.no_grad():
        model(**left_padded(model))
        calls = seen.drain()
    assert [call.layer.name for call in calls] == [f"model.layers.{n}.mlp" for n in range(3)]
    assert all(call.routing.mask is not None for call in calls)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "deepseek_v3", "gpt_oss", "switch", "ernie4_5_moe"])
@torch.no_grad()
def test_a_saved_model_is_the_one_before_the_swap_in_plain_transformers(family, tmp_path):
    stock, model = stock_of(family), swapped_of(family)
    for layer in moe_layers(model).values():
        layer.router.scorer.weight.add_(1)
    model.save_pretrained(tmp_path)
    loaded, info = type(stock).from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert all(".router." in name for name in info["unexpected_keys"])
    inputs = batch(stock)
    torch.testing.assert_close(loaded.eval()(**inputs).logits, stock(**inputs).logits)


def test_peft_trains_a_copy_of_the_router_and_the_dead_one_is_left_out(user_error):
    peft = pytest.importorskip("peft")
    model = copy.deepcopy(stock_of("mixtral"))
    swapped = swap_routers(model)
    names, inputs = list(moe_layers(model)), left_padded(model)
    experts = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    lora = peft.LoraConfig(r=2, target_modules=[], target_parameters=experts, modules_to_save=["gate"])
    wrapped = peft.get_peft_model(model, lora).train()
    assert list(moe_layers(wrapped)) == names == [layer.name for layer in find_layers(wrapped)]
    optimizer = torch.optim.SGD((p for p in wrapped.parameters() if p.requires_grad), lr=0.1)
    attach(optimizer, wrapped)
    with record(wrapped) as tape, watch_transformers(wrapped) as seen:
        loss = wrapped(**inputs, labels=inputs["input_ids"]).loss
        calls = seen.drain()
    assert [item.name for item in tape] == [call.layer.name for call in calls] == names
    assert tape[0].routing.mask is not None
    (loss + penalty(tape, {"balance": Term(load_balance, 0.1)})[0]).backward()
    for layer in moe_layers(wrapped).values():
        assert layer.router.scorer.weight.grad.abs().sum() > 0
    stock = [module for name, module in wrapped.named_modules() if name.endswith("gate.original_module")]
    assert all(parameter.grad is None for module in stock for parameter in module.parameters())
    before = stock[0].router.scorer.weight.clone()
    optimizer.step()
    assert torch.equal(stock[0].router.scorer.weight, before)
    with user_error("PEFT trains a copy of a router", "merge or unload"):
        swapped.undo()
    merged = wrapped.merge_and_unload()
    assert list(moe_layers(merged)) == names
    assert not torch.equal(moe_layers(merged)[names[0]].router.scorer.weight, before)
    swapped.undo()
    assert [type(layer.router) for layer in find_layers(merged)] == [
        type(each.router) for each in find_layers(stock_of("mixtral"))
    ]


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_model_is_the_same_and_is_recorded(close):
    model = build("mixtral", num_hidden_layers=1).train()
    swap_routers(model)
    inputs = left_padded(model)
    results = []
    for one in (model, torch.compile(model, backend="aot_eager")):
        model.zero_grad()
        with record(one) as tape:
            loss = one(**inputs, labels=inputs["input_ids"], use_cache=False).loss
        (loss + penalty(tape, {"balance": Term(load_balance, 0.1)})[0]).backward()
        assert torch.equal(tape[0].routing.mask, inputs["attention_mask"].flatten().bool())
        results.append([loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)])
    assert len(results[0]) == len(results[1])
    for eager, compiled in zip(*results, strict=True):
        close(compiled, eager)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "backend", ["aot_eager", pytest.param("inductor", marks=[pytest.mark.inductor, pytest.mark.full])]
)
def test_a_router_compiles_whole(backend, close):
    layer = next(iter(moe_layers(swapped_of("deepseek_v3")).values()))
    compiled, x = torch.compile(layer, backend=backend, fullgraph=True), torch.randn(7, 32)
    logits, weights, indices = layer(x)
    compiled_logits, compiled_weights, compiled_indices = compiled(x)
    close(compiled_logits, logits)
    close(compiled_weights, weights)
    assert torch.equal(compiled_indices, indices)


def test_the_callback_of_the_trainer_watches_swapped_and_stock_layers(tmp_path):
    pytest.importorskip("accelerate")
    model = swapped_of("mixtral", layers="*.1.mlp").train()
    path = tmp_path / "monitor.jsonl"
    callback = trainer_callback(path, every=1, layers=True)
    callback.on_train_begin(None, None, None, model=model)
    with torch.no_grad():
        model(**left_padded(model))
    callback.monitor.step()
    callback.on_train_end(None, None, None)
    assert callback.monitor.last["tokens"] == int(left_padded(model)["attention_mask"].sum())
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert any(len(row.get("layers", [])) == 3 for row in rows), rows
