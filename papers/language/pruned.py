"""Part (c): experts taken out of finetuned models, by four saliencies, down to three sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from late import LateSizes, open_late
from upcycled import PRUNED, trained, whole

from spectralmoe.experiments.cards import Desk
from spectralmoe.experiments.cards.plan import Share
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.hf import prune_experts

SALIENCIES = ("frequency", "reap", "removal", "random")


def run_cell(cell: Any, desk: Desk, progress: Share, *, sizes: LateSizes) -> dict[str, Any]:
    """One cell of pruned.json: a finetuned model before pruning, and after each of them; nothing is trained again."""
    torch.set_num_threads(1)
    late, seed = open_late(desk, sizes), cell["seed"]
    model = trained(PRUNED, desk, late, sizes, seed, lambda done: progress(done / 2))
    chosen = torch.linspace(0, len(late.train) - 1, min(sizes.calibration, len(late.train))).round().long()
    batches = [{"inputs_embeds": part} for part in late.train.inputs[chosen].split(sizes.batch)]
    test, after = late.held_out["test"], []
    for place, by in enumerate(SALIENCIES):
        for keep in sizes.keep:
            small = prune_experts(model, keep, by=by, calibration=batches, seed=seed)
            after.append({"row": by, "keep": keep, **whole(small, test, sizes)})
        progress(0.5 + (place + 1) / 2 / len(SALIENCIES))
    return {"before": whole(model, test, sizes), "after": after}


def as_rows(cells: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A cell for each pruning and seed, with what it costs in bits per byte."""
    return [
        {
            "seed": cell["seed"],
            "cpu": cell["cpu"],
            **after,
            "cost": after["bits_per_byte"] - cell["before"]["bits_per_byte"],
        }
        for cell in cells
        if DIVERGED not in cell
        for after in cell["after"]
    ]
