"""One network of the card: train it, measure it, correct it in every way that the card asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from plan import BATCH, EXPERTS, HIDDEN, SPARE, WIDTH, Network, Plan
from rows import ALL_EXPERTS, ALL_PARAMETERS, GUARD, ROWS, STREAM, scaled

from spectralmoe import load, record, save
from spectralmoe.adaptation import COPIES, Guard, Rule, Trial, correction_stream, neighbours, one_shot_trials
from spectralmoe.adaptation.one_shot import Carried
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.diagnostics import evaluate, min_share
from spectralmoe.files import read_json, write_json
from spectralmoe.linalg import sigma_max, stable_rank
from spectralmoe.machine import cpu_model
from spectralmoe.models import SRMoE, sr_moe
from spectralmoe.tape import moe_layers
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask

Progress = Callable[[float], None]
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

    history = train(model, ImageTask(data), budget, terms=scaled(ROWS[row].terms, setting["strength"]), progress=watch)
    return model.eval(), history.validation, curve


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


def run_network(
    network: Network, ways: Sequence[str], plan: Plan, tuned: dict[str, Any], folder: Path, progress: Progress
) -> Any:
    """Train a network, unless ``folder`` has it, and correct it in these ways.

    Returns:
        (cells, curve, streams)
    """
    torch.set_num_threads(1)
    data = load_data(network.dataset)
    if plan.train_size is not None:
        data = data.subset(plan.train_size)
    model, curve = _trained(network, plan, tuned, folder, data)
    found = evaluate(model, data.test.images, data.test.labels)
    shared = {**network._asdict(), "cpu": cpu_model(), "accuracy": found.accuracy}
    shared |= {**geometry(model, data), "min_load_share": min(map(min_share, found.loads.values()))}
    cells, streams = [], []
    for index, way in enumerate(ways):
        progress(index / len(ways))
        row = network.row + way
        if way == STREAM:
            streams.append({**shared, "row": row, **run_stream(_with_spare(model), network, plan, data)})
            continue
        guarded, rule = way == GUARD, rule_of(row, tuned)
        trials = one_shot_trials(
            _with_spare(model) if guarded else model,
            data.test.images,
            data.test.labels,
            trials=plan.guard_trials if guarded else plan.trials,
            rule=rule,
            guard=make_guard(data, plan.reference) if guarded else None,
            seed=network.seed,
        )
        cells.append({**shared, "row": row, **summary(trials), "rule": _plain(rule)})
    return cells, curve, streams


def _with_spare(model: SRMoE) -> SRMoE:
    """A copy with spare hidden units in the last layer."""
    extended = copy.deepcopy(model)
    list(moe_layers(extended).values())[-1].experts.add_spare(SPARE)  # type: ignore[attr-defined]
    return extended


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
        **carry([t.before for t in good], "before"),
        **carry([t.after for t in good], "after"),
        "steps": _mean([t.steps for t in good]),
        "seconds": _mean([t.seconds for t in trials]),
        "methods": {name: sum(t.method == name for t in good) for name in sorted({t.method for t in good})},
    }


def carry(shares: Sequence[Carried], when: str) -> dict[str, float]:
    """Mean share of copies that are right, kind by kind."""
    return {f"{kind}_{when}": _mean([share[kind] for share in shares]) for kind in COPIES}


def run_stream(model: SRMoE, network: Network, plan: Plan, data: ImageData) -> dict[str, Any]:
    """Guarded corrections in a row without taking any back."""
    before, images, labels = evaluate(model, data.test.images, data.test.labels), data.test.images, data.test.labels
    guard = make_guard(data, plan.stream_reference, STREAM_BUDGET)
    steps = correction_stream(model, images, labels, count=plan.stream, rule=IN_A_ROW, guard=guard, seed=network.seed)
    others = torch.ones(len(labels), dtype=torch.bool)
    others[[step.sample for step in steps]] = False
    start = 100 * float((before.predictions == labels)[others].double().mean())
    good = [step for step in steps if step.success]
    return {
        "corrections": len(steps),
        "success": len(good) / len(steps),
        "cost": steps[-1].accuracy - start,
        "kept": steps[-1].kept,
        **carry([step.after for step in good], "after"),
        "accuracy_on_others": [round(step.accuracy, 4) for step in steps],
        "kept_so_far": [round(step.kept, 4) for step in steps],
    }


def _plain(rule: Rule) -> dict[str, Any]:
    values = asdict(rule)
    return {**values, "augment": None if rule.augment is None else rule.augment.__name__}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")
