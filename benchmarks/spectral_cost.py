"""What the spectral terms add to a training step: both parts, on every layer, at every step.

    python benchmarks/spectral_cost.py --out benchmarks/results/DATE-spectral-cost-cpu.json

The network has depth 8, 64 experts, D 256, H 256, top-2, batch 1024. Target: at most 2% of a step, for the router's
matrix and for the gates. "two": spectral_norm and stable_rank as terms of their own; "one": spectral_penalty.

`alone`: the terms' forward and backward, and the refresh of kept directions, over the step without terms. `in step`:
the median over rounds of step with terms / step without, minus 1; the sides are timed in turn, in one run. On a machine
that does other work the second is noise, and small two-threaded kernels wait for a core: run it on an idle one.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe import Record, Router, TopK, record
from spectralmoe.machine import describe_machine
from spectralmoe.models.sr_moe import SRMoE, sr_moe
from spectralmoe.regularizers import spectral_norm, stable_rank
from spectralmoe.regularizers.spectral import spectral_penalty
from spectralmoe.scorers import PrototypeScorer
from spectralmoe.steps import after_step, param_groups
from spectralmoe.terms import Term, penalty

TARGET = 0.02
WARM_UP = 3
BATCH = 1024
CONTROL = "plain again"
PARTS = {"two": (spectral_norm, stable_rank), "one": (spectral_penalty,)}
TERMS = {
    f"{matrix}, {count}": {part.__name__: Term(partial(part, matrix=matrix), 1e-2) for part in parts}
    for matrix in ("router", "gates")
    for count, parts in PARTS.items()
}


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=21)
    options = parser.parse_args()
    torch.manual_seed(0)
    before = os.getloadavg()[0]
    trial = Trial()
    rounds = [trial.one_round() for _ in range(WARM_UP + options.rounds)][WARM_UP:]
    step = statistics.median(times["plain"] for times in rounds)
    rows = [row(name, rounds, step) for name in TERMS]
    for found in rows:
        print(
            f"{found['terms']:<12} alone {found['alone_ms']:.1f} ms = {found['alone']:.2%} of a step of "
            f"{1e3 * step:.0f} ms; in step {found['in_step']:+.2%} (target {TARGET:.0%})"
        )
    noise = statistics.median(times[CONTROL] / times["plain"] for times in rounds) - 1
    print(f"a second step without terms: {noise:+.2%}")
    result = {"machine": describe_machine(), "load_average": {"before": before, "after": os.getloadavg()[0]}}
    result |= {"rounds": options.rounds, "step_ms": 1e3 * step, "target": TARGET, "control": noise, "rows": rows}
    options.out.write_text(json.dumps(result, indent=1) + "\n")


def row(name: str, rounds: Sequence[Mapping[str, float]], step: float) -> dict[str, object]:
    """The medians of one set of terms."""
    alone = statistics.median(times[f"{name} alone"] for times in rounds)
    return {
        "terms": name,
        "alone_ms": 1e3 * alone,
        "alone": alone / step,
        "in_step": statistics.median(times[name] / times["plain"] for times in rounds) - 1,
    }


class Trial:
    """One network in training, without terms and with them in turn."""

    def __init__(self) -> None:
        def router(dim: int, experts: int) -> Router:
            return Router(PrototypeScorer(dim, experts), TopK(2))

        self.network: SRMoE = sr_moe(10, width=256, depth=8, num_experts=64, hidden=256, router=router)
        self.optimizer = torch.optim.AdamW(param_groups(self.network, 1e-2), lr=1e-3)
        self.order = random.Random(0)
        self.images, self.labels = torch.rand(BATCH, 1, 28, 28), torch.randint(10, (BATCH,))

    def one_round(self) -> dict[str, float]:
        """Seconds of each kind of step in random order, and of the terms alone."""
        steps: list[tuple[str, Mapping[str, Term]]] = [("plain", {}), (CONTROL, {}), *TERMS.items()]
        self.order.shuffle(steps)
        times = {name: self.step(terms) for name, terms in steps}
        return times | {f"{name} alone": self.alone(terms) for name, terms in TERMS.items()}

    def step(self, terms: Mapping[str, Term]) -> float:
        """One step of the training loop."""
        start = time.perf_counter()
        with record(self.network) as tape:
            logits = self.network(self.images)
        loss = F.cross_entropy(logits, self.labels) + penalty(tape, terms)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        after_step(self.network, tape)
        return time.perf_counter() - start

    def alone(self, terms: Mapping[str, Term]) -> float:
        """Forward and backward of the terms on this step's records, without the network behind them."""
        with record(self.network) as tape, torch.no_grad():
            self.network(self.images)
        records = [cut(item) for item in tape]
        start = time.perf_counter()
        values = [[value for _, value in term.values(records)] for term in terms.values()]
        total: Tensor = sum(t.weight * t.reduced(v) for t, v in zip(terms.values(), values, strict=True))
        total.backward()
        for item in records:
            item.scorer.refresh_spectrum()
        return time.perf_counter() - start


def cut(item: Record) -> Record:
    """The record with its scores as leaves."""
    return replace(item, routing=replace(item.routing, score=item.routing.scores.detach().requires_grad_()))


if __name__ == "__main__":
    main()
