"""The targets of the layers, as data: ratios on 2 CPU cores, each from interleaved runs of one process."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from spectralmoe.bench.case import BEST_PEER, LIMIT
from spectralmoe.bench.problem import Activation, Form, Sizes, title
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.suites import decode, penalty, router, scaling
from spectralmoe.bench.suites.layer import FORMS, SHAPES

__all__ = ["TARGETS", "Target", "against_targets"]


@dataclass(frozen=True, slots=True)
class Target:
    """A ratio that is to stay below a number.

    Attributes:
        what: for people.
        of, over: the two sides, by their names or roles.
        keys: the cases.
        at_most: the number.
        share: of the cases that must stay below it.
    """

    what: str
    of: str
    over: str
    keys: tuple[str, ...]
    at_most: float
    share: float = 1.0


def _layer(sizes: Sizes, form: Form, activation: Activation = "gelu", dtype: torch.dtype = torch.float32) -> str:
    return f"layer: {title(sizes, activation, dtype, form)}"


def _targets() -> list[Target]:
    ours, training, evaluation = "spectralmoe", *FORMS
    targets = []
    for form, limits in ((training, (1.05, 1.10, 1.10, 1.15)), (evaluation, (1.10, 1.15, 1.15, 1.25))):
        for sizes, limit in zip(SHAPES, limits, strict=True):
            targets.append(Target(f"layer {form} / limit, {sizes}", ours, LIMIT, (_layer(sizes, form),), limit))
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    peers = {k: tuple(_layer(sizes, training, "swiglu", d) for sizes in SHAPES) for k, d in dtypes.items()}
    both = (*peers["fp32"], *peers["bf16"])
    for kind, keys in peers.items():
        targets.append(Target(f"layer {training} / best peer, {kind}, all", ours, BEST_PEER, keys, 1.0))
    targets.append(Target(f"layer {training} / best peer, on half at least", ours, BEST_PEER, both, 0.8, 0.5))
    for kind, limit in (("eigenbasis", 2.0), ("prototype", 1.3)):
        for form in FORMS:
            key = f"router: {router.name(form, router.FULL)}"
            targets.append(Target(f"{kind} router / linear router, {form}", kind, "linear", (key,), limit))
    key = f"penalty: {penalty.name(penalty.FULL)}"
    targets.append(Target("step with all spectral terms / without", penalty.ALL, penalty.PLAIN, (key,), 1.02))
    key = f"scaling: {scaling.dispatch_name(scaling.BASE, torch.float32)}"
    targets.append(Target("dispatch and experts, E = 1024 / E = 8", "E = 1024", "E = 8", (key,), 1.5))
    key = f"scaling: {scaling.whole_name(replace(scaling.BASE, e=1024), torch.float32)}"
    targets.append(Target("whole layer at E = 1024 / its limit", ours, LIMIT, (key,), 1.2))
    key = f"decode: {title(decode.SIZES, 'swiglu', torch.float32, evaluation)}"
    targets.append(Target("decode of one token / best peer", ours, BEST_PEER, (key,), 1.0))
    key = f"memory: {title(SHAPES[0], 'gelu', torch.float32, training)}"
    targets.append(Target("peak memory / the limit's own tensors", ours, LIMIT, (key,), 1.3))
    command = "command: compare on mnist5k at demo size"
    targets.append(Target("compare on mnist5k (benchmarks/compare_speed.py)", "after", "before", (command,), 0.6))
    return targets


TARGETS = _targets()


def against_targets(cases: Sequence[Mapping[str, Any]], settings: Settings) -> list[dict[str, Any]]:
    """Each target with the measured value, and whether it is met; None: not in this run, or not on two CPU threads.

    Of several cases the ratio that the share asks for: of all the worst, of half the median one.
    """
    fitting = settings.device.type == "cpu" and settings.threads == 2
    ratios = {(case["key"], row["of"], row["over"]): row for case in cases if fitting for row in case["ratios"]}
    return [_row(target, ratios) for target in TARGETS]


def _row(target: Target, ratios: Mapping[tuple[str, str, str], Mapping[str, Any]]) -> dict[str, Any]:
    per_key = [ratios.get((key, target.of, target.over)) for key in target.keys]
    rows = sorted((row for row in per_key if row is not None), key=lambda row: row["median"])
    whole = len(rows) == len(target.keys)
    worst = rows[math.ceil(target.share * len(rows)) - 1] if whole else None
    measured = None if worst is None else worst["median"]
    return {
        "what": target.what,
        "at_most": target.at_most,
        "measured": measured,
        "low": None if worst is None else worst["low"],
        "high": None if worst is None else worst["high"],
        "met": None if measured is None else measured <= target.at_most,
    }
