"""Watching Hugging Face models: the same numbers as a plain hook by hand, padding out, outputs untouched."""

from __future__ import annotations

import warnings
from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
from families import FAMILIES, batch, build
from torch import Tensor

from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.instruments import Inspector

pytest.importorskip("transformers")

family = pytest.mark.parametrize("family", list(FAMILIES))


def chosen_of(family: str, returned: Any) -> list[list[int]]:
    """The experts of each token in what a router returned, by the form that each family is known for."""
    if family == "llama4":
        return [[e for e, score in enumerate(row) if score > 0] for row in returned[0].tolist()]
    if family == "switch":
        rows = returned[0].flatten(0, 1).tolist()
        return [[e for e, on in enumerate(row) if on] for row in rows]
    return [row.tolist() for row in returned[2]]


def spy(model: torch.nn.Module, family: str) -> tuple[dict[str, list[Any]], list[Any]]:
    """Plain hooks of our own that note what each router read and chose."""
    seen: dict[str, list[Any]] = defaultdict(list)
    handles = [
        module.register_forward_hook(
            lambda _, args, out, name=name: seen[name].append((args[0].clone(), chosen_of(family, out)))
        )
        for name, module in model.named_modules()
        if name.split(".")[-1] in ("gate", "router")
    ]
    return seen, handles


def by_bincount(rows: list[list[int]], experts: int) -> list[int]:
    counts = [0] * experts
    for row in rows:
        for e in row:
            counts[e] += 1
    return counts


@family
@torch.no_grad()
def test_counts_are_those_of_a_plain_hook(family):
    model = FAMILIES[family]()
    seen, _ = spy(model, family)
    with watch_transformers(model) as watching:
        model(**batch(model))
        model(**batch(model, rows=3, length=9, seed=1))
        calls = watching.drain()
    assert watching.drain() == []
    assert [call.layer.name for call in calls] == [layer.name for layer in watching.layers for _ in range(2)]
    mine: dict[str, list[Any]] = defaultdict(list)
    for call in calls:
        mine[call.layer.name].append(call)
    for name, notes in seen.items():
        for call, (tokens, rows) in zip(mine[name.rsplit(".", 1)[0]], notes, strict=True):
            assert call.routing.counts().tolist() == by_bincount(rows, call.layer.num_experts)
            assert sum(by_bincount(rows, call.layer.num_experts)) == len(rows) * call.layer.top_k
            assert torch.equal(call.tokens, tokens.reshape(-1, 32))
            again = call.layer.route(call.tokens)
            assert torch.equal(again.indices, call.routing.indices)
            torch.testing.assert_close(again.scores, call.routing.scores)


@family
@torch.no_grad()
def test_sequences_have_their_shape(family):
    model = FAMILIES[family]()
    with watch_transformers(model) as watching:
        model(**batch(model, rows=3, length=10))
        for call in watching.drain():
            assert call.routing.shape == (3, 6 if call.layer.stack == "decoder" else 10)
            assert call.routing.mask is None
    with watch_transformers(model) as watching:
        inputs = batch(model, rows=3, length=10)
        embedded = {"inputs_embeds": model.get_input_embeddings()(inputs.pop("input_ids"))}
        model(**embedded, **inputs)
        assert watching.drain()[0].routing.shape == (3, 10)


@family
@torch.no_grad()
def test_outputs_are_the_same_bit_by_bit_and_hooks_go(family):
    model = FAMILIES[family]()
    inputs = batch(model)
    plain = model(**inputs).logits
    with watch_transformers(model) as watching:
        watched = model(**inputs).logits
        watching.drain()
    assert torch.equal(plain, watched)
    with pytest.raises(KeyError, match="mine"), watch_transformers(model):
        raise KeyError("mine")
    for module in model.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    model(**inputs)
    assert watching.drain() == []


def padded(model: Any, side: str) -> tuple[dict[str, Tensor], list[Tensor]]:
    """Two rows of which one has 7 tokens of padding, and the masks of encoder (or model) and decoder."""
    inputs, masks = batch(model), []
    for name in ("input_ids", "decoder_input_ids"):
        if name in inputs:
            mask = torch.ones_like(inputs[name])
            mask[1, slice(0, 7) if side == "left" else slice(-7, None)] = 0
            inputs[name] = inputs[name] * mask
            masks.append(mask)
    return inputs, masks


@family
@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padding_has_no_expert(family, side):
    model = FAMILIES[family]()
    inputs, masks = padded(model, side)
    inputs["attention_mask"] = masks[0]
    if len(masks) > 1:
        inputs["decoder_attention_mask"] = masks[1]
    seen, _ = spy(model, family)
    with watch_transformers(model) as watching:
        model(**inputs)
        calls = {call.layer.name: call for call in watching.drain()}
    for name, [(_, rows)] in seen.items():
        call = calls[name.rsplit(".", 1)[0]]
        mask = masks[-1 if call.layer.stack == "decoder" else 0].flatten().bool()
        assert torch.equal(call.routing.mask, mask)
        real = [row for row, on in zip(rows, mask.tolist(), strict=True) if on]
        assert call.routing.counts().tolist() == by_bincount(real, call.layer.num_experts)
        assert bool((call.routing.indices[~mask] == -1).all())
        assert bool((call.routing.weights[~mask] == 0).all())


@pytest.mark.parametrize(("family", "cache"), [*((family, None) for family in FAMILIES), ("mixtral", "static")])
@torch.no_grad()
def test_generation_is_seen_token_by_token(family, cache):
    """With a static cache the stack gets masks of all keys."""
    model = FAMILIES[family]()
    ids = batch(model, length=12)["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    options: dict[str, Any] = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "use_cache": True}
    options["cache_implementation"] = cache
    plain = model.generate(input_ids=ids, attention_mask=mask, **options)
    seen, _ = spy(model, family)
    with watch_transformers(model) as watching:
        watched = model.generate(input_ids=ids, attention_mask=mask, **options)
        calls = watching.drain()
    assert torch.equal(plain, watched)
    for layer in watching.layers:
        mine = [call.routing for call in calls if call.layer is layer]
        assert len(mine) == len(next(seen[name] for name in seen if name.startswith(layer.name)))
        real = sum(len(routing.indices) if routing.mask is None else int(routing.mask.sum()) for routing in mine)
        new = 2 * 3 if layer.stack != "encoder" else 0  # the last of four new tokens is not read
        start = 2 if layer.stack == "decoder" else int(mask.sum())
        assert real == start + new
        assert sum(int(routing.counts().sum()) for routing in mine) == real * layer.top_k


@family
@pytest.mark.parametrize("reentrant", [False, True])
def test_recomputation_is_not_seen(family, reentrant):
    model = FAMILIES[family]().train()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its new name is not in older versions
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    seen, _ = spy(model, family)
    inputs = batch(model)
    inputs["labels"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    with watch_transformers(model) as watching:
        model(**inputs).loss.backward()
        calls = watching.drain()
    assert [call.layer for call in calls] == watching.layers
    assert not any(call.routing.logits.requires_grad or call.tokens.requires_grad for call in calls)
    if not reentrant:
        assert any(len(notes) == 2 for notes in seen.values())  # a plain hook does see it


@torch.no_grad()
def test_tokens_that_overran_a_capacity_are_dropped():
    model = build("switch", expert_capacity=2)
    seen, _ = spy(model, "switch")
    mask = torch.ones(2, 24, dtype=torch.int64)
    mask[0, -4:] = 0
    with watch_transformers(model) as watching:
        model(**batch(model), attention_mask=mask)
        calls = {call.layer.name: call for call in watching.drain()}
    for name, [(_, rows)] in seen.items():
        call = calls[name.rsplit(".", 1)[0]]
        encoder = call.layer.stack == "encoder"
        real = [row for row, on in zip(rows, mask.flatten().tolist(), strict=True) if on] if encoder else rows
        filled = sum(map(len, real))
        assert filled < len(real)
        assert int(call.routing.asked) == len(real)
        assert int(call.routing.counts().sum()) == filled
        assert float(call.routing.dropped()) == pytest.approx(1 - filled / len(real))
        assert torch.equal(call.routing.indices[:, 0] < 0, call.routing.weights[:, 0] == 0)
        assert int((call.layer.route(call.tokens).indices < 0).sum()) == 0  # alone, none is dropped


@torch.no_grad()
def test_only_layers_in_training_if_so_asked():
    model = FAMILIES["olmoe"]()
    with watch_transformers(model, tokens=False, training_only=True) as watching:
        model(**batch(model))
        assert watching.drain() == []
        model.train()(**batch(model))
        calls = watching.drain()
    assert len(calls) == 3
    assert {call.tokens.shape for call in calls} == {(0, 32)}
    assert {int(call.routing.counts().sum()) for call in calls} == {2 * 48}


@torch.no_grad()
def test_a_model_inside_others_keeps_its_names():
    model = FAMILIES["mixtral"]()
    inputs = batch(model)
    mask = torch.ones_like(inputs["input_ids"])
    mask[0, :3] = 0
    wrapped = torch.nn.DataParallel(model)  # on a CPU: calls its module
    with watch_transformers(wrapped) as watching:
        wrapped(**inputs, attention_mask=mask)
        calls = watching.drain()
    assert calls[0].layer.name.endswith("model.layers.0.mlp")
    assert int(calls[0].routing.mask.sum()) == int(mask.sum())
    with watch_transformers(model) as watching:
        model.model(inputs["input_ids"], mask)  # by position, without the head
        assert int(watching.drain()[0].routing.mask.sum()) == int(mask.sum())


@torch.no_grad()
def test_an_unknown_return_is_named_when_read(user_error):
    model = FAMILIES["mixtral"]()
    with watch_transformers(model) as watching:
        model(**batch(model))
        watching.calls[1][0] = replace(watching.calls[1][0], returned=("words",))
        with user_error("model.layers.1.mlp", "cannot read"):
            watching.drain()


def test_layers_are_those_that_are_found():
    model = FAMILIES["switch"]()
    with watch_transformers(model) as watching:
        assert [layer.name for layer in watching.layers] == [layer.name for layer in find_layers(model)]


def test_a_router_of_two_layers_is_refused(user_error):
    model = build("mixtral")
    model.model.layers[1].mlp.gate = model.model.layers[0].mlp.gate
    with user_error("model.layers.0.mlp", "model.layers.1.mlp", "share"), watch_transformers(model):
        pass


def test_weights_on_disk_are_not_inspected(user_error):
    """Loads can be seen, but routers and experts not be run by themselves."""
    model = FAMILIES["mixtral"]()
    model.model.layers[1].to("meta")
    with (
        watch_transformers(model) as watching,
        user_error("model.layers.1.mlp", "not in memory", "load the whole model"),
    ):
        Inspector(watching.layers)
