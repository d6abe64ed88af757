"""Two gloo processes on this machine against one process: DDP, FSDP2, counts over ranks, saving sharded models.

Run as a script, this file is one of the two processes: it runs every function of ``CHECKS`` and leaves the results in a
folder. The tests compare them with what one process computes.
"""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from gloo_ranks import RANKS, Ranks, work
from seeds import generator, shifted
from torch import nn
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    BasisScorer,
    EigenbasisScorer,
    EigenExperts,
    FeedForward,
    LinearScorer,
    MoE,
    Router,
    Term,
    TopK,
    UserError,
    after_step,
    attach,
    load,
    penalty,
    record,
    save,
    shard_routers,
)
from spectralmoe.experts import MPOExperts
from spectralmoe.optim import OrthogonalExperts, make_optimizer, mask_central
from spectralmoe.regularizers import load_balance, orthonormality, router_z, spectral_norm, stable_rank
from spectralmoe.scorers import StatisticsMemory
from spectralmoe.selectors import ClusterDropout

N, D, E, ROUNDS = 20, 8, 5, 3
RATES = SimpleNamespace(lr=0.01, weight_decay=0.1)
ADDITIVE = {"z": Term(router_z, 0.3), "sigma": Term(spectral_norm, 0.2), "rank": Term(stable_rank, 0.1)}
ALL = {**ADDITIVE, "balance": Term(load_balance, 0.3), "ortho": Term(orthonormality, 0.1)}


class Block(nn.Module):
    def __init__(self, scorer, selector, experts=None):
        super().__init__()
        self.linear, self.norm = nn.Linear(D, D), nn.LayerNorm(D)
        self.moe = MoE(Router(scorer, selector), experts or FeedForward(E, D, 16))

    def forward(self, x):
        return x + self.moe(self.norm(self.linear(x)))


class Net(nn.Module):
    """A linear gate, then a balanced one on an eigenbasis."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(
            [
                Block(LinearScorer(D, E), TopK(2)),
                Block(EigenbasisScorer(D, E, rank=4, temperature=0.1), Balanced(2, rate=0.01)),
            ]
        )
        self.checkpointed = False

    def forward(self, x):
        for block in self.blocks:
            x = checkpoint(block, x, use_reentrant=False) if self.checkpointed else block(x)
        return x


class ProductNet(Net):
    """Matrix products, whose central cores all experts share."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Block(LinearScorer(D, E), TopK(2), MPOExperts(E, D, 16))])


class EigenNet(Net):
    """One gate that reads the bases of its experts."""

    def __init__(self):
        super().__init__()
        scorer = BasisScorer(D, E, score="energy")
        self.blocks = nn.ModuleList([Block(scorer, Balanced(2, rate=0.01), EigenExperts(E, D, 3))])


def make_net(dtype=torch.float32, kind=Net):
    torch.manual_seed(shifted(0))
    return kind().to(dtype)


def batches(dtype=torch.float32):
    """(rounds, ranks, N, D)"""
    return torch.randn(ROUNDS, RANKS, N, D, generator=generator(1)).to(dtype)


def loss_of(net, x, terms):
    with record(net) as tape:
        y = net(x)
    return y.float().square().mean() + penalty(tape, terms)[0], tape


def whole(tensor):
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def state(net):
    return {name: whole(value.detach()).clone() for name, value in net.state_dict().items()}


def gradients(net, prefix=""):
    return {name.removeprefix(prefix): whole(p.grad).clone() for name, p in net.named_parameters()}


def shard(net, **options):
    shard_routers(net, **options)
    for block in net.blocks:
        fully_shard(block, **options)
    return fully_shard(net, **options)


def training(net, data, *, hooked=False):
    """ROUNDS steps with all terms; the losses."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if hooked:
        attach(optimizer, net)
    losses = []
    for x in data:
        loss, tape = loss_of(net, x, ALL)
        loss.backward()
        optimizer.step()
        if not hooked:
            after_step(net, tape)
        optimizer.zero_grad()
        losses.append(loss.detach())
    return torch.stack(losses)


# What each of the two processes does: (rank, folder) -> values to compare


def selection_bias(rank, folder):
    """Counts of different data on each rank: over both ranks, and over this one alone."""
    alone = [dist.new_group([r]) for r in range(RANKS)][rank]
    joined, own = make_net(), make_net()
    for data in batches():
        for net, group in ((joined, None), (own, alone)):
            with record(net) as tape:
                net(data[rank])
            after_step(net, tape, group=group)
    return [net.blocks[1].moe.router.selector.bias for net in (joined, own)]


def ddp(rank, folder):
    """Gradients of task loss and penalty in float64, without and with checkpoints, and with the balance loss."""
    found = []
    for checkpointed, terms in ((False, ADDITIVE), (True, ADDITIVE), (False, ALL)):
        net = make_net(torch.float64)
        net.checkpointed = checkpointed
        parallel = DistributedDataParallel(net)
        loss_of(parallel, batches(torch.float64)[0, rank], terms)[0].backward()
        found.append(gradients(parallel, "module."))
    return found


def fsdp(rank, folder):
    """The same in fp32 on sharded parameters; resharded after the forward or not."""
    found = []
    for checkpointed, terms, options in (
        (False, ADDITIVE, {}),
        (True, ADDITIVE, {}),
        (False, ALL, {}),
        (False, ADDITIVE, {"reshard_after_forward": False}),
    ):
        net = make_net()
        net.checkpointed = checkpointed
        shard(net, **options)
        loss_of(net, batches()[0, rank], terms)[0].backward()
        found.append(gradients(net))
    return found


def fsdp_bf16(rank, folder):
    """Training in bf16 with routers in fp32, by hand and by hooks; saving, and loading into the shards."""
    results = {}
    for name in ("hand", "hooks"):
        net = make_net(torch.bfloat16)
        shard(net)
        losses = training(net, batches(torch.bfloat16)[:, 0], hooked=name == "hooks")
        results[name] = {"losses": losses, "state": state(net)}
    save(net, folder / "sharded", meta={"name": "sharded"})
    dist.barrier()
    other = shard(make_net(torch.bfloat16))
    with torch.no_grad():
        for p in other.parameters():
            p.add_(1)
    load(folder / "sharded", into=other)
    results["reloaded"] = state(other)
    results["sharded"] = all(isinstance(p, DTensor) for p in other.parameters())
    _, tape = loss_of(net, batches(torch.bfloat16)[0, 0], ALL)
    results["logits"] = [item.routing.logits.dtype for item in tape]
    results["local"] = net.blocks[0].moe.experts.up.to_local().shape[0]
    return results


def ddp_training(rank, folder):
    """Different data on each rank, by hooks: the ranks stay equal, biases and bases included."""
    net = make_net()
    training(DistributedDataParallel(net), batches()[:, rank], hooked=True)
    save(DistributedDataParallel(net), folder / f"ddp{rank}")
    return state(net)


def uneven(rank, folder):
    """Rank 1 has two batches more. First without the attachment in the Join, then with it."""
    net = DistributedDataParallel(make_net(), find_unused_parameters=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment, data = attach(optimizer, net), batches()
    refused = ""
    try:
        with Join([net]):
            net(data[0, rank]).square().mean().backward()
            optimizer.step()
    except UserError as error:
        refused = str(error)
    attachment.remove()
    net = DistributedDataParallel(make_net())
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    attachment = attach(optimizer, net)
    with Join([net, attachment]):
        for x in data[: 1 + 2 * rank, rank]:
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
    return {"refused": refused, "state": state(net.module)}


def shared_bases(rank, folder):
    """Gradients of bases that router and experts share, under DDP and FSDP2; then training by hooks."""
    parallel = DistributedDataParallel(make_net(torch.float64, EigenNet))
    parallel(batches(torch.float64)[0, rank]).square().mean().backward()
    net = shard(make_net(kind=EigenNet))
    net(batches()[0, rank]).square().mean().backward()
    found = {"ddp": gradients(parallel, "module."), "fsdp": gradients(net)}
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    attach(optimizer, net)
    for x in batches()[:, rank]:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    save(net, folder / "eigen")
    return found | {"state": state(net), "shared": net.blocks[0].moe.router.scorer.bank is net.blocks[0].moe.experts}


def expert_draws(rank, folder):
    """Who takes part at each step, on ranks that were seeded differently and see different data."""
    torch.manual_seed(shifted(rank))
    layer = MoE(Router(LinearScorer(D, E), ClusterDropout(TopK(1), 1, interval=1)), FeedForward(E, D, 4))
    parallel, drawn = DistributedDataParallel(layer), []
    for _ in range(6):
        drawn.append(layer.router.selector.taking_part.clone())
        with record(layer) as tape:
            parallel(torch.randn(5, D)).sum().backward()
        after_step(layer, tape)
    return drawn


def memory_statistics(rank, folder):
    """What a memory of a sharded layer learned from different data on each rank."""
    layer = MoE(Router(LinearScorer(D, E), TopK(1)), FeedForward(E, D, 4), memory=StatisticsMemory(D))
    fully_shard(layer)
    for data in batches():
        with record(layer) as tape:
            layer(data[rank])
        after_step(layer, tape)
    return [layer.memory.mean, layer.memory.variance, layer.eval()(batches()[0, 0] + 3)]


def sharded_muon(rank, folder):
    """Three steps on joined data with sharded matrices and experts; the whole parameters."""
    net = shard(make_net())
    optimizer = make_optimizer("muon", net, RATES)
    for data in batches():
        optimizer.zero_grad()
        (net(data.flatten(0, 1)).square().mean()).backward()
        optimizer.step()
    return {name: whole(parameter) for name, parameter in net.named_parameters()}


def orthogonal_steps(net, on, *data):
    """A gathering step and a projected one, twice; the parameters."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    OrthogonalExperts(optimizer, net, phase=1, on=on)
    for x in data:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return {name.removeprefix("module."): whole(parameter).detach() for name, parameter in net.named_parameters()}


def orthogonal_experts(rank, folder):
    """Under DDP and FSDP2, each rank with data of its own."""
    mine = [*batches(torch.float64)[:, rank], batches(torch.float64)[0, rank]]
    replicated = DistributedDataParallel(make_net(torch.float64))
    sharded = shard(make_net(torch.float64))
    return [orthogonal_steps(replicated, "gradient", *mine), orthogonal_steps(sharded, "update", *mine)]


def masked_steps(net, *data):
    """Steps with a mask on the gradients of the central cores; all that moved."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    mask_central(optimizer, net, keep=0.5, seed=1)
    for x in data:
        optimizer.zero_grad()
        net(x).square().mean().backward()
        optimizer.step()
    return {name.removeprefix("module."): whole(parameter).detach() for name, parameter in net.named_parameters()}


def masked_cores(rank, folder):
    """Under DDP and FSDP2, each rank with data of its own."""
    mine = batches(torch.float64)[:, rank]
    return [
        masked_steps(DistributedDataParallel(make_net(torch.float64, ProductNet)), *mine),
        masked_steps(shard(make_net(torch.float64, ProductNet)), *mine),
    ]


CHECKS = (
    selection_bias,
    ddp,
    fsdp,
    fsdp_bf16,
    ddp_training,
    uneven,
    shared_bases,
    expert_draws,
    memory_statistics,
    sharded_muon,
    orthogonal_experts,
    masked_cores,
)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """``ranks(check)``: what each rank found."""
    return Ranks(__file__, tmp_path_factory.mktemp("ranks"), seconds=300)


def all_close(one, two, close, dtype=None):
    assert one.keys() == two.keys()
    for name, value in one.items():
        close(value, two[name], dtype)


def all_equal(one, two):
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.equal(value, two[name]), name


def test_ranks_with_different_data_end_with_the_bias_of_the_joined_data(ranks):
    results = ranks(selection_bias)
    joined, alone = make_net(), [make_net() for _ in range(RANKS)]
    for data in batches():
        for net, x in ((joined, data.flatten(0, 1)), (alone[0], data[0]), (alone[1], data[1])):
            with record(net) as tape:
                net(x)
            after_step(net, tape)
    bias = joined.blocks[1].moe.router.selector.bias
    assert bias.any()
    for rank, (over_both, own) in enumerate(results):
        assert torch.equal(over_both, bias)
        assert torch.equal(own, alone[rank].blocks[1].moe.router.selector.bias)
    assert not torch.equal(results[0][1], results[1][1])


def references(dtype):
    """Gradients of one process: on the joined batch, and with all terms as the mean over the halves.

    The balance loss is a product of means over tokens, so its mean over two ranks is not that of the joined batch.
    """
    data = batches(dtype)[0]
    net = make_net(dtype)
    loss_of(net, data.flatten(0, 1), ADDITIVE)[0].backward()
    halves = copy.deepcopy(net)
    halves.zero_grad()
    for x in data:
        (loss_of(halves, x, ALL)[0] / RANKS).backward()
    return gradients(net), gradients(halves)


def test_ddp_gradients_are_those_of_one_process(ranks, close):
    joined, halves = references(torch.float64)
    for plain, checkpointed, balanced in ranks(ddp):
        all_close(plain, joined, close)
        all_equal(checkpointed, plain)
        all_close(balanced, halves, close)


def test_fsdp_gradients_are_those_of_one_process(ranks, close):
    joined, halves = references(torch.float32)
    for plain, checkpointed, balanced, unsharded in ranks(fsdp):
        all_close(plain, joined, close)
        all_equal(checkpointed, plain)
        all_close(balanced, halves, close)
        all_close(unsharded, joined, close)


def test_fsdp_in_bf16(ranks, close):
    net = make_net(torch.bfloat16)
    losses = training(net, batches(torch.bfloat16)[:, 0])
    for result in ranks(fsdp_bf16):
        close(result["hand"]["losses"], losses, torch.bfloat16)
        all_equal(result["hooks"]["state"], result["hand"]["state"])
        for name, value in result["hand"]["state"].items():
            assert value.dtype == (torch.float32 if ".router." in name else torch.bfloat16)
            close(value.float(), state(net)[name], torch.bfloat16)
        basis = result["hand"]["state"]["blocks.1.moe.router.scorer.basis"]
        close(basis.T @ basis, torch.eye(4))
        assert result["hand"]["state"]["blocks.1.moe.router.selector.bias"].any()
        assert result["logits"] == [torch.float32] * 2
        assert result["local"] < E


def test_a_sharded_model_is_saved_whole_and_loads_into_shards(ranks):
    results = ranks(fsdp_bf16)
    into = make_net(torch.bfloat16)
    load(ranks.folder / "sharded", into=into)
    for result in results:
        all_equal(result["hooks"]["state"], state(into))
        all_equal(result["reloaded"], result["hooks"]["state"])
        assert result["sharded"]


def test_ranks_stay_equal_in_training(ranks):
    one, two = ranks(ddp_training)
    all_equal(one, two)
    into = make_net()
    load(ranks.folder / "ddp1", into=into)
    all_equal(state(into), one)


def test_all_ranks_leave_the_same_experts_out(ranks):
    one, two = ranks(expert_draws)
    assert all(torch.equal(*pair) for pair in zip(one, two, strict=True))
    assert len({tuple(each.tolist()) for each in one}) > 1


def test_a_memory_follows_the_tokens_of_all_ranks(ranks, close):
    one, two = ranks(memory_statistics)
    assert torch.equal(one[0], two[0])
    assert torch.equal(one[1], two[1])
    joined = batches().flatten(1, 2)
    mean = joined.mean((0, 1))  # the first steps count alike
    close(one[0][0], mean)
    close(one[1][0], joined.square().mean((0, 1)) - mean.square())
    assert all(result[2].isfinite().all() for result in (one, two))


def test_muon_moves_sharded_matrices_as_whole_ones(ranks, close):
    net = make_net()
    optimizer = make_optimizer("muon", net, RATES)
    for data in batches():
        optimizer.zero_grad()
        net(data.flatten(0, 1)).square().mean().backward()
        optimizer.step()
    for found in ranks(sharded_muon):
        all_close(found, dict(net.named_parameters()), close)


def test_projectors_are_of_the_inputs_of_all_ranks(ranks, close):
    data = [x.flatten(0, 1) for x in (*batches(torch.float64), batches(torch.float64)[0])]
    want = [orthogonal_steps(make_net(torch.float64), on, *data) for on in ("gradient", "update")]
    for replicated, sharded in ranks(orthogonal_experts):
        all_close(replicated, want[0], close)
        all_close(sharded, want[1], close, torch.float32)  # the precision of sharded routers


def test_ranks_mask_alike(ranks, close):
    want = masked_steps(make_net(torch.float64, ProductNet), *(x.flatten(0, 1) for x in batches(torch.float64)))
    for replicated, sharded in ranks(masked_cores):
        all_close(replicated, want, close)
        all_close(sharded, want, close, torch.float32)  # the precision of sharded routers


def test_uneven_inputs_under_join(ranks, close):
    one, two = ranks(uneven)
    for result in (one, two):
        assert "Join([model, attach(optimizer, model)])" in result["refused"]
        assert len(result["refused"].splitlines()) == 1
    all_equal(one["state"], two["state"])
    basis = one["state"]["blocks.1.moe.router.scorer.basis"]
    close(basis.T @ basis, torch.eye(4))
    moved = one["state"]["blocks.1.moe.router.selector.bias"] / 0.01
    assert moved.any()
    close(moved, moved.round())
    assert moved.abs().max() <= 3


def test_bases_that_router_and_experts_share(ranks, close):
    one, two = ranks(shared_bases)
    for name, dtype in (("ddp", torch.float64), ("fsdp", torch.float32)):
        net = make_net(dtype, EigenNet)
        net(batches(dtype)[0].flatten(0, 1)).square().mean().backward()
        all_close(one[name], gradients(net), close)
        all_close(two[name], one[name], close)
    all_equal(one["state"], two["state"])
    assert one["shared"]
    assert two["shared"]
    for name in ("left", "right"):
        bases = one["state"][f"blocks.0.moe.experts.{name}"]
        close(bases.mT @ bases, torch.eye(3).expand(E, 3, 3))
    into = make_net(kind=EigenNet)
    load(ranks.folder / "eigen", into=into)
    all_equal(state(into), one["state"])


if __name__ == "__main__":
    work(CHECKS)
