"""Banks of experts over what they stand for, side by side in one process.

    python benchmarks/bank_speed.py --out benchmarks/results/DATE-bank-speed-cpu.json

| case | ours | over |
| --- | --- | --- |
| cp | the dense form of `MultilinearExperts` (E 256, D 512, rank 128, N 2048) | `torch.matmul` of as many operations |
| heterogeneous | `HeterogeneousExperts`, one of four `PatchMixer` a map, maps in order | its modules alone |
| heterogeneous layer | a layer with this bank: a router, the order, and back | the same |
| ranks | `RankExperts`, 8 of 32 ranks a token, 8 shared | LoRA of rank 8 on the same linear layer |
| mpo | a layer with `MPOExperts`, full bonds, 2 of 8 a token | the same layer with `FeedForward` |

Each of them forward without gradient, and forward with backward; fp32, on all threads. In every round each side runs
once, in an order drawn anew; what is written are medians over the rounds of the ratio of both sides, with their 95%
intervals. For "mpo" the bytes of the parameters stand beside the ratio, and the most that a forward and backward adds
to them.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.memory_peak import held_bytes, peak_bytes
from spectralmoe.bench.timing import ratio, take_times
from spectralmoe.experts import HeterogeneousExperts, MPOExperts, MultilinearExperts, PatchMixer, RankExperts
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.units import Sample

FORWARD, TRAINING = "forward", "forward and backward"
Run = Callable[[Tensor], Tensor]


class Sizes(NamedTuple):
    """Of all cases: N rows of width D.

    Attributes:
        cp_experts, cp_rank: E and R of the multilinear bank.
        maps, channels, side: of the heterogeneous one.
        experts, hidden: E and H of the matrix products.
    """

    n: int
    d: int
    cp_experts: int
    cp_rank: int
    maps: int
    channels: int
    side: int
    experts: int
    hidden: int


FULL = Sizes(n=2048, d=512, cp_experts=256, cp_rank=128, maps=32, channels=64, side=64, experts=8, hidden=1024)
QUICK = Sizes(n=16, d=16, cp_experts=8, cp_rank=4, maps=8, channels=8, side=8, experts=4, hidden=32)


class Side(NamedTuple):
    """One side of a case: what runs, and the parameters whose gradients it makes."""

    run: Run
    parameters: Sequence[nn.Parameter]


class Case(NamedTuple):
    """Two sides on the same rows, and at most how long ours may take in units of theirs; None: it is only stated."""

    x: Tensor
    ours: Side
    theirs: Side
    target: float | None


def of_module(module: nn.Module, run: Run | None = None) -> Side:
    """A side that runs a module, and its trained parameters."""
    return Side(run or module, [p for p in module.parameters() if p.requires_grad])


def cp(sizes: Sizes) -> Case:
    """The dense form, over a matrix so wide that it costs as much."""
    bank = MultilinearExperts(sizes.cp_experts, sizes.d, rank=sizes.cp_rank)
    gates = torch.rand(sizes.n, sizes.cp_experts).softmax(1)
    width = round(sizes.cp_rank * (sizes.cp_experts + 2 * sizes.d) / sizes.d)
    weight = nn.Parameter(torch.randn(sizes.d, width) * sizes.d**-0.5)
    ours = of_module(bank, lambda x: bank.mix(x, gates))
    return Case(torch.randn(sizes.n, sizes.d), ours, Side(lambda x: torch.matmul(x, weight), [weight]), 1.5)


def unequal(sizes: Sizes) -> tuple[Case, Case]:
    """A bank of modules of rising cost and a layer around it, over these modules on the maps that chose them."""
    ranks = [max(2, sizes.channels // share) for share in (8, 4, 2, 1)]
    modules = [PatchMixer(sizes.channels, rank, window) for rank, window in zip(ranks, (4, 8, 16, 32), strict=True)]
    router = Router(LinearScorer(sizes.channels, len(modules)), TopK(1))
    layer = MoE(router, HeterogeneousExperts(modules), unit=Sample())
    x = torch.randn(sizes.maps, sizes.channels, sizes.side, sizes.side)
    with torch.no_grad():
        chosen = router(Sample().split(x)[0]).indices[:, 0]
    places = [(chosen == e).nonzero().flatten() for e in range(len(modules))]
    counts, order = torch.tensor([len(place) for place in places]), torch.cat(places)

    def alone(x: Tensor) -> Tensor:
        return torch.cat([module(x[place]) for module, place in zip(modules, places, strict=True) if len(place)])

    theirs = Side(alone, of_module(layer.experts).parameters)
    bank = of_module(layer.experts, lambda x: layer.experts(x[order], counts))
    return Case(x, bank, theirs, 1.15), Case(x, of_module(layer), theirs, 1.15)


def heterogeneous(sizes: Sizes) -> Case:
    """The bank."""
    return unequal(sizes)[0]


def heterogeneous_layer(sizes: Sizes) -> Case:
    """The layer around it."""
    return unequal(sizes)[1]


class LoRA(nn.Module):
    """A frozen linear layer and its low-rank addition."""

    def __init__(self, linear: nn.Linear, rank: int) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.down = nn.Parameter(torch.randn(rank, linear.in_features) * linear.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(linear.out_features, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + F.linear(F.linear(x, self.down), self.up)


def ranks(sizes: Sizes) -> Case:
    """Ranks to choose from, over an adapter of the rank that is chosen."""
    linear = nn.Linear(sizes.d, sizes.d)
    ours = of_module(RankExperts(linear, ranks=32, k=8))
    return Case(torch.randn(sizes.n, sizes.d), ours, of_module(LoRA(linear, 8)), 2.0)


def product_layers(sizes: Sizes) -> dict[str, MoE]:
    """Two layers that differ in their banks."""
    shape = sizes.experts, sizes.d, sizes.hidden
    banks = {"mpo": MPOExperts(*shape), "feed_forward": FeedForward(*shape)}
    return {name: MoE(Router(LinearScorer(sizes.d, sizes.experts), TopK(2)), bank) for name, bank in banks.items()}


def mpo(sizes: Sizes) -> Case:
    """A layer of matrix products, over the same layer of matrices."""
    layers = product_layers(sizes)
    return Case(torch.randn(sizes.n, sizes.d), of_module(layers["mpo"]), of_module(layers["feed_forward"]), None)


CASES: Mapping[str, Callable[[Sizes], Case]] = {
    "cp": cp,
    "heterogeneous": heterogeneous,
    "heterogeneous layer": heterogeneous_layer,
    "ranks": ranks,
    "mpo": mpo,
}


def work(side: Side, x: Tensor, mode: str) -> Callable[[], object]:
    """One run of a side."""
    with torch.no_grad():
        probe = torch.randn_like(side.run(x))

    def forward() -> None:
        with torch.no_grad():
            side.run(x)

    def train() -> None:
        inputs = x.detach().requires_grad_()
        torch.autograd.grad(side.run(inputs), [inputs, *side.parameters], probe, allow_unused=True)

    return forward if mode == FORWARD else train


def memory(sizes: Sizes) -> dict[str, dict[str, int]]:
    """Bytes of the parameters of both layers of "mpo", and the most that a forward and backward holds besides."""
    x, found = torch.randn(sizes.n, sizes.d), {}
    for name, layer in product_layers(sizes).items():
        step = work(of_module(layer), x, TRAINING)
        step()
        parameters = held_bytes(*layer.experts.parameters())
        found[name] = {"parameters": parameters, "peak": peak_bytes(step, torch.device("cpu"))}
    return found


def main(arguments: Sequence[str] | None = None) -> None:
    """Time all sides in turns, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="tiny banks, to try the script")
    parser.add_argument("--busy", action="store_true", help="measure even where others use the machine")
    options = parser.parse_args(arguments)
    load = None if options.busy else Idle().demand("at the start")
    torch.manual_seed(0)
    sizes = QUICK if options.quick else FULL
    cases = {name: make(sizes) for name, make in CASES.items()}
    sides = {
        (name, mode, who): work(side, case.x, mode)
        for name, case in cases.items()
        for mode in (FORWARD, TRAINING)
        for who, side in (("ours", case.ours), ("theirs", case.theirs))
    }
    times = take_times({" | ".join(key): run for key, run in sides.items()}, options.rounds)
    ratios: dict[str, dict[str, Any]] = {}
    for name, case in cases.items():
        for mode in (FORWARD, TRAINING):
            found = ratio(times[f"{name} | {mode} | ours"], times[f"{name} | {mode} | theirs"])
            within = None if case.target is None else found.middle <= case.target
            ratios[f"{name}, {mode}"] = {**found.as_json(), "target": case.target, "within": within}
            most = "" if case.target is None else f" of at most {case.target:.2f}"
            print(f"{name}, {mode}: {found.middle:.2f}{most}, {found.low} to {found.high}")
    held = memory(sizes)
    for name, values in held.items():
        print(
            f"{name}: parameters {values['parameters'] / 1e6:.1f} MB, a step holds {values['peak'] / 1e6:.1f} MB more"
        )
    seconds = {name: sorted(each.values())[len(each) // 2] for name, each in times.items()}
    result = {"machine": describe_machine(), "load_of_others": load, "sizes": sizes._asdict(), "ratios": ratios}
    write_json(options.out, {**result, "seconds": seconds, "bytes": held})


if __name__ == "__main__":
    main()
