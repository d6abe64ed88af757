"""bf16 layers and transformers' blocks, each in a process of its own, with loads that are new at every step.

    python benchmarks/new_loads.py --out benchmarks/results/DATE-new-loads-cpu.json

On a CPU, torch's matmuls in 16 bits compile a kernel for every shape that they have not met lately. All candidates of
`spectralmoe bench` share one process and so the memory of these kernels; here nobody takes another's place in it.
Forward and backward, SwiGLU, two threads. Processes take turns; a ratio is that of the medians over them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

from spectralmoe.bench.idle import Idle
from spectralmoe.bench.peers import transformers
from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import Subject, candidate, spectralmoe_layer
from spectralmoe.bench.suites.layer import BATCHES, SHAPES
from spectralmoe.bench.timing import wall_clock
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

OURS = "spectralmoe"
SIDES = (OURS, "transformers Mixtral grouped_mm", "transformers Qwen3-MoE grouped_mm")
WARM_UP, RUNS = 3, 15


def main() -> None:
    """Time all sides, or one of them (``--side``, in a process that this one starts)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--side", choices=SIDES)
    options = parser.parse_args()
    torch.set_num_threads(2)
    if options.side is not None:
        print(json.dumps(seconds(options.side)))
        return
    if options.out is None:
        parser.error("--out is needed")
    load = Idle().demand("at the start")
    rounds = [{side: in_process(side) for side in SIDES} for _ in range(options.rounds)]
    middle = {
        side: {shape: statistics.median(found[side][shape] for found in rounds) for shape in rounds[0][side]}
        for side in SIDES
    }
    ratios = {shape: own / min(middle[side][shape] for side in SIDES[1:]) for shape, own in middle[OURS].items()}
    for shape, value in ratios.items():
        print(f"{shape}: " + ", ".join(f"{side} {1e3 * middle[side][shape]:.0f} ms" for side in SIDES), f"{value:.2f}")
    result = {"machine": describe_machine(), "load_of_others": load, "rounds": rounds, "over_fastest_peer": ratios}
    write_json(options.out, result)


def in_process(side: str) -> dict[str, float]:
    """The seconds of one side, from a process of its own."""
    line = [sys.executable, __file__, "--side", side]
    found: dict[str, float] = json.loads(subprocess.run(line, check=True, capture_output=True, text=True).stdout)
    return found


def seconds(side: str) -> dict[str, float]:
    """The median of some steps for each shape, other tokens in each."""
    found = {}
    for sizes in SHAPES:
        problem = Problem(sizes, "swiglu", torch.bfloat16, torch.device("cpu"), batches=BATCHES)
        work = candidate(subject(side, problem), problem, "forward and backward").work
        found[str(sizes)] = statistics.median([wall_clock(work) for _ in range(WARM_UP + RUNS)][WARM_UP:])
    return found


def subject(side: str, problem: Problem) -> Subject:
    """The layer that is named."""
    if side == OURS:
        return spectralmoe_layer(problem)
    return next(found for found in transformers.subjects(problem) if isinstance(found, Subject) and found.name == side)


if __name__ == "__main__":
    main()
