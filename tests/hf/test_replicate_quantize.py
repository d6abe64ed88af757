"""Replicate-and-Quantize of Hugging Face models: the function, the folder, and families that cannot have copies."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from families import FAMILIES, MORE, batch, build
from torch import nn

from spectralmoe import record
from spectralmoe.compression import fake_quantize
from spectralmoe.diagnostics import load_imbalance
from spectralmoe.hf import (
    distill_to_gate,
    fold_routers,
    load_swapped,
    replicate_and_quantize_experts,
    save_swapped,
    swap_routers,
)
from spectralmoe.hf.layers import find_layers
from spectralmoe.hf.routers.rules import read_rule

transformers = pytest.importorskip("transformers")

SOME = ("mixtral", "deepseek_v3", "gpt_oss")
every_family = pytest.mark.parametrize(
    "family", [pytest.param(name, marks=[] if name in SOME else pytest.mark.full) for name in (*FAMILIES, *MORE)]
)


@functools.cache
def stock_of(family: str) -> Any:
    """The tiny model, not to be changed."""
    return build(family)


@torch.no_grad()
def logits_of(model: Any) -> torch.Tensor:
    return model(**batch(model)).logits


@every_family
def test_the_function_stays_and_loads_are_shared_or_the_family_is_refused(family, close, user_error):
    model = stock_of(family)
    calibration = [batch(model)]
    options = {"importance": "frequency", "bits": 32, "copies": 2}
    if any("indices" not in read_rule(layer)[0].roles for layer in find_layers(model)):
        assert family not in SOME
        with user_error("call stacked experts by their index", "copies=0"):
            replicate_and_quantize_experts(model, calibration, **options)
        alone = replicate_and_quantize_experts(model, calibration, **{**options, "copies": 0})
        close(logits_of(alone.model), logits_of(model))
        return
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = replicate_and_quantize_experts(model, calibration, **options)
    close(logits_of(report.model), logits_of(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    with record(report.model) as tape:
        logits_of(report.model)
    for item in tape:
        done = report.layers[item.name]
        assert sum(done.places) == len(done.places) + 2
        assert load_imbalance(item) == pytest.approx(done.imbalance_before)
        assert load_imbalance(item, physical=True) == pytest.approx(done.imbalance_after)


@pytest.mark.parametrize("keep", [True, False])
def test_the_busiest_and_the_least_are_quantised_and_nothing_else(keep):
    model = stock_of("mixtral")
    report = replicate_and_quantize_experts(model, [batch(model)], bits=3, quantize=2, keep_original=keep)
    for old, new in zip(find_layers(model), find_layers(report.model), strict=True):
        done, e = report.layers[old.name], old.num_experts
        (busy,) = done.replicated
        assert new.num_experts == e
        low = {*done.quantised, e} | (set() if keep else {busy})
        for name, stack in new.stacks().items():
            assert len(stack) == e + 1
            for place, got in enumerate(stack):
                was = old.stacks()[name][busy if place == e else place]
                assert torch.equal(got, fake_quantize(was, 3) if place in low else was)
    assert report.bytes_after <= report.bytes_before


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe"])
def test_the_folder_holds_the_copies_and_a_stock_model_without(family, tmp_path, close, user_error):
    model = stock_of(family)
    made = replicate_and_quantize_experts(model, [batch(model)], importance="reap", bits=4, copies=2).model
    wanted = logits_of(made)
    close(logits_of(copy.deepcopy(made)), wanted)
    save_swapped(made, tmp_path / "model")
    again = load_swapped(tmp_path / "model")
    close(logits_of(again), wanted)
    for placed in (made, copy.deepcopy(made), again):
        with user_error("holds copies of experts", "use save_swapped(model, folder)"):
            placed.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain").exists()
    save_swapped(copy.deepcopy(again), tmp_path / "model")
    assert [layer.router.placement.table.tolist() for layer in find_layers(again)] == [
        layer.router.placement.table.tolist() for layer in find_layers(made)
    ]
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model").eval()
    close(logits_of(plain), wanted)  # original and copies are the same integers


def test_without_copies_the_model_is_a_stock_one(tmp_path, close):
    model = stock_of("mixtral")
    report = replicate_and_quantize_experts(model, [batch(model)], importance="random", bits=2, copies=0, quantize=4)
    assert type(report.model) is type(model)
    assert all(
        type(a.router) is type(b.router) for a, b in zip(find_layers(model), find_layers(report.model), strict=True)
    )
    report.model.save_pretrained(tmp_path)
    plain = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    close(logits_of(plain), logits_of(report.model))
    assert not torch.allclose(logits_of(plain), logits_of(model))


def test_damaged_copies_are_refused(tmp_path, user_error):
    from safetensors.torch import load_file, save_file

    from spectralmoe.digests import sha256_of
    from spectralmoe.hf.routers.files import ROUTERS, TENSORS
    from spectralmoe.json_files import read_json, write_json

    model = stock_of("mixtral")
    made = replicate_and_quantize_experts(model, [batch(model)], importance="random").model
    save_swapped(made, tmp_path / "model")
    tensors = load_file(tmp_path / "model" / TENSORS)
    save_file({n: v for n, v in tensors.items() if "copies.down" not in n}, tmp_path / "model" / TENSORS)
    config = read_json(tmp_path / "model" / ROUTERS)
    write_json(tmp_path / "model" / ROUTERS, {**config, "sha256": sha256_of(tmp_path / "model" / TENSORS)})
    with user_error("copies of", "do not fit", "missing 'down_proj'"):
        load_swapped(tmp_path / "model")


def test_mistakes_are_named(user_error):
    model = stock_of("mixtral")
    calibration = [batch(model)]
    with user_error("wanda", "hidden activations"):
        replicate_and_quantize_experts(model, calibration, importance="wanda")
    with user_error("bits", "got 1"):
        replicate_and_quantize_experts(model, calibration, bits=1)
    with user_error("needs text"):
        replicate_and_quantize_experts(model, [])
    with user_error("training mode"):
        replicate_and_quantize_experts(copy.deepcopy(model).train(), calibration)
    placed = replicate_and_quantize_experts(model, calibration, importance="random").model
    for undone in (fold_routers, lambda model: distill_to_gate(model, calibration)):
        with user_error("copies of experts", "before replicate_and_quantize_experts"):
            undone(placed)
    swap_routers(swapped := copy.deepcopy(model))
    with user_error("was swapped"):
        replicate_and_quantize_experts(swapped, calibration)
    with user_error("takes a model of transformers"):
        replicate_and_quantize_experts(nn.Linear(2, 2).eval(), calibration)
