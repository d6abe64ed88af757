"""What a Monitor adds to a training step, with a report every 50 steps.

    python benchmarks/monitor_cost.py --out benchmarks/results/DATE-monitor-cost-cpu.json

Target: at most 3% of a step. Three networks: "sr-moe": 12 MoE layers of 64 experts, D 256, H 256, top-2, 4096 tokens;
"demo": the network of ``make demo`` (depth 2, 8 experts, D 64, H 32, batch 128), whose steps are short; "mixtral": a
Mixtral of transformers with 6 layers of 64 experts, D 256, H 256, top-2, 8 x 256 tokens.

`counts`, `sample`, `report`: milliseconds of ``Monitor.step`` in a step that only counts, in one that is also looked at
closely (the first of a window, until 256 tokens), and in one that writes. `alone`: all of a window over its 50 steps,
by medians. `in step`: the median over rounds of a step with an open monitor that counts / a step without, minus 1; the
sides are timed in turn, in random order. `control`: the same for a second step without. On a machine that does other
work the last two are noise of some percent.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import attach, param_groups
from spectralmoe.diagnostics.watch import watch
from spectralmoe.hf import watch_transformers
from spectralmoe.instruments.monitor import Monitor, OpenWatch
from spectralmoe.machine import describe_machine
from spectralmoe.models.sr_moe import sr_moe

TARGET = 0.03
EVERY = 50
WARM_UP = 3
SAMPLE = 256
NEVER = 10**9


@dataclass(frozen=True)
class Case:
    """A network, its loss on one batch, and how it is watched."""

    network: nn.Module
    loss: Callable[[], Tensor]
    tokens: int
    rounds: int
    watching: OpenWatch = watch


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args()
    torch.manual_seed(0)
    before, device, few = os.getloadavg()[0], torch.device(options.device), options.rounds
    cases: dict[str, Callable[[], Case]] = {
        "sr-moe": lambda: images(4096, few, device, width=256, depth=12, num_experts=64, hidden=256),
        "demo": lambda: images(128, 20 * few, device, width=64, depth=2, num_experts=8, hidden=32),
        "mixtral": lambda: text(8, 256, few, device),
    }
    rows = [measured(name, make()) for name, make in cases.items()]
    result = {"machine": describe_machine(), "load_average": {"before": before, "after": os.getloadavg()[0]}}
    options.out.write_text(json.dumps(result | {"every": EVERY, "target": TARGET, "rows": rows}, indent=1) + "\n")


def images(batch: int, rounds: int, device: torch.device, **sizes: int) -> Case:
    """An SR-MoE network on random images."""
    network = sr_moe(10, **sizes).to(device)
    x, labels = torch.rand(batch, 1, 28, 28, device=device), torch.randint(10, (batch,), device=device)
    return Case(network, lambda: F.cross_entropy(network(x), labels), batch, rounds)


def text(batch: int, length: int, rounds: int, device: torch.device) -> Case:
    """A Mixtral on random tokens."""
    from transformers import MixtralConfig, MixtralForCausalLM

    config = MixtralConfig(
        vocab_size=512,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        num_local_experts=64,
        num_experts_per_tok=2,
    )
    network = MixtralForCausalLM(config).to(device).train()
    ids = torch.randint(512, (batch, length), device=device)
    given = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
    return Case(network, lambda: network(**given).loss, batch * length, rounds, watch_transformers)


def measured(name: str, case: Case) -> dict[str, Any]:
    """The medians of one network."""
    trial = Trial(case)
    found = [trial.one_round() for _ in range(WARM_UP + case.rounds)][WARM_UP:]
    parts = {part: trial.monitor_seconds(part) for part in ("counts", "sample", "report")}
    step = statistics.median(times["plain"] for times in found)
    sampled = math.ceil(SAMPLE / case.tokens)
    window = (EVERY - sampled - 1) * parts["counts"] + sampled * parts["sample"] + parts["report"]
    row = {
        "network": name,
        "rounds": case.rounds,
        "step_ms": 1e3 * step,
        **{f"{part}_ms": 1e3 * seconds for part, seconds in parts.items()},
        "alone": window / EVERY / step,
        "in_step": statistics.median(times["monitor"] / times["plain"] for times in found) - 1,
        "control": statistics.median(times["plain again"] / times["plain"] for times in found) - 1,
    }
    print(
        f"{name:<8} step {row['step_ms']:.1f} ms; counts {row['counts_ms']:.2f}, sample {row['sample_ms']:.2f}, report "
        f"{row['report_ms']:.2f} ms; alone {row['alone']:.2%}, in step {row['in_step']:+.2%} "
        f"(control {row['control']:+.2%}; target {TARGET:.0%})"
    )
    return row


class Trial:
    """One network in training, with a monitor and without in turn."""

    def __init__(self, case: Case) -> None:
        self.case, self.order = case, random.Random(0)
        ours = case.watching is watch
        groups = param_groups(case.network, 1e-2) if ours else case.network.parameters()
        self.optimizer = torch.optim.AdamW(groups, lr=1e-3)
        if ours:
            attach(self.optimizer, case.network)
        self.path = Path(tempfile.mkdtemp()) / "monitor.jsonl"

    def open(self, every: int = NEVER, path: Path | None = None) -> Monitor:
        """A monitor of the network."""
        return Monitor(self.case.network, path, every=every, layers=True, watching=self.case.watching)

    def one_round(self) -> dict[str, float]:
        """Seconds of each kind of step, in random order."""
        kinds = ["plain", "plain again", "monitor"]
        self.order.shuffle(kinds)
        return {kind: self.counted() if kind == "monitor" else self.step(None) for kind in kinds}

    def counted(self) -> float:
        """A step under a monitor that has its sample already."""
        with self.open() as monitor:
            monitor._window._sampled = SAMPLE
            return self.step(monitor)

    def step(self, monitor: Monitor | None) -> float:
        """One step of a training loop."""
        self.wait()
        start = time.perf_counter()
        loss = self.case.loss()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        if monitor is not None:
            monitor.step()
        self.wait()
        return time.perf_counter() - start

    def monitor_seconds(self, part: str) -> float:
        """Median seconds of ``Monitor.step`` after a forward, of one kind."""
        times = []
        with self.open(1 if part == "report" else NEVER, self.path) as monitor, torch.no_grad():
            for _ in range(WARM_UP + self.case.rounds):
                self.case.loss()
                monitor._window._sampled = 0 if part == "sample" else SAMPLE
                self.wait()
                start = time.perf_counter()
                monitor.step()
                self.wait()
                times.append(time.perf_counter() - start)
        self.path.unlink()
        return statistics.median(times[WARM_UP:])

    def wait(self) -> None:
        """Until the device has done its work."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()


if __name__ == "__main__":
    main()
