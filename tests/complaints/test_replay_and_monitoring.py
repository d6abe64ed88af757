"""Replay of a recorded choice, what to watch in a run, and routers and experts of one's own.

Threads: Megatron-LM #2398, #4168; trl #4611; NeMo Automodel #1232; DeepSpeed #2517; Tutel #226.
"""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from spectralmoe import (
    Balanced,
    ExpertChoice,
    Experts,
    LinearScorer,
    ModuleExperts,
    MoE,
    Router,
    TopK,
    feed,
    load,
    record,
    save,
)
from spectralmoe.instruments.monitor import Monitor
from spectralmoe.instruments.monitor_log import read_monitor


def test_megatron_4168_the_choice_is_replayed_and_the_weights_are_live(make_net, close, router_grads):
    """Megatron-LM #4168: In reinforcement learning the trainer routes other tokens than the sampler did, and training
    is unstable.

    Here the choices of one forward are reused in another, on other weights; the combine weights come from the live
    logits, with their gradient.
    """
    sampler, x = make_net(), torch.randn(40, 16)
    with record(sampler) as old:
        sampler(x)
    trainer = copy.deepcopy(sampler)
    with torch.no_grad():
        for p in trainer.parameters():
            p += 0.3 * torch.randn_like(p)
    with record(trainer) as free:
        trainer(x)
    with feed(trainer, replay=old), record(trainer) as new:
        trainer(x).square().mean().backward()
    assert any(not torch.equal(one.routing.indices, two.routing.indices) for one, two in zip(free, old, strict=True))
    for one, two in zip(new, old, strict=True):
        logits, weights, indices = one.routing
        assert torch.equal(indices, two.routing.indices)
        close(weights, logits.softmax(-1).gather(1, indices))
    assert torch.equal(new[0].routing.logits, free[0].routing.logits)
    assert all(grad.any() for grad in router_grads(trainer))


def test_megatron_4168_a_replay_that_does_not_fit_is_an_error(make_net, user_error):
    """Megatron-LM #4168: Other tokens than the recorded ones would be routed by chance."""
    net = make_net()
    with record(net) as old:
        net(torch.randn(40, 16))
    with user_error("N=40", "N=39"), feed(net, replay=old):
        net(torch.randn(39, 16))


def watched_run(net, path, **options):
    """Two reports of three steps each on 40 tokens; the lines, and the counts of each layer by hand."""
    counts = {}
    with Monitor(net.train(), path, every=3, **options) as monitor:
        for step in range(1, 7):
            with record(net) as tape:
                net(torch.randn(40, 16)).square().mean().backward()
            for item in tape:
                counts[item.name] = counts.get(item.name, 0) + item.routing.counts()
            monitor.step(step)
            if step == 3:
                counts = {}
    return read_monitor(path), counts


@pytest.mark.parametrize("depth", [1, 12])
def test_automodel_1232_a_handful_of_values_whatever_the_depth(make_net, tmp_path, depth):
    """NeMo Automodel #1232: Values for every expert of every layer made thousands of series, and loggers gave up.

    Here a report is one line of the same few values for one layer as for twelve.
    """
    lines, _ = watched_run(make_net(depth=depth), tmp_path / "monitor.jsonl")
    steps = [line for line in lines if line["kind"] == "step"]
    assert [line["step"] for line in steps] == [3, 6]
    assert not any(line["kind"] == "load" for line in lines)
    for line in steps:
        assert len(line) < 12
        assert all(not isinstance(value, list | dict) for value in line.values())
        assert line["tokens"] == 120


def test_megatron_2398_and_trl_4611_the_load_of_every_expert_when_asked_for(make_net, tmp_path):
    """Megatron-LM #2398, trl #4611: Users could not see how many tokens each expert got, nor which were dead.

    Here the shares of all experts are written on request; they are those of the counts, and the summary agrees.
    """
    lines, counts = watched_run(make_net(depth=3), tmp_path / "monitor.jsonl", layers=True)
    shares = [line["shares"] for line in lines if line["kind"] == "load"][-1]
    summary = [line for line in lines if line["kind"] == "step"][-1]
    assert shares.keys() == counts.keys()
    for name, found in counts.items():
        assert shares[name] == pytest.approx((found / found.sum()).tolist(), abs=1e-5)
    worst = max(float(found.max() / found.float().mean() - 1) for found in counts.values())
    assert summary["max_vio_worst"] == pytest.approx(worst, abs=1e-4)


def test_megatron_2398_dead_experts_are_named_in_the_step_they_die(make_net, tmp_path):
    """Megatron-LM #2398: The same for an expert that is never chosen: a finding, once, with the layer."""
    net = make_net(lambda: Balanced(2, rate=0.0), depth=2)
    net.blocks[1].moe.router.selector.bias[3] = -10
    lines, _ = watched_run(net, tmp_path / "monitor.jsonl")
    assert [line["dead_experts"] for line in lines if line["kind"] == "step"] == [1, 1]
    found = [line for line in lines if line["kind"] == "finding" and line["finding"]["kind"] == "dead_experts"]
    assert [(line["step"], line["finding"]["layer"]) for line in found] == [(3, 1)]


@pytest.mark.parametrize("capacity", [0.5, 1.0, 2.0])
def test_deepspeed_2517_expert_choice(chooser, close, capacity):
    """DeepSpeed #2517: Asked for in another library: experts that choose their tokens.

    Here every expert takes the same number of tokens, those that score highest for it, however skewed the router.
    """
    layer, x = chooser(ExpertChoice(capacity)), torch.randn(40, 16)
    x[:, 0] += 5
    with record(layer) as tape:
        y = layer(x)
    routing = tape[0].routing
    places = int(40 * capacity / 4)
    assert routing.counts().tolist() == [places] * 4
    scores, want = x[:, :4].softmax(-1), torch.zeros_like(x)
    for e in range(4):
        best = scores[:, e].argsort(descending=True)[:places]
        assert set((routing.indices == e).any(1).nonzero().flatten().tolist()) == set(best.tolist())
        want[best] += scores[best, e, None] * layer.experts.expert(x[best], e)
    close(y, want.detach())


class Scaled(Experts):
    """An expert is a vector that multiplies the token: nothing but the definition."""

    def __init__(self, num_experts, dim):
        super().__init__(num_experts)
        self.dim, self.scale = dim, nn.Parameter(torch.randn(num_experts, dim))

    def expert(self, x, e):
        return x * self.scale[e]


def test_tutel_226_experts_of_ones_own(tmp_path, close):
    """Tutel #226: Asked for in another library: experts that are not its feed-forward networks.

    Here any modules will do, also different ones, and a new kind of bank is one method; it runs under every dispatch
    and is saved and read back.
    """
    different = [nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 3), nn.Tanh(), nn.Linear(3, 8)), nn.Identity()]
    for bank in (ModuleExperts(different), Scaled(3, 8)):
        x, outputs = torch.randn(20, 8), []
        for dispatch in ("loop", "grouped", "dense"):
            layer = MoE(Router(LinearScorer(8, 3), TopK(2)), bank, dispatch=dispatch).eval()
            with torch.no_grad():
                layer.router.scorer.weight.copy_(torch.eye(3, 8))
            outputs.append(layer(x))
        close(outputs[1], outputs[0])
        close(outputs[2], outputs[0])
        save(layer, tmp_path / "layer")
        twin = MoE(Router(LinearScorer(8, 3), TopK(2)), copy.deepcopy(bank), dispatch="dense")
        with torch.no_grad():
            for p in twin.parameters():
                p.zero_()
        assert torch.equal(load(tmp_path / "layer", into=twin)(x), outputs[2])
