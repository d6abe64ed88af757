"""The classifier of signals: whole records are routed, by their spectrum, to experts of unequal width."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from seeds import shifted

from spectralmoe import Context, LinearScorer, Router, TopK, load, record, save
from spectralmoe.models import SignalMoE, signal_experts, signal_moe

SIZES = {"width": 6, "num_experts": 2, "hidden": 8}


def signals(n=5, length=80):
    return torch.randn(n, length, dtype=torch.complex64)


def test_each_record_takes_one_expert_and_only_that_one_runs(close):
    model, x = signal_moe(21, **SIZES, depth=2).eval(), signals()
    with record(model, keep=("input", "output")) as tape:
        logits = model(x)
    assert logits.shape == (5, 21)
    assert [item.name for item in tape] == ["blocks.0.moe", "blocks.1.moe"]
    for item in tape:
        assert item.routing.indices.shape == (5, 1)
        assert tuple(item.input.shape) == (5, 6, 16, 2)
    layer, item = model.blocks[0].moe, tape[0]
    with torch.no_grad():
        x_in = model.blocks[0].norm(model.stem(model.spectrogram(x)))
        every = torch.stack([layer.experts.expert(x_in, e) for e in range(2)], 1)
        masked = (every * item.routing.gates()[..., None, None, None]).sum(1)
        close(layer(x_in, context=Context(samples={"map": x})), masked)


def test_the_spectrogram_of_a_tone_is_a_line():
    model, time = signal_moe(2, **SIZES), torch.arange(256)
    for bin_ in (3, 40):
        map_ = model.spectrogram(torch.exp(2j * math.pi * bin_ / 64 * time)[None].to(torch.complex64))
        assert map_.shape == (1, 1, 64, 16)
        assert (map_[0, 0, :, 2:-2].argmax(0) == bin_).all()
        assert abs(float(map_.mean())) < 1e-5
    real = torch.cos(2 * math.pi * 8 / 64 * time)[None]
    lines = model.spectrogram(real)[0, 0, :, 4]
    assert set(lines.topk(2).indices.tolist()) == {8, 56}


def test_the_scale_of_a_record_changes_the_choice_alone():
    model, x = signal_moe(3, **SIZES), signals()
    torch.testing.assert_close(model.spectrogram(3 * x), model.spectrogram(x), rtol=0, atol=1e-3)


def test_experts_grow_from_an_eighth():
    bank = signal_experts(3, 4, 32)
    assert [expert.hidden for expert in bank.experts] == [4, 11, 32]
    assert [expert.hidden for expert in signal_experts(1, 4, 32).experts] == [32]
    costs = bank.costs((4, 10, 10))
    assert costs.tolist() == [2 * 100 * 9 * (8 * h + h * h) for h in (4, 11, 32)]


def test_routers_alone_differ_under_one_seed():
    states = []
    for router in (None, lambda dim, experts: Router(LinearScorer(dim, experts), TopK(1))):
        torch.manual_seed(shifted(0))
        model = signal_moe(4, **SIZES, **({} if router is None else {"router": router}))
        states.append({name: value for name, value in model.state_dict().items() if "router" not in name})
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_saved_copied_and_trained(tmp_path):
    model, x = signal_moe(4, **SIZES), signals()
    model(x).square().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        assert model(x).isfinite().all()
    save(model.eval(), tmp_path)
    again = load(tmp_path)
    assert isinstance(again, SignalMoE)
    assert torch.equal(again(x), model(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_mistakes_are_named(user_error):
    with user_error("SignalMoE: depth must be at least 1"):
        signal_moe(3, depth=0)
    for x in (torch.randn(2, 3, 64), torch.randn(2, 79)):
        with user_error("SignalMoE reads signals (B, T) of at least 80 samples"):
            signal_moe(3, **SIZES)(x)


@pytest.mark.full
def test_compiled_it_gives_the_same(close):
    torch.compiler.reset()
    model, x = signal_moe(4, **SIZES).eval(), signals()
    close(torch.compile(model, backend="aot_eager")(x), model(x))
