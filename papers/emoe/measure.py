"""Part (a): one network from scratch, trained and measured."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from rows import ROWS, RouterFactory, Setting
from sizes import BATCH, EXPERTS, HIDDEN, MOE_BLOCKS, WEIGHT_DECAY, WIDTH, Sizes, vit_arguments
from torch import Tensor
from torch.nn import functional as F

from spectralmoe import FeedForward, MoE, after_step, param_groups, penalty, record
from spectralmoe.data.image_data import ImageData, load_data
from spectralmoe.diagnostics import dead_experts, evaluate, evaluation_mode, gini, holds_moe, max_vio, min_share
from spectralmoe.diagnostics.load import DEAD_SHARE
from spectralmoe.diagnostics.similarity import output_similarity
from spectralmoe.diagnostics.stability import changed_by_noise
from spectralmoe.experiments.cards import Desk, try_settings
from spectralmoe.tape import Record
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask
from spectralmoe.vision.model import VisionMoE, vision_moe

Progress = Callable[[float], None]
SHARED_IMAGES, SHARED_TOKENS, NOISE = 500, 4000, 0.05
TIMED_STEPS, ROUNDS = 10, 5


def dense_vit(data: ImageData, seed: int) -> VisionMoE:
    """The small ViT that all rows start from, bit by bit."""
    torch.manual_seed(seed)
    pixels = data.train.images
    return vision_moe(
        "vit_tiny_patch16_224",
        data.num_classes,
        channels=data.channels,
        arguments=vit_arguments(data.image_size[0]),
        mean=pixels.mean((0, 2, 3)).tolist(),
        std=pixels.std((0, 2, 3)).tolist(),
    )


def build(router: RouterFactory | None, data: ImageData, seed: int, experts: int = EXPERTS) -> VisionMoE:
    """The ViT with experts in the place of the last MLPs; under one seed all rows have the same expert weights."""
    model = dense_vit(data, seed)
    if router is None:
        return model
    torch.manual_seed(seed + 1000)
    banks = [FeedForward(experts, WIDTH, HIDDEN, bias=True) for _ in range(MOE_BLOCKS)]
    torch.manual_seed(seed + 2000)
    for block, bank in zip(model.backbone.blocks[-MOE_BLOCKS:], banks, strict=True):
        block.mlp = MoE(router(WIDTH, experts), bank)
    return model


def build_row(row: str, setting: Setting, data: ImageData, seed: int) -> VisionMoE:
    """The untrained network of a row."""
    router = ROWS[row].router
    return build(None if router is None else router(setting.knob), data, seed)


def fit_row(row: str, setting: Setting, data: ImageData, epochs: int, seed: int) -> tuple[VisionMoE, float]:
    """The trained network of a row, and its validation accuracy."""
    model = build_row(row, setting, data, seed)
    history = train(model, ImageTask(data), budget(setting.lr, epochs, seed), terms=ROWS[row].terms(setting.knob))
    return model, history.validation


def budget(lr: float, epochs: int, seed: int) -> Optimization:
    """How everything is trained here."""
    return Optimization(epochs=epochs, batch_size=BATCH, lr=lr, weight_decay=WEIGHT_DECAY, seed=seed)


def run_cell(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """One cell of results.json."""
    torch.set_num_threads(1)
    data, row = load_data(sizes.dataset), cell["row"]
    data = data if sizes.train_size is None else data.subset(sizes.train_size)
    setting = Setting(*desk.tuned["tuning"][row]["setting"])
    model, _ = fit_row(row, setting, data, sizes.epochs, cell["seed"])
    return {**measure(model, data.test.images, data.test.labels), "step_ms": desk.tuned["times"].get(row, 0.0)}


def tune_row(row: str, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """The setting of a row with the best validation accuracy, of as many tries as every other row has."""
    torch.set_num_threads(1)
    data = load_data(sizes.dataset).subset(sizes.tune_size)

    def train(setting: Mapping[str, Any]) -> tuple[float, None]:
        return fit_row(row, Setting(**setting), data, sizes.tune_epochs, 0)[1], None

    tried = try_settings([setting._asdict() for setting in ROWS[row].tries()], train, progress)
    return {row: {"setting": list(tried.setting.values()), "tries": tried.tries}}


def measure(model: VisionMoE, images: Tensor, labels: Tensor) -> dict[str, Any]:
    """Accuracy in percent and, with experts, their load, likeness and firmness: means over the layers.

    ``min_load_share`` is of the worst layer, ``dead`` the sum over layers; likeness is among experts that are not dead.
    """
    found = evaluate(model, images, labels)
    values: dict[str, Any] = {"accuracy": found.accuracy}
    names = ("maxvio", "gini", "dead", "min_load_share", "output_cos2", "entropy", "changed_by_noise")
    if not holds_moe(model):
        return values | dict.fromkeys(names)
    loads = list(found.loads.values())
    values |= {"maxvio": _mean(map(max_vio, loads)), "gini": _mean(map(gini, loads))}
    values |= {"dead": sum(map(dead_experts, loads)), "min_load_share": min(map(min_share, loads))}
    with torch.no_grad(), evaluation_mode(model), record(model, keep=("input",)) as tape:
        model(images[:SHARED_IMAGES])
    layers = [layer_values(item, loads[index]) for index, item in enumerate(tape)]
    return values | {name: _mean(layer[name] for layer in layers) for name in names[4:]}


def layer_values(item: Record, load: Tensor) -> dict[str, float]:
    """How alike the live experts of a layer are on shared tokens, and how sure and firm its router is."""
    x = tokens_of(item)[:SHARED_TOKENS]
    live = [e for e, share in enumerate(load.tolist()) if share >= DEAD_SHARE / len(load)]
    probs = item.routing.probs
    assert isinstance(item.layer, MoE)
    return {
        "output_cos2": output_similarity(item.layer.experts, x, among=live),
        "entropy": float(-(probs * probs.clamp_min(1e-12).log()).sum(-1).mean()) / math.log(probs.shape[1]),
        "changed_by_noise": changed_by_noise(item.layer.router, x, noise=NOISE),
    }


def tokens_of(item: Record) -> Tensor:
    """What the layer read (N, D), in its own order."""
    x = item.input.new_empty(len(item.routing.indices), item.input.shape[1])
    x[item.order // item.routing.indices.shape[1]] = item.input
    return x


def step_times(_row: str, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, float]:
    """Median milliseconds of a training step of every row, the rows taking turns in one process."""
    data = load_data(sizes.dataset)
    images, labels = data.train.images[:BATCH], data.train.labels[:BATCH]
    steps = {row: _stepper(row, data, images, labels) for row in ROWS}
    times: dict[str, list[float]] = {row: [] for row in ROWS}
    for _ in range(ROUNDS):
        for row, step in steps.items():
            for _ in range(TIMED_STEPS):
                started = time.perf_counter()
                step()
                times[row].append(1e3 * (time.perf_counter() - started))
    return {row: round(statistics.median(values[TIMED_STEPS:]), 2) for row, values in times.items()}


def _stepper(row: str, data: ImageData, images: Tensor, labels: Tensor) -> Any:
    setting = ROWS[row].tries()[0]
    model, terms = build_row(row, setting, data, 0), ROWS[row].terms(setting.knob)
    optimizer = torch.optim.AdamW(param_groups(model, WEIGHT_DECAY), lr=setting.lr)
    routed = holds_moe(model)

    def step() -> None:
        if not routed:
            loss = F.cross_entropy(model(images), labels)
        else:
            with record(model) as tape:
                logits = model(images)
            loss = F.cross_entropy(logits, labels) + penalty(tape, terms)[0]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if routed:
            after_step(model, tape)

    return step


def _mean(values: Any) -> float:
    found = [value for value in values if math.isfinite(value)]
    return sum(found) / len(found) if found else float("nan")
