"""Time of one guarded correction: ``python benchmarks/adapt_speed.py --out FILE.json [--updates N]``.

Fashion-MNIST, depth 4, SR-MoE's default routing, 10,000 reference images from the training part; misclassified
validation images are corrected one at a time by ``method="unit"`` and taken back. The aim is less than 2 s an update on
2 cores. "cold" updates measure the reference data first, as the first correction of a model does; "warm" ones find it
measured.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from pathlib import Path

import torch

from spectralmoe.adaptation import Guard, adapt_one, neighbours
from spectralmoe.data.image_data import load_data
from spectralmoe.diagnostics import evaluate
from spectralmoe.json_files import write_json
from spectralmoe.machine import describe_machine
from spectralmoe.models import sr_moe, sr_moe_terms
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask

LIMIT = 2.0


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path)
    parser.add_argument("--updates", type=int, default=20)
    options = parser.parse_args()
    torch.manual_seed(0)
    data = load_data("fashion-mnist")
    model = sr_moe(10, depth=4, spare=8, mean=[0.286], std=[0.353])
    train(model, ImageTask(data.subset(10_000)), Optimization(epochs=2, lr=2e-3), terms=sr_moe_terms(model))
    model.eval()
    part, reference = data.validation, (data.train.images[:10_000], data.train.labels[:10_000])
    wrong = (evaluate(model, part.images, part.labels).predictions != part.labels).nonzero().flatten()
    result: dict[str, object] = {"limit_seconds": LIMIT, "load_average": os.getloadavg()[0]}
    for kind in ("cold", "warm"):
        guard, seconds, kept = Guard([reference]), [], 0
        for sample in wrong[: options.updates].tolist():
            guard = Guard([reference]) if kind == "cold" else guard
            started = time.perf_counter()
            update = adapt_one(
                model,
                part.images[sample : sample + 1],
                int(part.labels[sample]),
                method="unit",
                guard=guard,
                augment=neighbours,
            )
            seconds.append(time.perf_counter() - started)
            kept += update.success
            update.revert()
        median, worst = statistics.median(seconds), max(seconds)
        result[kind] = {"median_seconds": median, "worst_seconds": worst, "updates": len(seconds), "kept": kept}
        print(f"{kind}: median {median:.2f} s, worst {worst:.2f} s (limit {LIMIT} s), {kept}/{len(seconds)} kept")
    if options.out is not None:
        write_json(options.out, {"machine": describe_machine(), "threads": torch.get_num_threads(), **result})


if __name__ == "__main__":
    main()
