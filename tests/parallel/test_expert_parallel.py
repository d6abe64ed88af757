"""Experts shared out over gloo processes against one process: outputs, gradients, a step, for even and skewed loads.

Run as a script, this file is one of the processes.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from gloo_ranks import RANKS, Ranks, work
from seeds import generator, shifted
from small_parts import make_bank, make_selector
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import checkpoint

from spectralmoe import (
    Balanced,
    BasisScorer,
    EigenExperts,
    FeedForward,
    LinearScorer,
    MoE,
    Router,
    TopK,
    UserError,
    after_step,
    load,
    record,
    save,
)
from spectralmoe.experts import EXPERTS, ModuleExperts
from spectralmoe.parallel import (
    ExpertParallel,
    LeastLoaded,
    clip_gradients,
    expert_parameters,
    parallelize_experts,
    plan_replicas,
    shard_experts,
)
from spectralmoe.ranks import RankExperts
from spectralmoe.selectors import SELECTORS
from spectralmoe.units import Sample

D, E, H = 6, 8, 10
SIZES = (24, 13, 9, 16)
"""Tokens of each rank; the second has none where SHARES says so."""
EMPTY = 0.3
SHARES = (0.0, 0.3, 0.8, 0.95)
PLANNERS = {"home": None, "least_loaded": LeastLoaded(chunk=1, threshold=1.0)}
BANKS = {
    "feed_forward": lambda: FeedForward(E, D, H, activation="swiglu", bias=True),
    "eigen": lambda: EigenExperts(E, D, 3),
}


class Net(nn.Module):
    """Two layers, the second with a shared expert and a selection bias."""

    def __init__(self, bank):
        super().__init__()
        first = MoE(Router(LinearScorer(D, E), TopK(2)), BANKS[bank]())
        second = MoE(Router(LinearScorer(D, E), Balanced(2, rate=0.1)), BANKS[bank](), shared=nn.Linear(D, D))
        self.layers, self.checkpointed = nn.ModuleList([first, second]), False

    def forward(self, x):
        for layer in self.layers:
            x = x + (checkpoint(layer, x, use_reentrant=False) if self.checkpointed else layer(x))
        return x


def make(bank="feed_forward", share=0.0):
    """A network whose first router sends every token with a 9 in front to experts 0 and 1."""
    torch.manual_seed(shifted(3))
    net = Net(bank)
    with torch.no_grad():
        net.layers[0].router.scorer.weight[:, 0] = 0
        net.layers[0].router.scorer.weight[:2, 0] = 5
    return net


def tokens(world, share, draw=0):
    """The tokens and the gradient of the outputs of each rank."""
    draws, made = generator(5 + draw), []
    for rank, size in enumerate(SIZES[:world]):
        size = 0 if share == EMPTY and rank == 1 else size
        x = torch.randn(size, D, generator=draws)
        x[:, 0] = torch.where(torch.arange(size) < round(share * size), 9.0, -9.0)
        made.append((x, torch.randn(size, D, generator=draws)))
    return made


def whole(value):
    return value.full_tensor() if isinstance(value, DTensor) else value


def named_gradients(net):
    return {name: whole(p.grad).clone() for name, p in net.named_parameters()}


def average(net, world):
    """What data parallelism does with all that is not an expert's."""
    own = expert_parameters(net)
    for parameter in net.parameters():
        if parameter not in own and parameter.grad is not None:
            dist.all_reduce(parameter.grad)
            parameter.grad /= world


def alone(world, bank, share):
    """One process: outputs and input gradients of each rank, gradients of the mean loss, the state after a step."""
    net = make(bank)
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)
    outputs = []
    with record(net) as tape:
        for x, grad in tokens(world, share):
            x = x.requires_grad_()
            y = net(x)
            ((y * grad).sum() / world).backward()
            outputs.append((y.detach(), x.grad * world))
    grads = named_gradients(net)
    optimizer.step()
    after_step(net, tape)
    return outputs, grads, {name: value.clone() for name, value in net.state_dict().items()}


# What each process does: (rank, folder) -> values to compare


def cases(world):
    full = [(bank, share, planner) for bank in BANKS for share in SHARES for planner in PLANNERS]
    return full if world > RANKS else full[::3]


def parity(rank, folder):
    """Output, input gradient, all gradients, one step, of every case."""
    world, found = dist.get_world_size(), {}
    for bank, share, planner in cases(world):
        net = make(bank)
        parallelize_experts(net, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)), planner=PLANNERS[planner])
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=1e-3)
        x, grad = tokens(world, share)[rank]
        with record(net) as tape:
            y = net(x.requires_grad_())
        (y * grad).sum().backward()
        average(net, world)
        grads = named_gradients(net)
        optimizer.step()
        after_step(net, tape)
        state = {name: whole(value).clone() for name, value in net.state_dict().items()}
        found[bank, share, planner] = (y.detach(), x.grad, grads, state)
    return found


def kept(rank, folder):
    """Rows, hidden activations and outputs that a tape keeps, with weights that travel; also from a checkpoint."""
    world = dist.get_world_size()
    found = []
    for checkpointed in (False, True):
        net = make()
        net.checkpointed = checkpointed
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
        parallelize_experts(net, mesh, planner=PLANNERS["least_loaded"])
        x, grad = tokens(world, 0.8)[rank]
        with record(net, keep=("hidden", "output")) as tape:
            y = net(x)
        (y * grad).sum().backward()
        average(net, world)
        found.append(([(r.hidden.detach(), r.output.detach()) for r in tape], named_gradients(net)))
    return found


def accumulated(rank, folder):
    """Two micro-batches before one norm of all gradients, clipped."""
    world = dist.get_world_size()
    net = make()
    parallelize_experts(net, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    for draw in range(2):
        x, grad = tokens(world, 0.0, draw)[rank]
        (net(x) * grad).sum().backward()
    average(net, world)
    norm = clip_gradients(net.parameters(), 0.5)
    return norm, named_gradients(net)


def refusals(rank, folder):
    """One line each, before anything is changed."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    odd = MoE(Router(LinearScorer(D, 5), TopK(2)), FeedForward(5, D, H))
    loose = MoE(Router(LinearScorer(D, 2), TopK(1)), ModuleExperts([nn.Linear(D, D), nn.Linear(D, D)]))
    reads = MoE(Router(BasisScorer(D, E, score="energy"), TopK(2)), EigenExperts(E, D, 3))
    several = make()
    parallelize_experts(several, mesh, planner=plan_replicas)
    lines = []
    for refused in (
        lambda: parallelize_experts(odd, mesh),
        lambda: parallelize_experts(loose, mesh),
        lambda: parallelize_experts(reads, mesh),
        lambda: parallelize_experts(make(), mesh, ep="tp"),
        lambda: several(torch.randn(4, D)),
    ):
        with pytest.raises(UserError) as error:
            refused()
        lines.append(str(error.value))
    assert not isinstance(odd.dispatch, ExpertParallel)
    return lines


def bf16(rank, folder):
    """The first layer alone: behind it rounding may change what the second chooses."""
    world = dist.get_world_size()
    net = make()
    parallelize_experts(
        net, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)), planner=PLANNERS["least_loaded"]
    )
    x, grad = tokens(world, 0.8)[rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.layers[0](x)
    (y.float() * grad).sum().backward()
    return y.detach(), named_gradients(net.layers[0])


def two_dimensions(rank, folder):
    """FSDP2 over (efsdp, ep): gradients."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    net = make()
    parallelize_experts(net, mesh, planner=PLANNERS["least_loaded"])
    shard_experts(net, mesh)
    fully_shard(net, mesh=mesh._flatten("all"))
    x, grad = tokens(4, 0.8)[rank]
    (net(x) * grad).sum().backward()
    norm = clip_gradients(net.parameters(), 1e9)
    return norm, named_gradients(net)


NAMES = (*SELECTORS, *EXPERTS, "ranks")


def named(name):
    """A selector in front of adapters, a bank behind two of its experts, or ranks before a layer."""
    torch.manual_seed(shifted(4))
    if name == "ranks":
        return nn.Sequential(RankExperts(nn.Linear(D, D), ranks=6, shared=2, zero=0, k=2), named("topk"))
    if name in SELECTORS:
        return MoE(Router(LinearScorer(D, E), make_selector(name)), make_bank("adapter", D, E))
    bank = make_bank(name, D, E)
    return MoE(Router(LinearScorer(D, E), TopK(2)), bank, unit=Sample() if bank.row_dims == 3 else None)


def outcome(layer, rank, world):
    """The output for the tokens of a rank, whose gradients are left."""
    torch.manual_seed(shifted(rank))  # of what selectors draw
    first = next(module for module in layer.modules() if isinstance(module, MoE))
    x = tokens(world, 0.0)[rank][0][:5]
    y = layer(x.view(5, D, *[1] * ((first.experts.row_dims or 1) - 1)))
    y.square().mean().backward()
    return y.detach()


def by_name(rank, folder):
    """Of each of ``NAMES`` the line that refuses it, or its output and gradients."""
    world = dist.get_world_size()
    mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))
    found = {}
    for name in NAMES:
        layer = named(name)
        try:
            parallelize_experts(layer, mesh)
        except UserError as error:
            found[name] = str(error)
            continue
        y = outcome(layer, rank, world)
        average(layer, world)
        found[name] = y, {key: whole(p.grad) for key, p in layer.named_parameters() if p.grad is not None}
    return found


def stored(rank, folder):
    """Parameters and optimizer state written by all devices, to be read by one."""
    world = dist.get_world_size()
    net = make()
    parallelize_experts(net, init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    x, grad = tokens(world, 0.3)[rank]
    (net(x) * grad).sum().backward()
    average(net, world)
    optimizer.step()
    model, moments = get_state_dict(net, optimizer)
    dcp.save({"model": model, "optimizer": moments}, checkpoint_id=folder / "dcp")
    save(copy.deepcopy(net.layers[0]), folder / "layer")
    return {name: whole(value).clone() for name, value in net.state_dict().items()}


CHECKS = (parity, kept, accumulated, refusals, bf16, stored, by_name)


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    return Ranks(__file__, tmp_path_factory.mktemp("two"), 300)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return Ranks(__file__, tmp_path_factory.mktemp("four"), 900, 4)


def compare(found, world, close):
    for case in cases(world):
        bank, share, _ = case
        outputs, grads, after = alone(world, bank, share)
        for rank in range(world):
            y, dx, ours, state = found[rank][case]
            close(y, outputs[rank][0])
            close(dx, outputs[rank][1])
            for name, grad in grads.items():
                close(ours[name], grad)
            for name, value in after.items():
                close(state[name], value)


def test_two_devices_are_as_one(ranks, close):
    compare(ranks(parity), 2, close)


@pytest.mark.full
def test_four_devices_are_as_one(four, close):
    compare(four(parity), 4, close)


def test_what_a_tape_keeps_comes_home(ranks, close):
    net = make()
    with record(net, keep=("hidden", "output")) as tape:
        for x, grad in tokens(2, 0.8):
            ((net(x) * grad).sum() / 2).backward()
    expected = named_gradients(net)
    for rank, checks in enumerate(ranks(kept)):
        for values, grads in checks:
            for (hidden, output), item in zip(values, list(tape)[rank::2], strict=True):
                close(hidden, item.hidden)
                close(output, item.output)
            for name, grad in expected.items():
                close(grads[name], grad)


def test_accumulation_and_clipping(ranks, close):
    net = make()
    for draw in range(2):
        for x, grad in tokens(2, 0.0, draw):
            ((net(x) * grad).sum() / 2).backward()
    expected = nn.utils.clip_grad_norm_(net.parameters(), 0.5)
    for norm, grads in ranks(accumulated):
        close(norm, expected)
        for name, parameter in net.named_parameters():
            close(grads[name], parameter.grad)


def test_autocast(ranks):
    net = make()
    for rank, (y, grads) in enumerate(ranks(bf16)):
        x, _ = tokens(2, 0.8)[rank]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            expected = net.layers[0](x)
        assert (y - expected).abs().max() < 0.02 * expected.abs().max()
        assert all(grad.isfinite().all() for grad in grads.values())


def test_one_line_before_anything_is_changed(ranks):
    expected = (("5 experts",), ("no stack",), ("BasisScorer",), ("'tp'", "ep"), ("several",))
    for lines in ranks(refusals):
        for line, words in zip(lines, expected, strict=True):
            assert len(line.splitlines()) == 1
            assert all(word in line for word in words), line


REFUSED = dict.fromkeys(("soft", "soft_balanced", "entmax"), "routes softly")
REFUSED |= dict.fromkeys(("modules", "heterogeneous", "mpo", "multilinear"), "no stack")


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_and_bank_works_or_is_refused(name, ranks, close):
    layer = named(name)
    found = [rank[name] for rank in ranks(by_name)]
    if isinstance(found[0], str):
        assert REFUSED[name] in found[0]
        assert len(found[0].splitlines()) == 1
        return
    assert name not in REFUSED
    for rank, (y, _) in enumerate(found):
        close(y, outcome(layer, rank, RANKS))
    expected = {key: p.grad / RANKS for key, p in layer.named_parameters() if p.grad is not None}
    for _, grads in found:
        assert grads.keys() == expected.keys()
        for key, grad in expected.items():
            close(grads[key], grad)


def test_what_two_devices_stored_one_loads(ranks):
    expected = ranks(stored)[0]
    net = make()
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05)
    model, moments = get_state_dict(net, optimizer)
    dcp.load({"model": model, "optimizer": moments}, checkpoint_id=ranks.folder / "dcp")
    set_state_dict(net, optimizer, model_state_dict=model, optim_state_dict=moments)
    for name, value in net.state_dict().items():
        assert torch.equal(value, expected[name]), name
    layer = load(ranks.folder / "layer")
    assert layer.dispatch == "auto"
    assert all(torch.equal(value, expected[f"layers.0.{name}"]) for name, value in layer.state_dict().items())
    assert {float(state["step"]) for state in optimizer.state.values()} == {1.0}
    assert all(state["exp_avg"].any() for p, state in optimizer.state.items() if p.dim() == 3)


@pytest.mark.full
def test_two_dimensions_with_fsdp(four, close):
    net = make()
    for x, grad in tokens(4, 0.8):
        ((net(x) * grad).sum() / 4).backward()
    expected = nn.utils.clip_grad_norm_(net.parameters(), 1e9)
    for norm, grads in four(two_dimensions):
        close(norm, expected)
        for name, parameter in net.named_parameters():
            close(grads[name], parameter.grad)


if __name__ == "__main__":
    work(CHECKS if int(sys.argv[4]) == RANKS else (two_dimensions, parity))
