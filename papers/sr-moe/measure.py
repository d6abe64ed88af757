"""One network of the card: train it, measure it, correct it in every way that the card asks for."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from rows import ALL_EXPERTS, ALL_PARAMETERS, GUARD, ROWS, WAYS, scaled

from spectralmoe import record
from spectralmoe.adaptation import COPIES, Guard, Rule, Trial, correction_stream, neighbours, one_shot_trials
from spectralmoe.adaptation.one_shot import Carried
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.diagnostics import evaluate, min_share
from spectralmoe.experiments.cards import Desk
from spectralmoe.layers import moe_layers
from spectralmoe.linalg import sigma_max, stable_rank
from spectralmoe.models import SRMoE, sr_moe
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask

Progress = Callable[[float], None]
WIDTH, EXPERTS, HIDDEN, SPARE = 64, 8, 32, 40
BATCH = 128
POINTS = 20
MAX_STEPS = 400
GUARDED = Rule(layers="last", method="unit", augment=neighbours, strength=0.25)
IN_A_ROW = Rule(layers="last", method="unit", augment=neighbours, strength=2.0)
STREAM_BUDGET = 0.02
"""In a row every correction must cost less, as the costs add up: percentage points of the reference data for each."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sizes of one form of the card; another size is another cell.

    Attributes:
        epochs: by data set.  train_size: images; None: all.
        trials, guard_trials: one-shot trials a cell, and a cell with a guard, where each takes longer.
        stream: corrections in a row.
        tries: settings that each row tries.  tune_on, tune_depth, tune_size, tune_epochs, rule_trials: where.
        reference, stream_reference: images of the guard, from the training part; more where costs add up.
    """

    epochs: dict[str, int]
    train_size: int | None
    trials: int
    guard_trials: int
    stream: int
    tries: int
    tune_on: str
    tune_depth: int
    tune_size: int
    tune_epochs: int
    rule_trials: int
    reference: int
    stream_reference: int


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


def train_network(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """Train the network of a cell, unless it is there: its load and spectrum through training."""
    return {"curve": _trained(cell, desk, sizes, _data(cell, sizes))[1]}


def correct(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """One-shot trials on the network of a cell, in the way that its row's name ends with."""
    data = _data(cell, sizes)
    model, _ = _trained(cell, desk, sizes, data)
    progress(0.5)
    guarded, rule = cell["row"].endswith(GUARD), rule_of(cell["row"], desk.tuned["tuning"])
    trials = one_shot_trials(
        _with_spare(model) if guarded else model,
        data.test.images,
        data.test.labels,
        trials=sizes.guard_trials if guarded else sizes.trials,
        rule=rule,
        guard=make_guard(data, sizes.reference) if guarded else None,
        seed=cell["seed"],
    )
    return {**about_network(model, data), **summary(trials), "rule": _plain(rule)}


def correct_in_a_row(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """Guarded corrections in a row on the network of a cell."""
    data = _data(cell, sizes)
    model, _ = _trained(cell, desk, sizes, data)
    return {**about_network(model, data), **run_stream(_with_spare(model), cell["seed"], sizes, data, progress)}


def about_network(model: SRMoE, data: ImageData) -> dict[str, float]:
    """Test accuracy, load and spectrum."""
    tested = evaluate(model, data.test.images, data.test.labels)
    shares = {"min_load_share": min(map(min_share, tested.loads.values()))}
    return {"accuracy": tested.accuracy, **geometry(model, data), **shares}


def _data(cell: Any, sizes: Sizes) -> ImageData:
    torch.set_num_threads(1)
    data = load_data(cell["dataset"])
    return data if sizes.train_size is None else data.subset(sizes.train_size)


def _with_spare(model: SRMoE) -> SRMoE:
    """A copy with spare hidden units in the last layer."""
    extended = copy.deepcopy(model)
    list(moe_layers(extended).values())[-1].experts.add_spare(SPARE)  # type: ignore[attr-defined]
    return extended


def make_guard(data: ImageData, size: int, budget: float = 0.1) -> Guard:
    """Reference data from the training part: never test, never what was tuned on."""
    return Guard([(data.train.images[:size], data.train.labels[:size])], budget=budget)


def _trained(cell: Any, desk: Desk, sizes: Sizes, data: ImageData) -> tuple[SRMoE, list[dict[str, float]]]:
    row = next((cell["row"].removesuffix(way) for way in WAYS if cell["row"].endswith(way)), cell["row"])
    dataset, depth, seed = cell["dataset"], cell["depth"], cell["seed"]

    def fresh() -> tuple[SRMoE, list[dict[str, float]]]:
        setting = desk.tuned["tuning"][row]["setting"]
        model, _, curve = fit(row, data, depth, seed, sizes.epochs[dataset], setting)
        return model, curve

    name = f"{row.replace(' ', '_')}-{dataset}-depth{depth}-seed{seed}"
    return desk.network(name, fresh)  # type: ignore[return-value]


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


def run_stream(model: SRMoE, seed: int, sizes: Sizes, data: ImageData, progress: Progress) -> dict[str, Any]:
    """Guarded corrections in a row without taking any back."""
    before, images, labels = evaluate(model, data.test.images, data.test.labels), data.test.images, data.test.labels
    guard = make_guard(data, sizes.stream_reference, STREAM_BUDGET)
    steps = correction_stream(
        model, images, labels, count=sizes.stream, rule=IN_A_ROW, guard=guard, seed=seed, progress=progress
    )
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
