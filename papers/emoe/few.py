"""Part (b): few images of a new task, adapters and a head trained on a frozen backbone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from measure import Progress, budget, dense_vit
from rows import ROWS
from sizes import BOTTLENECK, EXPERTS, MOE_BLOCKS, SEEN, Sizes

from spectralmoe import LinearScorer, Router, Term, TopK
from spectralmoe.data.image_data import ImageData, Split, load_data
from spectralmoe.experiments.cards import Desk, try_settings
from spectralmoe.experiments.few_shot.learning import draw_shots, few_shot
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks import ImageTask
from spectralmoe.vision import BranchSpec
from spectralmoe.vision.model import VisionMoE

SHOT_LRS = (1e-3, 3e-3, 1e-2)
TUNE_SHOTS, TUNE_DRAWS = 5, 2
FAITHFUL_RANK = 32


class FewRow(NamedTuple):
    """What is trained besides the head."""

    spec: BranchSpec | None
    terms: Mapping[str, Term]


def _linear(experts: int) -> BranchSpec:
    """Adapters behind the dot-product gate; one of them is a dense adapter, whose weight is always 1."""
    return BranchSpec(
        router=lambda dim, e: Router(LinearScorer(dim, e), TopK(1)),
        experts=experts,
        bottleneck=BOTTLENECK,
        blocks=f"last{MOE_BLOCKS}",
        tokens="all",
        norm=True,
        start="authors",
    )


def _emoe(row: str | dict[str, Any]) -> BranchSpec:
    """EMoE; like all rows of the card it starts with random adapters, as the authors have it."""
    return BranchSpec.of(row, experts=EXPERTS, bottleneck=BOTTLENECK, blocks=f"last{MOE_BLOCKS}", start="authors")


FEW_ROWS: dict[str, FewRow] = {
    "linear probe": FewRow(None, {}),
    "dense adapter": FewRow(_linear(1), {}),
    "linear": FewRow(_linear(EXPERTS), {}),
    "linear+load_balance": FewRow(_linear(EXPERTS), ROWS["linear+load_balance"].terms(1e-2)),
    "EMoE faithful": FewRow(_emoe({"preset": "emoe-faithful", "rank": FAITHFUL_RANK}), {}),
    "EMoE": FewRow(_emoe("emoe"), {}),
}


def seen_part(split: Split, *, seen: bool) -> Split:
    """The images of the classes that the backbone knows, or of the others, with labels from 0."""
    own = split.labels < SEEN if seen else split.labels >= SEEN
    return Split(split.images[own], split.labels[own] - (0 if seen else SEEN))


def task_data(task: str, sizes: Sizes) -> ImageData:
    """The data of a task: the classes that the backbone never saw, or another data set."""
    if task != "new classes":
        return load_data(task)
    data = load_data(sizes.dataset)
    parts = (seen_part(part, seen=False) for part in (data.train, data.validation, data.test))
    return ImageData(task, *parts, classes=data.classes[SEEN:])


def backbone(desk: Desk, sizes: Sizes) -> VisionMoE:
    """The dense ViT trained on the first classes; trained once."""

    def fresh() -> tuple[VisionMoE, None]:
        data = load_data(sizes.dataset)
        known = (seen_part(part, seen=True) for part in (data.train, data.validation, data.test))
        train_part, validation, test = known
        model = dense_vit(data, 0)
        model.new_head(SEEN)
        kept = replace(data, train=train_part, validation=validation, test=test, classes=data.classes[:SEEN])
        train(model, ImageTask(kept), budget(2e-3, sizes.backbone_epochs, 0))
        return model, None

    return desk.network("backbone", fresh)[0]  # type: ignore[return-value]


def shot_budget(lr: float, sizes: Sizes, seed: int) -> Optimization:
    """How everything is trained in this part."""
    return Optimization(epochs=sizes.shot_epochs, batch_size=32, lr=lr, weight_decay=1e-2, seed=seed)


def tune_few(row: str, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a row: the best on validation images of the first task, over draws that no cell has."""
    torch.set_num_threads(1)
    model, data = backbone(desk, sizes), task_data(sizes.tasks[0], sizes)

    def train_all(setting: Mapping[str, float]) -> tuple[float, None]:
        part, lr = data.validation, setting["lr"]
        reached = [_accuracy(row, model, data, TUNE_SHOTS, lr, sizes, seed, part) for seed in _tune_seeds()]
        return sum(reached) / len(reached), None

    tried = try_settings([{"lr": lr} for lr in SHOT_LRS], train_all, progress)
    return {row: {"lr": tried.setting["lr"], "tries": tried.tries}}


def run_few(cell: Any, desk: Desk, progress: Progress, *, sizes: Sizes) -> dict[str, Any]:
    """One cell of fewshot.json."""
    torch.set_num_threads(1)
    model, data = backbone(desk, sizes), task_data(cell["task"], sizes)
    lr = desk.tuned["fewshot_tuning"][cell["row"]]["lr"]
    return {"accuracy": _accuracy(cell["row"], model, data, cell["shots"], lr, sizes, cell["seed"], data.test)}


def _accuracy(
    row: str, model: VisionMoE, data: ImageData, shots: int, lr: float, sizes: Sizes, seed: int, part: Split
) -> float:
    spec, terms = FEW_ROWS[row]
    drawn = draw_shots(data.train, shots, data.num_classes, seed)
    return few_shot(model, spec, drawn, part, data.num_classes, settings=shot_budget(lr, sizes, seed), terms=terms)


def _tune_seeds() -> range:
    return range(1000, 1000 + TUNE_DRAWS)
