"""A small layer, as comparisons train it, over its limit and over a dense network of equal active compute.

    python benchmarks/small_layer.py --out benchmarks/results/DATE-small-layer-cpu.json

N 512, D 64, H 128, E 8, k 2, GELU, fp32, forward and backward, one thread, a batch of its own for every run. The limit
is the GEMMs of an even load and the activation, in the faster of two forms. It also writes where the time goes: the
share of each operator in torch's profile.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import cycle
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.limit import IdealLayer
from spectralmoe.bench.problem import Problem, Sizes
from spectralmoe.bench.timing import median, wall_clock
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

SIZES = Sizes(n=512, d=64, h=128, e=8, k=2)
WARM_UP, RUNS, BATCHES, SHOWN = 30, 400, 50, 16


def main() -> None:
    """Time all sides in turn, then profile the layer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    torch.set_num_threads(1)
    load = Idle().demand("at the start")
    sides = candidates()
    for _ in range(WARM_UP):
        for work in sides.values():
            work()
    times: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(RUNS):
        for name, work in sides.items():
            times[name].append(wall_clock(work))
    milliseconds = {name: 1e3 * median(values).middle for name, values in times.items()}
    limit = min(milliseconds["limit, bmm"], milliseconds["limit, mm"])
    ratios = {"over the limit": milliseconds["moe"] / limit, "over dense": milliseconds["moe"] / milliseconds["dense"]}
    for name, value in (milliseconds | ratios).items():
        print(f"{name}: {value:.2f}")
    result = {"machine": describe_machine(), "load_of_others": load, "milliseconds": milliseconds, "ratios": ratios}
    write_json(options.out, {**result, "profile": shares(sides["moe"])})


def candidates() -> dict[str, Callable[[], object]]:
    """The layer, a dense network with its active compute, and the two forms of the limit."""
    torch.manual_seed(0)
    router = Router(LinearScorer(SIZES.d, SIZES.e), TopK(SIZES.k))
    active = SIZES.k * SIZES.h
    dense = nn.Sequential(nn.Linear(SIZES.d, active), nn.GELU(), nn.Linear(active, SIZES.d))
    problem = Problem(SIZES, "gelu", torch.float32, torch.device("cpu"))
    batches = [torch.randn(SIZES.n, SIZES.d) for _ in range(BATCHES)]
    limits: dict[str, Callable[[], object]] = {
        "limit, bmm": IdealLayer(problem, "bmm").forward_and_backward,
        "limit, mm": IdealLayer(problem, "mm").forward_and_backward,
    }
    layer = MoE(router, FeedForward(SIZES.e, SIZES.d, SIZES.h))
    return {"moe": step_of(layer, batches), "dense": step_of(dense, batches), **limits}


def step_of(model: nn.Module, batches: list[Tensor]) -> Callable[[], object]:
    """Forward and backward on the next batch; gradients are made anew."""
    rest = cycle(batches)

    def step() -> None:
        y = model(next(rest).requires_grad_())
        y.backward(torch.ones_like(y))
        model.zero_grad()

    return step


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Share of each operator's own time, largest first; Python between two of them counts for the one around."""
    with profile(activities=[ProfilerActivity.CPU]) as run:
        for _ in range(BATCHES):
            work()
    events = sorted(run.key_averages(), key=lambda event: -event.self_cpu_time_total)
    total = sum(event.self_cpu_time_total for event in events)
    return {event.key: round(event.self_cpu_time_total / total, 4) for event in events[:SHOWN]}


if __name__ == "__main__":
    main()
