"""Several processes: gradients, uninitialised memory, where experts live, files.

Run as a script, this file is one of two gloo processes: it runs every function of ``CHECKS`` and leaves what they
found in a folder, for the tests to compare with one process.

Threads: transformers #48205, #48687; Tutel #178, #248, #251; Megatron-LM #1498.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RANKS, Ranks, work
from seeds import generator, shifted
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from spectralmoe import (
    Balanced,
    Capacity,
    FeedForward,
    LinearScorer,
    MoE,
    Router,
    TopK,
    TopP,
    after_step,
    load,
    record,
    save,
    shard_routers,
)

N, D, E = 20, 8, 5


def make_net():
    torch.manual_seed(shifted(0))
    return nn.Sequential(nn.Linear(D, D), MoE(Router(LinearScorer(D, E), TopK(2)), FeedForward(E, D, 16, bias=True)))


def batches():
    """(ranks, N, D)"""
    return torch.randn(RANKS, N, D, generator=generator(1))


def shard(net):
    shard_routers(net)
    return fully_shard(net)


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# What each process does: (rank, folder) -> what it found


def gradients(rank, folder):
    found = {}
    for name, wrap in (("ddp", DistributedDataParallel), ("fsdp2", shard)):
        net = make_net()
        model = wrap(net)
        loss = model(batches()[rank]).square().mean()
        loss.backward()
        dist.all_reduce(loss.detach_())
        found[name] = {"loss": loss / RANKS} | {n: whole(p.grad) for n, p in net.named_parameters()}
    return found


def files(rank, folder):
    save(shard(make_net()), folder / "from_two")
    dist.barrier()
    empty = shard(make_net().requires_grad_(False))
    for p in empty.parameters():
        p.zero_()
    load(folder / "from_two", into=empty)
    return {name: whole(value).clone() for name, value in empty.state_dict().items()}


def places(rank, folder):
    """How many experts lie on this rank, and the shape of the parameter that the optimizer is given."""
    up = shard(make_net())[1].experts.up
    return up.to_local().shape[0], tuple(up.shape)


def global_batch(rank, folder):
    """Each rank sees tokens of its own two experts alone; together the load is even."""
    layer = MoE(Router(LinearScorer(D, 4), Balanced(1, normalize=False, rate=0.1)), FeedForward(4, D, 16))
    with torch.no_grad():
        layer.router.scorer.weight.copy_(torch.eye(4, D))
    x = 5 * torch.eye(4, D)[2 * rank : 2 * rank + 2].repeat(10, 1)
    with record(layer) as tape:
        layer(x)
    after_step(layer, tape)
    return tape[0].routing.counts(), layer.router.selector.bias


CHECKS = (gradients, files, places, global_batch)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """``ranks(check)``: what each rank found."""
    return Ranks(__file__, tmp_path_factory.mktemp("ranks"), seconds=300)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_transformers_48687_the_router_gradient_is_that_of_one_process(ranks, close, kind):
    """transformers #48687: With experts spread over devices the loss was right and the router's gradient was not: each
    device knew its own experts' part alone.

    Here every gradient, the router's with them, is that of one process on the joined batch.
    """
    net = make_net()
    loss = net(batches().flatten(0, 1)).square().mean()
    loss.backward()
    for found in ranks(gradients):
        close(found[kind]["loss"], loss.detach())
        for name, parameter in net.named_parameters():
            close(found[kind][name], parameter.grad)
    assert net[1].router.scorer.weight.grad.any()


@pytest.mark.parametrize(
    "selector", [lambda: TopK(2), lambda: TopP(0.4), lambda: Capacity(TopK(2), 0.5)], ids=["topk", "topp", "capacity"]
)
@pytest.mark.parametrize("dispatch", ["grouped", "dense", "compiled"])
def test_transformers_48205_no_value_comes_from_uninitialised_memory(close, selector, dispatch):
    """transformers #48205: Rows that no expert filled held whatever lay in memory, and NaN from there reached the loss
    at the second step.

    Here every fresh tensor is filled with NaN before it is written, and nothing changes: not with slots that stay
    empty, not with experts without tokens, not with the static shapes of a compiled layer.
    """
    torch.compiler.reset()
    compiled, kind = dispatch == "compiled", "auto" if dispatch == "compiled" else dispatch
    layer = MoE(Router(LinearScorer(D, E), selector()), FeedForward(E, D, 16, bias=True), dispatch=kind)
    with torch.no_grad():
        layer.router.scorer.weight[0] = 0
        layer.router.scorer.weight[0, 0] = -100  # of tokens with a positive first number expert 0 gets none
    call = torch.compile(layer, backend="aot_eager") if compiled else layer
    x, found = torch.randn(N, D), []
    x[:, 0].abs_()
    for filled in (False, True):
        layer.zero_grad()
        torch.use_deterministic_algorithms(filled)
        try:
            assert not filled or torch.empty(3).isnan().all()
            tokens = x.clone().requires_grad_()
            y = call(tokens)
            y.square().sum().backward()
        finally:
            torch.use_deterministic_algorithms(False)
        found.append([y, tokens.grad, *(p.grad for p in layer.parameters())])
    for one, two in zip(*found, strict=True):
        assert two.isfinite().all()
        close(two, one)


def test_tutel_178_and_248_experts_of_two_processes_in_one_file(ranks, close):
    """Tutel #178, Tutel #248: Each of 8 processes wrote its own experts, and there was no way to run them on one
    device, or 32 on two.

    Here the file of two processes, five experts between them, is whole: one process runs it, and two read it into their
    shards.
    """
    net = make_net()
    load(ranks.folder / "from_two", into=net)
    for name, value in make_net().state_dict().items():
        assert torch.equal(net.state_dict()[name], value)
        for found in ranks(files):
            assert torch.equal(found[name], value)


def test_tutel_251_where_the_parameters_of_an_expert_live(ranks):
    """Tutel #251: Users asked which parameters of which expert are on which device, and what an optimizer sees of them.

    Here a stack is split along the experts, and its parameter has the whole shape wherever it lies; on one process
    ``expert_parameters`` names what belongs to one expert alone.
    """
    found = ranks(places)
    assert sum(local for local, _ in found) == E
    assert {shape for _, shape in found} == {(E, 16, D)}
    bank = make_net()[1].experts
    for e in range(E):
        own = bank.expert_parameters(e)
        assert set(own) == {"up", "down", "up_bias", "down_bias"}
        assert own["up"].data_ptr() == bank.up[e].data_ptr()


def test_megatron_1498_counts_over_the_ranks(ranks):
    """Megatron-LM #1498: Two ranks that each use half of the experts are even together: their common selection bias
    does not move.
    """
    for rank, (counts, bias) in enumerate(ranks(global_batch)):
        assert counts.tolist() == ([10, 10, 0, 0] if rank == 0 else [0, 0, 10, 10])
        assert not bias.any()


if __name__ == "__main__":
    work(CHECKS)
