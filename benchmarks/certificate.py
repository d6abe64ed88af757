"""How tight the routing certificate is: ``python benchmarks/certificate.py --out FILE.json [--tokens N]``.

For each kind of gate the certified radius of random tokens is divided by the distance at which a gradient search
changes their experts: 1 is exact, more than 1 would be a broken certificate. Beside it, what is left of the radius when
the router computes in fp32, whose rounding is taken off. D = 64, 8 experts, top-2.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch
from torch import nn

from spectralmoe import (
    Balanced,
    CosineScorer,
    EigenbasisScorer,
    LinearScorer,
    PrincipalScorer,
    PrototypeScorer,
    Router,
    TopK,
)
from spectralmoe.diagnostics import attack_distance, routing_radius
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine

D, E, K = 64, 8, 2


def processor() -> nn.Sequential:
    """Linear, ReLU, LayerNorm, as before each router of SRMoE."""
    return nn.Sequential(nn.Linear(D, D), nn.ReLU(), nn.LayerNorm(D)).eval()


CASES: dict[str, tuple[Router, nn.Sequential | None]] = {
    "linear": (Router(LinearScorer(D, E, bias=True), TopK(K)), None),
    "prototype": (Router(PrototypeScorer(D, E), TopK(K)), None),
    "cosine": (Router(CosineScorer(D, E), TopK(K)), None),
    "cosine, projected": (Router(CosineScorer(D, E, proj_dim=16), TopK(K)), None),
    "eigenbasis": (Router(EigenbasisScorer(D, E, rank=16), TopK(K)), None),
    "principal": (Router(PrincipalScorer(D, E), TopK(K)), None),
    "linear, selection bias": (Router(LinearScorer(D, E), Balanced(K, score="softmax")), None),
    "prototype behind a processor": (Router(PrototypeScorer(D, E), TopK(K)), processor()),
    "eigenbasis behind a processor": (Router(EigenbasisScorer(D, E, rank=16), TopK(K)), processor()),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--tokens", type=int, default=500)
    options = parser.parse_args()
    torch.manual_seed(0)
    x, rows = torch.randn(options.tokens, D, dtype=torch.float64), []
    for name, (router, before) in CASES.items():
        started = time.perf_counter()
        radius = routing_radius(router, x, processor=before)
        seconds = time.perf_counter() - started
        kept = routing_radius(router, x.float(), processor=before) / radius
        distance = attack_distance(router, x, processor=before)
        found = distance.isfinite()
        ratio = radius[found] / distance[found]
        rows.append(
            {
                "case": name,
                "median_ratio": float(ratio.median()),
                "largest_ratio": float(ratio.max()),
                "median_fp32_share": float(kept.median()),
                "found": float(found.double().mean()),
                "milliseconds_per_token": 1000 * seconds / options.tokens,
            }
        )
        print(
            f"{name}: radius / attack {ratio.median():.3f} (largest {ratio.max():.6f}), {found.double().mean():.0%}; "
            f"in fp32 {kept.median():.5f} of it"
        )
    if options.out is not None:
        write_json(options.out, {"machine": describe_machine(), "tokens": options.tokens, "cases": rows})


if __name__ == "__main__":
    main()
