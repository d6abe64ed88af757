"""What an EMoE branch costs against one dense adapter, at ViT-B size.

    python benchmarks/branch_cost.py --out benchmarks/results/DATE-branch-cost-cpu.json

Batch 8 x 197 tokens, D 768, bottleneck 192, 8 experts, top-1; forward and backward of the branch alone, h + alpha *
MoE(h), in fp32. Two forms: the authors' (r = 128) and the default (r = E/2, behind a LayerNorm). Two opponents:
`expert alone`, a dense adapter branch of width 192, the compute of one expert; `all active compute`, one whose width
adds the multiplications of the router's projection (192 + r/2), with the same LayerNorm. Target: at most 1.7.

The sides take turns in one process. The work after the optimizer step (statistics, retraction) is reported apart.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe import after_step, record
from spectralmoe.machine import describe_machine
from spectralmoe.vision import Branch, BranchSpec

BATCH, TOKENS, D, BOTTLENECK, EXPERTS = 8, 197, 768, 192, 8
FORMS = {
    "faithful, r = 128": BranchSpec.of("emoe-faithful", bottleneck=BOTTLENECK, experts=EXPERTS),
    "default, r = E/2": BranchSpec.of("emoe", bottleneck=BOTTLENECK, experts=EXPERTS),
}
TARGET, WARM_UP = 1.7, 3


class DenseBranch(nn.Module):
    """h + alpha * adapter(h)."""

    def __init__(self, width: int, norm: bool) -> None:
        super().__init__()
        self.norm, self.alpha = norm, nn.Parameter(torch.ones(()))
        self.up, self.down = nn.Linear(D, width, bias=False), nn.Linear(width, D, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        x = F.layer_norm(h, (D,)) if self.norm else h
        branched: Tensor = h + self.alpha * self.down(F.gelu(self.up(x)))
        return branched


def main() -> None:
    """Time everything and write the results."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=41)
    options = parser.parse_args()
    torch.manual_seed(0)
    before = os.getloadavg()[0]
    rows = [row for name in FORMS for row in compare(name, options.rounds)]
    for row in rows:
        print(
            f"{row['form']:<20} / dense {row['dense_width']} ({row['against']}): {row['ratio']:.2f} (target {TARGET})  "
            f"{row['branch_ms']:.1f} / {row['dense_ms']:.1f} ms; after the step {row['after_step_ms']:.1f} ms"
        )
    result = {"machine": describe_machine(), "load_average": {"before": before, "after": os.getloadavg()[0]}}
    options.out.write_text(
        json.dumps({**result, "rounds": options.rounds, "target": TARGET, "rows": rows}, indent=1) + "\n"
    )


def compare(form: str, rounds: int) -> list[dict[str, object]]:
    """One form against both opponents."""
    spec = FORMS[form]
    branch = Branch(spec.make_moe(D), norm=spec.norm)
    rank = branch.moe.router.scorer.rank
    widths = {"expert alone": BOTTLENECK, "all active compute": BOTTLENECK + -(-rank // 2)}
    h, gradient = torch.randn(BATCH, TOKENS, D), torch.randn(BATCH, TOKENS, D)
    sides = {against: _stepper(DenseBranch(width, spec.norm), h, gradient) for against, width in widths.items()}
    own = _stepper(branch, h, gradient)
    times: dict[str, list[float]] = {name: [] for name in (form, *sides)}
    for _ in range(WARM_UP + rounds):
        for name, step in ((form, own), *sides.items()):
            times[name].append(_time(step))
    after = _after(branch, h, rounds)
    found = []
    for against, width in widths.items():
        pairs = zip(times[form][WARM_UP:], times[against][WARM_UP:], strict=True)
        found.append(
            {
                "form": form,
                "against": against,
                "dense_width": width,
                "ratio": statistics.median(ours / theirs for ours, theirs in pairs),
                "branch_ms": 1e3 * statistics.median(times[form][WARM_UP:]),
                "dense_ms": 1e3 * statistics.median(times[against][WARM_UP:]),
                "after_step_ms": 1e3 * after,
            }
        )
    return found


def _stepper(module: nn.Module, h: Tensor, gradient: Tensor) -> Callable[[], None]:
    def step() -> None:
        x = h.detach().requires_grad_()
        for parameter in module.parameters():
            parameter.grad = None
        module(x).backward(gradient)

    return step


def _after(branch: Branch, h: Tensor, rounds: int) -> float:
    def once() -> float:
        with record(branch) as tape:
            branch(h)
        return _time(lambda: after_step(branch, tape))

    return statistics.median([once() for _ in range(WARM_UP + rounds)][WARM_UP:])


def _time(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
