"""Experts shared out over gloo processes against one process: outputs, gradients, a step, for even and skewed loads.

The products are those of one process and only their sums are ordered otherwise, so float32 agrees to 1e-6 of the
largest entry of what is compared: an output, all gradients of the network, all of its state after a step. An entry
that is the small rest of large terms has no better relative accuracy; float64 says that it is right, to 1e-9 of the
largest entry of its own tensor.

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
    plan_native,
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
SHARES = (0.0, 0.3, 0.8, 0.95, 1.0)
"""Of the tokens that the first layer sends to experts 0 and 1; at 1 the devices behind the first have nothing to do."""
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-9}
EPS = {torch.float32: 1.0, torch.float64: 1e-6}
"""Of AdamW, whose first step is lr g / (|g| + eps): in float32 it must not divide rounding by a small eps."""
PLANNERS = {"home": None, "least_loaded": LeastLoaded(chunk=1, threshold=1.0)}
PAIRS = tuple(zip(PLANNERS, TOLERANCE, strict=True))
"""Rows travel in float32, and weights too in float64."""
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


def make(bank="feed_forward", dtype=torch.float32):
    """A network whose first router sends every token with a 4 in front to experts 0 and 1, and none with a -4."""
    torch.manual_seed(shifted(3))
    net = Net(bank)
    with torch.no_grad():
        net.layers[0].router.scorer.weight.clamp_(-1, 1)[:, 0] = 0
        net.layers[0].router.scorer.weight[:2, 0] = 5
    return net.to(dtype)


def tokens(world, share, draw=0, dtype=torch.float32):
    """The tokens and the gradient of the outputs of each rank."""
    draws, made = generator(5 + draw), []
    for rank, size in enumerate(SIZES[:world]):
        size = 0 if share == EMPTY and rank == 1 else size
        x = torch.randn(size, D, generator=draws).clamp_(-1.9, 1.9)
        x[:, 0] = torch.where(torch.arange(size) < round(share * size), 4.0, -4.0)
        made.append((x.to(dtype), torch.randn(size, D, generator=draws).to(dtype)))
    return made


def near(found, expected):
    """Tensors, or dictionaries of them, as close as the arithmetic of their type allows."""
    if isinstance(expected, torch.Tensor):
        found, expected = {"": found}, {"": expected}
    assert found.keys() == expected.keys()
    largest = {name: float(value.abs().max()) if value.numel() else 0.0 for name, value in expected.items()}
    single = max((largest[name] for name, value in expected.items() if value.dtype != torch.float64), default=0.0)
    for name, value in expected.items():
        assert found[name].shape == value.shape, name
        scale = largest[name] if value.dtype == torch.float64 else single
        off = float((found[name] - value).abs().max()) if value.numel() else 0.0
        assert off <= TOLERANCE[value.dtype] * scale, (name, off, scale)


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


def stepped(net, tape):
    """The state after one step."""
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.05, eps=EPS[next(net.parameters()).dtype])
    optimizer.step()
    after_step(net, tape)
    return {name: whole(value).clone() for name, value in net.state_dict().items()}


def alone(world, share, bank="feed_forward", dtype=torch.float32):
    """One process: outputs and input gradients of each rank, gradients of the mean loss, the state after a step; and
    the experts that the first layer chose for the tokens of each rank."""
    net = make(bank, dtype)
    outputs = []
    with record(net) as tape:
        for x, grad in tokens(world, share, dtype=dtype):
            x = x.requires_grad_()
            y = net(x)
            ((y * grad).sum() / world).backward()
            outputs.append((y.detach(), x.grad * world))
    chosen = [item.routing.indices for item in list(tape)[:world]]
    return outputs, named_gradients(net), stepped(net, tape), chosen


# What each process does: (rank, folder) -> values to compare


def line(world):
    return init_device_mesh("cpu", (world,), mesh_dim_names=("ep",))


def cases(world):
    full = [(bank, share, planner) for bank in BANKS for share in SHARES for planner in PLANNERS]
    return [(*case, dtype) for case in (full if world > RANKS else full[::3]) for dtype in TOLERANCE]


def parity(rank, folder):
    """Output, input gradient, all gradients, one step, of every case."""
    world, found = dist.get_world_size(), {}
    for case in cases(world):
        bank, share, planner, dtype = case
        net = make(bank, dtype)
        parallelize_experts(net, line(world), planner=PLANNERS[planner])
        x, grad = tokens(world, share, dtype=dtype)[rank]
        with record(net) as tape:
            y = net(x.requires_grad_())
        (y * grad).sum().backward()
        average(net, world)
        found[case] = (y.detach(), x.grad, named_gradients(net), stepped(net, tape))
    return found


def kept(rank, folder):
    """Rows, hidden activations and outputs that a tape keeps, with weights that travel; also from a checkpoint."""
    world = dist.get_world_size()
    found = {}
    for dtype in TOLERANCE:
        for checkpointed in (False, True):
            net = make(dtype=dtype)
            net.checkpointed = checkpointed
            parallelize_experts(net, line(world), planner=PLANNERS["least_loaded"])
            x, grad = tokens(world, 0.8, dtype=dtype)[rank]
            with record(net, keep=("hidden", "output")) as tape:
                y = net(x)
            (y * grad).sum().backward()
            average(net, world)
            held = [(item.hidden.detach(), item.output.detach()) for item in tape]
            found[dtype, checkpointed] = (y.detach(), held, named_gradients(net))
    return found


def accumulated(rank, folder):
    """Two micro-batches before one norm of all gradients, clipped, and a step."""
    world, found = dist.get_world_size(), {}
    for dtype in TOLERANCE:
        net = make(dtype=dtype)
        parallelize_experts(net, line(world))
        with record(net) as tape:
            for draw in range(2):
                x, grad = tokens(world, 0.0, draw, dtype)[rank]
                (net(x) * grad).sum().backward()
        average(net, world)
        norm = clip_gradients(net.parameters(), 0.5)
        found[dtype] = (norm, named_gradients(net), stepped(net, tape))
    return found


def refusals(rank, folder):
    """One line each, before anything is changed."""
    world = dist.get_world_size()
    mesh = line(world)
    odd = MoE(Router(LinearScorer(D, 5), TopK(2)), FeedForward(5, D, H))
    loose = MoE(Router(LinearScorer(D, 2), TopK(1)), ModuleExperts([nn.Linear(D, D), nn.Linear(D, D)]))
    reads = MoE(Router(BasisScorer(D, E, score="energy"), TopK(2)), EigenExperts(E, D, 3))
    several = make()
    parallelize_experts(several, mesh, planner=plan_replicas)
    fully_shard(sharded := make())
    other = make()
    parallelize_experts(other, mesh, planner=lambda load, devices: plan_native([load[0] + 1, *load[1:]], devices))
    lines = []
    for refused in (
        lambda: parallelize_experts(odd, mesh),
        lambda: parallelize_experts(loose, mesh),
        lambda: parallelize_experts(reads, mesh),
        lambda: parallelize_experts(make(), mesh, ep="tp"),
        lambda: several(torch.randn(4, D)),
        lambda: other(torch.randn(4, D)),
        lambda: parallelize_experts(several, mesh),
        lambda: parallelize_experts(sharded, mesh),
        lambda: shard_experts(make(), init_device_mesh("cpu", (world, 1), mesh_dim_names=("efsdp", "ep"))),
        lambda: shard_experts(several, mesh),
        lambda: clip_gradients(odd.parameters(), -1.0),
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
    parallelize_experts(net, line(world), planner=PLANNERS["least_loaded"])
    x, grad = tokens(world, 0.8)[rank]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = net.layers[0](x)
    (y.float() * grad).sum().backward()
    return y.detach(), named_gradients(net.layers[0])


def two_dimensions(rank, folder):
    """FSDP2 over (efsdp, ep), experts of several devices or of one: output, input gradient, norm, gradients, a step."""
    mesh, found = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep")), {}
    for dtype in TOLERANCE:
        net = make(dtype=dtype)
        parallelize_experts(net, mesh, planner=PLANNERS["least_loaded"])
        shard_experts(net, mesh)
        fully_shard(net, mesh=mesh._flatten("all"))
        x, grad = tokens(4, 0.8, dtype=dtype)[rank]
        with record(net) as tape:
            y = net(x.requires_grad_())
        (y * grad).sum().backward()
        norm = clip_gradients(net.parameters(), 1e9)
        found[dtype] = (y.detach(), x.grad, norm, named_gradients(net), stepped(net, tape))
    return found


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
    x = tokens(world, 0.0, dtype=first.router.scorer.weight.dtype)[rank][0][:5]
    y = layer(x.view(5, D, *[1] * ((first.experts.row_dims or 1) - 1)))
    y.square().mean().backward()
    return y.detach()


def by_name(rank, folder):
    """Of each of ``NAMES`` the line that refuses it, or its output and gradients, with rows and with weights moved."""
    world, found = dist.get_world_size(), {}
    for name in NAMES:
        try:
            parallelize_experts(named(name), line(world))
        except UserError as error:
            found[name] = str(error)
            continue
        found[name] = {}
        for planner, dtype in PAIRS:
            layer = named(name).to(dtype)
            parallelize_experts(layer, line(world), planner=PLANNERS[planner])
            y = outcome(layer, rank, world)
            average(layer, world)
            grads = {key: whole(p.grad) for key, p in layer.named_parameters() if p.grad is not None}
            found[name][planner, dtype] = (y, grads)
    return found


def stored(rank, folder):
    """Parameters and optimizer state written by all devices, to be read by one."""
    world = dist.get_world_size()
    net = make()
    parallelize_experts(net, line(world))
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
    return Ranks(__file__, tmp_path_factory.mktemp("two"), 600)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    return Ranks(__file__, tmp_path_factory.mktemp("four"), 900, 4)


def compare(found, world):
    for case in cases(world):
        bank, share, _, dtype = case
        outputs, grads, after, chosen = alone(world, share, bank, dtype)
        for rank in range(world):
            assert int((chosen[rank] < 2).all(-1).sum()) == round(share * len(chosen[rank]))
            y, dx, ours, state = found[rank][case]
            near(y, outputs[rank][0])
            near(dx, outputs[rank][1])
            near(ours, grads)
            near(state, after)


def test_two_devices_are_as_one(ranks):
    compare(ranks(parity), 2)


@pytest.mark.full
def test_four_devices_are_as_one(four):
    compare(four(parity), 4)


def test_what_a_tape_keeps_comes_home(ranks):
    for dtype in TOLERANCE:
        net = make(dtype=dtype)
        with record(net, keep=("hidden", "output")) as tape:
            outputs = [net(x) for x, _ in tokens(2, 0.8, dtype=dtype)]
        sum(
            ((y * grad).sum() / 2) for y, (_, grad) in zip(outputs, tokens(2, 0.8, dtype=dtype), strict=True)
        ).backward()
        expected = named_gradients(net)
        for rank, found in enumerate(ranks(kept)):
            for checkpointed in (False, True):
                y, values, grads = found[dtype, checkpointed]
                near(y, outputs[rank].detach())
                for (hidden, output), item in zip(values, list(tape)[rank::2], strict=True):
                    near(hidden, item.hidden.detach())
                    near(output, item.output.detach())
                near(grads, expected)


def test_accumulation_and_clipping(ranks):
    for dtype in TOLERANCE:
        net = make(dtype=dtype)
        with record(net) as tape:
            for draw in range(2):
                for x, grad in tokens(2, 0.0, draw, dtype):
                    ((net(x) * grad).sum() / 2).backward()
        norm, clipped = nn.utils.clip_grad_norm_(net.parameters(), 0.5), named_gradients(net)
        after = stepped(net, tape)
        for found in ranks(accumulated):
            near(found[dtype][0], norm)
            near(found[dtype][1], clipped)
            near(found[dtype][2], after)


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
    expected += (("another load",), ("sharded already",), ("sharded already",), ("parallelize_experts before",))
    expected += (("'efsdp'", "ep"), ("max_norm", "-1.0"))
    for lines in ranks(refusals):
        for line, words in zip(lines, expected, strict=True):
            assert len(line.splitlines()) == 1
            assert all(word in line for word in words), line


REFUSED = dict.fromkeys(("soft", "soft_balanced", "entmax"), "routes softly")
REFUSED |= dict.fromkeys(("modules", "heterogeneous", "mpo", "multilinear"), "no stack")


@pytest.mark.parametrize("name", NAMES)
def test_every_selector_and_bank_works_or_is_refused(name, ranks):
    found = [rank[name] for rank in ranks(by_name)]
    if isinstance(found[0], str):
        assert REFUSED[name] in found[0]
        assert len(found[0].splitlines()) == 1
        return
    assert name not in REFUSED
    for planner, dtype in PAIRS:
        layer = named(name).to(dtype)
        outputs = [outcome(layer, rank, RANKS) for rank in range(RANKS)]
        expected = {key: p.grad / RANKS for key, p in layer.named_parameters() if p.grad is not None}
        for rank in range(RANKS):
            y, grads = found[rank][planner, dtype]
            near(y, outputs[rank])
            near(grads, expected)


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
def test_two_dimensions_with_fsdp(four):
    for dtype in TOLERANCE:
        outputs, grads, after, _ = alone(4, 0.8, dtype=dtype)
        norm = torch.stack([grad.double().square().sum() for grad in grads.values()]).sum().sqrt().to(dtype)
        for rank, found in enumerate(four(two_dimensions)):
            y, dx, ours, gradients, state = found[dtype]
            near(y, outputs[rank][0])
            near(dx, outputs[rank][1])
            near(ours, norm)
            near(gradients, grads)
            near(state, after)


if __name__ == "__main__":
    work(CHECKS if int(sys.argv[4]) == RANKS else (two_dimensions, parity))
