"""One network of the card: train it, measure it, correct it in every way that the card asks for."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from plan import BATCH, EXPERTS, HIDDEN, SPARE, WIDTH, Network, Plan, ways
from rows import ALL_EXPERTS, ALL_PARAMETERS, GUARD, ROWS, scaled

from spectralmoe import load, record, save
from spectralmoe.adaptation import Guard, Rule, Trial, correction_stream, neighbours, one_shot_trials
from spectralmoe.diagnostics import evaluate, min_share
from spectralmoe.files import read_json, write_json
from spectralmoe.linalg import sigma_max, stable_rank
from spectralmoe.models import SRMoE, sr_moe
from spectralmoe.tape import moe_layers
from spectralmoe.training.data import ImageData, load_data
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization

POINTS = 20
MAX_STEPS = 400
CURVE = "curve.json"
GUARDED = Rule(layers="last", method="unit", augment=neighbours, strength=0.25)
IN_A_ROW = Rule(layers="last", method="unit", augment=neighbours, strength=2.0)
STREAM_BUDGET = 0.02
"""In a row every correction must cost less, as the costs add up: percentage points of the reference data for each."""


def build(row: str, data: ImageData, depth: int, seed: int) -> SRMoE:
    """The untrained network; rows under one seed start alike but for their gates."""
    torch.manual_seed(seed)
    pixels = data.train.images
    model = sr_moe(
        data.num_classes,
        channels=data.channels,
        width=WIDTH,
        depth=depth,
        num_experts=EXPERTS,
        hidden=HIDDEN,
        router=ROWS[row].router,
        mean=[round(v, 4) for v in pixels.mean((0, 2, 3)).tolist()],
        std=[round(v, 4) for v in pixels.std((0, 2, 3)).tolist()],
    )
    for stage in model.stages:
        stage.moe.dispatch = "dense"  # the same result; faster for networks this small
    return model


def fit(
    row: str, data: ImageData, depth: int, seed: int, epochs: int, setting: dict[str, float]
) -> tuple[SRMoE, float, list[dict[str, float]]]:
    """A trained network, its validation accuracy, and its load and spectrum through training."""
    model = build(row, data, depth, seed)
    budget = Optimization(epochs=epochs, batch_size=BATCH, lr=setting["lr"], weight_decay=0.0, seed=seed)
    curve: list[dict[str, float]] = []

    def watch(done: float) -> None:
        if done * POINTS >= len(curve) + 1 - 1e-9:
            curve.append({"done": done, **geometry(model, data)})
            model.train()

    history = train(model, data, budget, terms=scaled(ROWS[row].terms, setting["strength"]), progress=watch)
    return model.eval(), history.validation_accuracy, curve


def geometry(model: SRMoE, data: ImageData) -> dict[str, float]:
    """The smallest load of any expert, and the mean over layers of stable rank, sigma_1 and gate entropy."""
    part = data.validation.images[:500]
    model.eval()
    with torch.no_grad(), record(model) as tape:
        model(part)
    matrices = [
        m.detach()
        for layer in moe_layers(model).values()
        if layer.router and (m := layer.router.scorer.matrix) is not None
    ]
    entropy = [float(-(p * p.clamp_min(1e-12).log()).sum(-1).mean()) for p in (item.routing.probs for item in tape)]
    return {
        "min_load_share": min(min_share(item.routing.load()) for item in tape),
        "stable_rank": _mean([float(stable_rank(m)) for m in matrices]),
        "sigma_1": _mean([float(sigma_max(m)) for m in matrices]),
        "gate_entropy": _mean(entropy),
    }


def run_network(network: Network, plan: Plan, tuned: dict[str, Any], folder: Path, done: Sequence[str]) -> Any:
    """The cells of one network that are not done yet, its curve, and its stream if it is guarded.

    Returns:
        (cells, curve, stream or None)
    """
    torch.set_num_threads(1)
    data = load_data(network.dataset)
    if plan.train_size is not None:
        data = data.subset(plan.train_size)
    model, curve = _trained(network, plan, tuned, folder, data)
    test, found = data.test, evaluate(model, data.test.images, data.test.labels)
    shared = {"row": network.row, **network._asdict(), "accuracy": found.accuracy}
    shared |= {"min_load_share": min(map(min_share, found.loads.values()))} | {
        key: value for key, value in geometry(model, data).items() if key != "min_load_share"
    }
    cells, stream = [], None
    for way in ways(network, plan):
        if network.row + way in done:
            continue
        rule, guard = rule_of(network.row + way, tuned), None
        if way == GUARD:
            guard = make_guard(data, plan.reference)
            for layer in list(moe_layers(model).values())[-1:]:
                layer.experts.add_spare(SPARE)  # type: ignore[attr-defined]
        trials = one_shot_trials(
            model, test.images, test.labels, trials=plan.trials, rule=rule, guard=guard, seed=network.seed
        )
        cells.append({**shared, "row": network.row + way, **summary(trials), "rule": _plain(rule)})
        if guard is not None and (network.seed < plan.stream_seeds):
            stream = run_stream(
                copy.deepcopy(model),
                network,
                plan,
                data,
                IN_A_ROW,
                make_guard(data, plan.stream_reference, STREAM_BUDGET),
            )
    return cells, curve, stream


def make_guard(data: ImageData, size: int, budget: float = 0.1) -> Guard:
    """Reference data from the training part: never test, never what was tuned on."""
    return Guard([(data.train.images[:size], data.train.labels[:size])], budget=budget)


def _trained(
    network: Network, plan: Plan, tuned: dict[str, Any], folder: Path, data: ImageData
) -> tuple[SRMoE, list[dict[str, float]]]:
    place = folder / network.name
    if not (place / CURVE).exists():
        setting, epochs = tuned[network.row]["setting"], plan.epochs[network.dataset]
        model, _, curve = fit(network.row, data, network.depth, network.seed, epochs, setting)
        save(model, place)
        write_json(place / CURVE, curve)
    model = load(place).eval()  # type: ignore[assignment]
    return model, read_json(place / CURVE)


def rule_of(row: str, tuned: dict[str, Any]) -> Rule:
    """How the samples of a row are corrected: the step size that was chosen on validation data."""
    if row.endswith(GUARD):
        return GUARDED
    scope = "all-experts" if row.endswith(ALL_EXPERTS) else "one-expert"
    scope = "all-parameters" if row.endswith(ALL_PARAMETERS) else scope
    return Rule(layers="all", lr=tuned[row]["rule_lr"], max_steps=MAX_STEPS, scope=scope)  # type: ignore[arg-type]


def summary(trials: Sequence[Trial]) -> dict[str, Any]:
    """A cell's figures; interference over the trials that succeeded."""
    good = [trial for trial in trials if trial.success]
    changes = [trial.interference for trial in good]
    return {
        "interference_mean": _mean(changes) if good else None,
        "interference_worst": min(changes, default=None),
        "success": len(good) / len(trials) if trials else None,
        "trials": len(trials),
        "noisy_before": _mean([t.before.noisy for t in good]),
        "noisy_after": _mean([t.after.noisy for t in good]),
        "shifted_before": _mean([t.before.shifted or 0.0 for t in good]),
        "shifted_after": _mean([t.after.shifted or 0.0 for t in good]),
        "steps": _mean([t.steps for t in good]),
        "seconds": _mean([t.seconds for t in trials]),
        "methods": {name: sum(t.method == name for t in good) for name in sorted({t.method for t in good})},
    }


def run_stream(model: SRMoE, network: Network, plan: Plan, data: ImageData, rule: Rule, guard: Guard) -> dict[str, Any]:
    """Corrections in a row without taking any back."""
    before, images, labels = evaluate(model, data.test.images, data.test.labels), data.test.images, data.test.labels
    steps = correction_stream(model, images, labels, count=plan.stream, rule=rule, guard=guard, seed=network.seed)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[[step.sample for step in steps]] = False
    start = 100 * float((before.predictions == labels)[others].double().mean())
    good = [step for step in steps if step.success]
    return {
        **network._asdict(),
        "row": network.row + GUARD,
        "corrections": len(steps),
        "success": len(good) / len(steps),
        "cost": steps[-1].accuracy - start,
        "kept": steps[-1].kept,
        "noisy_after": _mean([step.after.noisy for step in good]),
        "shifted_after": _mean([step.after.shifted or 0.0 for step in good]),
        "accuracy": [round(step.accuracy, 4) for step in steps],
        "kept_so_far": [round(step.kept, 4) for step in steps],
    }


def _plain(rule: Rule) -> dict[str, Any]:
    values = asdict(rule)
    return {**values, "augment": None if rule.augment is None else rule.augment.__name__}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
