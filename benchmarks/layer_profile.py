"""Where the time of a layer goes: its operations by their share, beside the limit's.

    python benchmarks/layer_profile.py --out benchmarks/results/DATE-layer-profile-cpu.json

The layers of the suite `layer`, GELU, fp32, two threads, with freed memory kept (as `spectralmoe bench --keep-memory`).
Python's own profiler times the calls; what it adds to each of them is mostly in "python".
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch

from spectralmoe.bench.allocator import keep_freed_memory
from spectralmoe.bench.idle import Idle
from spectralmoe.bench.problem import Problem
from spectralmoe.bench.subject import candidate, limits, spectralmoe_layer
from spectralmoe.bench.suites.layer import FORMS, SHAPES
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

RUNS = 10
PARTS = {
    "GEMMs of the experts": (" torch.mm>", "addmm_"),
    "activation": ("_ops.aten.",),
    "gather and scatter": ("index_select", "index_add_"),
    "weights of the rows": ("'mul_'", "'mul'", " torch.mul>", "'sum'"),
    "logits": ("_nn.linear",),
    "top-k and softmax": ("'topk'", "'softmax'"),
    "sort": ("argsort", "bincount"),
    "autograd engine, router backward": ("run_backward",),
}


def main() -> None:
    """Profile every shape and form, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    keep_freed_memory()
    torch.set_num_threads(2)
    load, found = Idle().demand("at the start"), []
    for sizes in SHAPES:
        problem = Problem(sizes, "gelu", torch.float32, torch.device("cpu"))
        for form in FORMS:
            parts = shares(candidate(spectralmoe_layer(problem), problem, form).work)
            floor = min(seconds(limit.work) for limit in limits(problem, form))
            found.append({"sizes": str(sizes), "form": form, "limit_ms": 1e3 * floor, "parts_ms": parts})
            print(f"{sizes} {form}: limit {1e3 * floor:.1f}, " + ", ".join(f"{k} {v:.1f}" for k, v in parts.items()))
    write_json(options.out, {"machine": describe_machine(), "load_of_others": load, "layers": found})


def seconds(work: Callable[[], object]) -> float:
    """The median of some runs."""
    times = []
    for _ in range(RUNS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def shares(work: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of one run by part."""
    for _ in range(3):
        work()
    profile = cProfile.Profile()
    profile.enable()
    for _ in range(RUNS):
        work()
    profile.disable()
    parts = dict.fromkeys((*PARTS, "other operations", "python"), 0.0)
    for (file, _, name), (_, _, own, _, _) in pstats.Stats(profile).stats.items():  # type: ignore[attr-defined]
        known = [part for part, pieces in PARTS.items() if file == "~" and any(piece in name for piece in pieces)]
        native = "other operations" if file == "~" else "python"
        parts[known[0] if known else native] += 1e3 * own / RUNS
    return parts


if __name__ == "__main__":
    main()
