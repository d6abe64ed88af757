"""Part (b): the last layers of a pretrained model made into a mixture of experts and finetuned on three domains."""

from __future__ import annotations

import copy
import math
import statistics
import warnings
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from late import Late, LateSizes, open_late
from torch import Tensor, nn

from spectralmoe import attach, penalty, record
from spectralmoe.diagnostics import dead_experts, holds_moe, max_vio, min_share
from spectralmoe.diagnostics.association import association
from spectralmoe.diagnostics.measure import mean_of
from spectralmoe.experiments.cards import Desk, try_settings
from spectralmoe.experiments.cards.plan import Share
from spectralmoe.hf import swap_routers, upcycle
from spectralmoe.hf.routers.swap import Init
from spectralmoe.hf.training.text_windows import Passages, Windows, bits_per_byte
from spectralmoe.presets import find_preset
from spectralmoe.training.finetuning.routers import selector_of
from spectralmoe.training.loop import Diverged
from spectralmoe.training.tasks.text import BITS

DENSE, UNTRAINED = "dense", "untrained"
ROUTERS = ("linear", "sr-moe", "emoe")
CONTROL = "drop+linear+balanced"
"""The loss-free bias of SR-MoE without its prototypes and spectral terms."""
PRUNED = "drop+linear"
"""The row whose models are pruned."""
RATES = (3e-4, 1e-3, 3e-3)
"""What every row tries."""
_WARMUP = 0.1


def rows_of(sizes: LateSizes) -> list[str]:
    """The rows that are trained: the dense model, each method with each router, and the control."""
    mixtures = [f"{method}+{router}" for method in sizes.methods for router in ROUTERS]
    return [DENSE, *mixtures, CONTROL]


def build(row: str, late: Late, sizes: LateSizes, seed: int) -> nn.Module:
    """The untrained model of a row; under one seed rows of one method have the same experts."""
    if row in (DENSE, UNTRAINED):
        return copy.deepcopy(late.model)
    method, _, router = row.partition("+")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="method 'copy'")  # the card measures what it costs
        model: nn.Module = upcycle(late.model, experts=sizes.experts, k=sizes.k, method=method, seed=seed)
    if router != "linear":
        preset = find_preset(router)
        torch.manual_seed(seed)
        start: Init = "from_gate" if preset.scorer["type"] == "linear" else "fresh"  # a random gate is worth no fit
        swap_routers(model, preset.scorer, selector_of(model, preset), init=start)
    return model


def finetune(model: Any, row: str, windows: Windows, rate: float, sizes: LateSizes, seed: int, progress: Share) -> None:
    """Train the layers of ``model`` on each window once, in an order that depends on the seed alone.

    Raises:
        Diverged: the loss is no finite number.
    """
    terms = {} if row == DENSE else find_preset(row.partition("+")[2]).terms
    routed = holds_moe(model)
    model.train().requires_grad_(False)
    model.model.layers.requires_grad_(True)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
    if routed:
        attach(optimizer, model)
    order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed)).split(sizes.batch)
    for step, chosen in enumerate(order):
        for group in optimizer.param_groups:
            group["lr"] = rate * _share_of_rate(step, len(order))
        with record(model, terms=terms) if routed else nullcontext() as tape:
            loss = model(inputs_embeds=windows.inputs[chosen], labels=windows.labels[chosen], use_cache=False).loss
        if tape is not None:
            loss = loss + penalty(tape, terms)[0]
        if not math.isfinite(loss.item()):
            raise Diverged(f"the loss of {row} is {loss.item()} at step {step}")
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        progress(step / len(order))
    model.eval()


def _share_of_rate(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to 0."""
    warm = _WARMUP * steps
    if step < warm:
        return (step + 1) / (warm + 1)
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(steps - warm, 1)))


def tune_row(row: str, desk: Desk, progress: Share, *, sizes: LateSizes) -> dict[str, Any]:
    """The learning rate of a row with the fewest bits per byte on validation text."""
    torch.set_num_threads(1)
    late = open_late(desk, sizes)
    count = max(round(sizes.tune * len(late.train)), 1)
    windows = Windows(late.train.inputs[:count], late.train.labels[:count])

    def fitted(setting: Mapping[str, Any]) -> tuple[float, None]:
        model = build(row, late, sizes, 0)
        finetune(model, row, windows, setting["lr"], sizes, 0, lambda done: None)
        return whole(model, late.held_out["validation"], sizes)["bits_per_byte"], None

    tried = try_settings([{"lr": rate} for rate in RATES], fitted, progress, BITS)
    return {row: {"setting": dict(tried.setting), "tries": tried.tries}}


def trained(row: str, desk: Desk, late: Late, sizes: LateSizes, seed: int, progress: Share) -> nn.Module:
    """The model of a row under a seed, at the rate that was chosen."""
    model = build(row, late, sizes, seed)
    if row != UNTRAINED:
        rate = desk.tuned["upcycled_tuning"][row]["setting"]["lr"]
        finetune(model, row, late.train, rate, sizes, seed, progress)
    return model


def run_cell(cell: Any, desk: Desk, progress: Share, *, sizes: LateSizes) -> dict[str, Any]:
    """One cell of upcycled.json."""
    torch.set_num_threads(1)
    late, row = open_late(desk, sizes), cell["row"]
    before = whole(build(row, late, sizes, cell["seed"]), late.held_out["validation"], sizes)
    model = trained(row, desk, late, sizes, cell["seed"], progress)
    values = {"validation_before": before["bits_per_byte"], **whole(model, late.held_out["test"], sizes)}
    return values | {"tokens": late.train.labels.numel() if row != UNTRAINED else 0}


@torch.no_grad()
def whole(model: nn.Module, held_out: Mapping[str, Passages], sizes: LateSizes) -> dict[str, Any]:
    """Bits per byte in all and by domain; of a model with experts how even and how specialised they are."""
    mixture = hasattr(model.config, "num_local_experts")
    bits, tables = dict[str, float](), dict[str, list[Tensor]]()
    for domain, passages in held_out.items():
        with record(model) if mixture else nullcontext(()) as tape:
            bits[domain] = bits_per_byte(model, [passages], sizes.batch)[0]
        loads: dict[str, Tensor] = {}
        for item in tape:
            loads[item.name] = loads.get(item.name, 0) + item.routing.load_counts()
        for name, load in loads.items():
            tables.setdefault(name, []).append(load)
    size = sum(passages.size for passages in held_out.values())
    total = sum(bits[domain] * passages.size for domain, passages in held_out.items()) / size
    values = {"bits_per_byte": total, **{f"bits_per_byte_{domain}": value for domain, value in bits.items()}}
    return values | _routing([torch.stack(table) for table in tables.values()])


def _routing(tables: Sequence[Tensor]) -> dict[str, Any]:
    """Of the slots (domains, E) of each layer."""
    if not tables:
        return {}
    loads = [table.sum(0) / table.sum() for table in tables]
    return {
        "max_vio": statistics.fmean(map(max_vio, loads)),
        "min_load_share": min(map(min_share, loads)),
        "dead_experts": sum(map(dead_experts, loads)),
        "domain_information": mean_of([value for table in tables if (value := association(table).value) is not None]),
    }
