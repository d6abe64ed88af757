"""How fast the layers are, as ratios that hold on any machine: each side is timed in turn, in one run.

    python benchmarks/speed.py --out benchmarks/speed-cpu.json

`grouped`: forward and backward of an MoE layer (router included) against the same expert GEMMs and activation done
ideally balanced with torch.bmm, without router, sorting or gathering. Target: at most 1.25.

`adapter`: an adapter branch behind an eigenbasis router, top-1, against one dense adapter of the experts' width (192),
which has the active compute of one expert. Target: at most 1.7. And, without a target, against a dense adapter of
width 256, whose multiplications equal those of the expert and the router together.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import Adapter, EigenbasisScorer, FeedForward, LinearScorer, MoE, Router, TopK
from spectralmoe.machine import describe_machine

GROUPED = ((4096, 256, 1024, 8, 2), (4096, 256, 1024, 64, 2), (2048, 512, 1024, 32, 4))
TARGETS = {"grouped": 1.25, "adapter": 1.7}


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options = parser.parse_args()
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    rows = [
        grouped(*sizes, device=device, dtype=dtype, rounds=options.rounds, activation=activation)
        for sizes in GROUPED
        for activation in ("gelu", "relu")
    ]
    rows += [adapter(width, device=device, dtype=dtype, rounds=options.rounds) for width in (192, 256)]
    for row in rows:
        times = f"{row['ours_ms']:.1f} / {row['theirs_ms']:.1f} ms"
        print(f"{row['name']:<48} {row['ratio']:.3f} (target {row['target'] or '-'})  {times}")
    options.out.write_text(
        json.dumps({"machine": describe_machine(), "dtype": options.dtype, "rows": rows}, indent=1) + "\n"
    )


def grouped(
    n: int, d: int, h: int, e: int, k: int, *, device: torch.device, dtype: torch.dtype, rounds: int, activation: str
) -> dict[str, object]:
    """MoE with the grouped dispatch against balanced batched GEMMs of the same experts."""
    bank = FeedForward(e, d, h, activation=activation).to(device, dtype)
    layer = MoE(Router(LinearScorer(d, e), TopK(k)), bank, dispatch="grouped").to(device, dtype)
    x = torch.randn(n, d, device=device, dtype=dtype, requires_grad=True)
    up, down = (w.detach().clone().requires_grad_() for w in (bank.up, bank.down))
    balanced = torch.randn(e, n * k // e, d, device=device, dtype=dtype, requires_grad=True)
    act = F.gelu if activation == "gelu" else F.relu

    def theirs() -> Tensor:
        return torch.bmm(act(torch.bmm(balanced, up.mT)), down.mT)

    leaves = ([x, *layer.parameters()], [balanced, up, down])
    return compare(
        f"grouped N{n} D{d} H{h} E{e} k{k} {activation}", "grouped", (lambda: layer(x), theirs), leaves, rounds
    )


def adapter(dense_width: int, *, device: torch.device, dtype: torch.dtype, rounds: int) -> dict[str, object]:
    """An adapter branch behind an eigenbasis router against one dense adapter."""
    n, d, rank, bottleneck, e = 1576, 768, 128, 192, 8
    layer = MoE(Router(EigenbasisScorer(d, e, rank=rank), TopK(1)), Adapter(e, d, bottleneck)).to(device, dtype)
    dense = nn.Sequential(nn.Linear(d, dense_width, bias=False), nn.GELU(), nn.Linear(dense_width, d, bias=False))
    dense = dense.to(device, dtype)
    x, x2 = (torch.randn(n, d, device=device, dtype=dtype, requires_grad=True) for _ in range(2))
    leaves = ([x, *layer.parameters()], [x2, *dense.parameters()])
    kind = "adapter" if dense_width == bottleneck else "adapter, router counted"
    name = f"adapter N{n} D{d} R{rank} b{bottleneck} E{e} k1, dense {dense_width}"
    return compare(name, kind, (lambda: layer(x), lambda: dense(x2)), leaves, rounds)


def compare(
    name: str,
    kind: str,
    runs: tuple[Callable[[], Tensor], Callable[[], Tensor]],
    leaves: tuple[list[Tensor], list[Tensor]],
    rounds: int,
) -> dict[str, object]:
    """Median over rounds of the ratio of the two times, each round timing one after the other."""
    pairs = []
    for index in range(rounds + 3):
        pair = (seconds(runs[0], leaves[0]), seconds(runs[1], leaves[1]))
        if index >= 3:
            pairs.append(pair)
    return {
        "name": name,
        "ratio": statistics.median(a / b for a, b in pairs),
        "target": TARGETS.get(kind),
        "ours_ms": 1e3 * statistics.median(a for a, _ in pairs),
        "theirs_ms": 1e3 * statistics.median(b for _, b in pairs),
        "rounds": rounds,
    }


def seconds(run: Callable[[], Tensor], leaves: list[Tensor]) -> float:
    """One forward and backward."""
    for leaf in leaves:
        leaf.grad = None
    synchronize(leaves[0])
    start = time.perf_counter()
    y = run()
    y.backward(torch.ones_like(y))
    synchronize(leaves[0])
    return time.perf_counter() - start


def synchronize(x: Tensor) -> None:
    """Wait for the device."""
    if x.device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
