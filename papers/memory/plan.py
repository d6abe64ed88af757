"""What the card runs: networks trained on clean images, aligned in several ways, tested under shifts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from rows import ROWS, SHIFTS, aligned, behaviour, measured, shifted
from torch import Tensor, nn

from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Cells, Check, Desk, Section, Step, Tuning, small_images, try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.grid import DIVERGED
from spectralmoe.layers import moe_layers
from spectralmoe.presets import find_preset
from spectralmoe.scorers import StatisticsMemory
from spectralmoe.training.loop import train
from spectralmoe.training.settings.run import TrainSettings
from spectralmoe.training.tasks.base import Metric
from spectralmoe.training.tasks.images import ImageTask

NETWORKS = ("layernorm", "bare")
"""The experts' tokens go through the block's LayerNorm, or come as they are."""
ROUTER = "linear+balanced"
RATES, LEAST = (0.5, 1.0, 2.0), (16, 32, 64, 256)
ACCURACY = Metric("accuracy", "accuracy", "mean over the shifts", "higher", unit="%")
SHIFTED = [shift for shift in SHIFTS if shift != "clean"]


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of one form of the card.

    Attributes:
        run: data, network and budget.
        validated: validation images that tune, and that streams observe.
        tested: test images.
        seeds: networks of each kind.
    """

    run: TrainSettings
    validated: int
    tested: int
    seeds: int


def trained(
    sizes: Sizes, network: str, rate: float, seed: int, share: Any = None
) -> tuple[nn.Module, ImageTask, float]:
    """A network with a memory in each of its layers, its task, and its accuracy on clean validation images."""
    torch.set_num_threads(1)
    moe = None if sizes.run.moe is None else sizes.run.moe.model_copy(update={"router": ROUTER})
    optimization = sizes.run.optimization.model_copy(update={"seed": seed, "lr": sizes.run.optimization.lr * rate})
    run = sizes.run.model_copy(update={"optimization": optimization, "moe": moe})
    task = ImageTask.open(run)
    model: Any = task.build(run)
    if network == "bare":
        for block in model.backbone.blocks:
            block.norm2 = nn.Identity()
    for layer in moe_layers(model).values():
        layer.memory = StatisticsMemory(layer.router.scorer.dim)
    history = train(model, task, run.optimization, terms=find_preset(ROUTER).terms, progress=share)
    return model.eval(), task, history.validation


def of_two_classes(task: ImageTask, seed: int) -> Tensor:
    """Clean training images of two classes that are drawn."""
    train = task.data.train
    chosen = torch.randperm(task.data.num_classes, generator=torch.Generator().manual_seed(seed))[:2]
    return train.images[torch.isin(train.labels, chosen)]


def tune(network: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The learning rate of a kind of network by clean validation images, then ``least`` of each row by shifted ones."""

    def train_with(setting: Mapping[str, Any]) -> tuple[float, Any]:
        model, task, validation = trained(sizes, network, setting["lr"], 0)
        return validation, (model, task)

    rate = try_settings([{"lr": rate} for rate in RATES], train_with, progress, ACCURACY)
    found: dict[str, Any] = {network: {**rate.setting, "tries": rate.tries}}
    model, task = rate.made
    images, labels = (each[: sizes.validated] for each in task.labelled("validation"))
    for name, row in ROWS.items():

        def align_with(setting: Mapping[str, Any], row: Any = row) -> tuple[float, None]:
            right = []
            for shift in SHIFTED:
                seen = shifted(images, shift, 1)
                other = aligned(model, row, **setting, unlabelled=seen, two_classes=of_two_classes(task, 0))
                right.append((behaviour(other, seen)[0] == labels).float().mean())
            return 100 * float(torch.stack(right).mean()), None

        tries = LEAST if row.tunable else LEAST[:1]
        tried = try_settings([{"least": least} for least in tries], align_with, progress, ACCURACY)
        found[f"{network}: {name}"] = {**tried.setting, "tries": tried.tries}
    return found


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, float]:
    """What every row of one network does under every shift: "row/shift/measure" -> value."""
    network, seed, tuned = cell["network"], cell["seed"], desk.tuned["tuning"]
    model, task, _ = trained(sizes, network, tuned[network]["lr"], seed, progress)
    images, labels = (each[: sizes.tested] for each in task.labelled("test"))
    others = task.labelled("validation")[0][: sizes.validated]
    num_experts = next(iter(moe_layers(model).values())).router.num_experts
    two_classes, values = of_two_classes(task, seed), {}
    before = behaviour(aligned(model, ROWS["none"], least=2, unlabelled=others, two_classes=two_classes), images)[1]
    for shift in SHIFTS:
        seen, unlabelled = shifted(images, shift, 2), shifted(others, shift, 3)
        for name, row in ROWS.items():
            least = tuned[f"{network}: {name}"]["least"]
            other = aligned(model, row, least=least, unlabelled=unlabelled, two_classes=two_classes)
            found = measured(*behaviour(other, seen), labels, before, num_experts)
            values |= {f"{name}/{shift}/{key}": value for key, value in found.items()}
    for name in ROWS:
        for key in ("accuracy", "changed", "max_vio"):
            values[f"{name}/shifted/{key}"] = sum(values[f"{name}/{shift}/{key}"] for shift in SHIFTED) / len(SHIFTED)
    return values


def by_row(cells: Any) -> list[dict[str, Any]]:
    """The cells of networks, taken apart into one a row."""
    return [
        {
            **{key: cell[key] for key in ("network", "seed", "cpu")},
            "row": row,
            **{key.removeprefix(f"{row}/"): value for key, value in cell.items() if key.startswith(f"{row}/")},
        }
        for cell in cells
        if DIVERGED not in cell
        for row in ROWS
    ]


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [{"network": network, "seed": seed} for seed in range(sizes.seeds) for network in NETWORKS]
    steps: list[Step] = [
        Tuning("tuning", NETWORKS, partial(tune, sizes=sizes)),
        Cells("results", wanted, partial(measure, sizes=sizes)),
    ]
    settings = {"run": sizes.run.model_dump(mode="json"), "validated": sizes.validated, "tested": sizes.tested}
    check = Check(Cells("results", wanted, partial(measure, sizes=sizes)), ("network",), CHECKED)
    return Card("Statistics memory under shift", ABOUT, settings, steps, sections, figures, check)


ABOUT = """
Written by `spectralmoe card papers/memory`: mean and 95% interval over seeds. The rows of one network share its
weights, so their differences are those of the alignment alone; "separated" where the 95% interval of a difference
leaves out 0. Contrast: pixels halve their distance to grey. Brightness: .3 is added. Noise: of deviation .2. Occlusion:
a black square of half the side. "Shifted": the mean over these four. Changed: tokens with another expert than the
network without alignment has for the clean image, mean over layers. MaxVio: largest load over mean load minus 1, mean
over layers.
"""

PAIRS = [
    ("router", "none"),
    ("layer", "none"),
    ("router", "router, two classes"),
    ("layer", "layer, two classes"),
    ("router, stream", "none"),
    ("layer, stream", "none"),
    ("layer, stream", "layer, stream, two classes"),
]
CHECKED = [f"{row}/shifted/accuracy" for row in ("none", "router", "layer", "layer, stream")]
ACCURACIES = [
    Column(f"{shift}/accuracy", f"{shift} %", 1, f"accuracy, {shift} test images", better="higher")
    for shift in (*SHIFTS, "shifted")
]
ROUTING = [
    *(
        Column(f"{shift}/changed", f"changed %, {shift}", 1, "tokens with another expert", 100.0, better="lower")
        for shift in (*SHIFTS, "shifted")
    ),
    Column("clean/max_vio", "MaxVio, clean", 2, "of the load", better="lower"),
    Column("shifted/max_vio", "MaxVio, shifted", 2, "of the load", better="lower"),
]
HEADINGS = {"layernorm": "## Experts behind a LayerNorm", "bare": "## Experts without a LayerNorm before them"}


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """For each kind of network accuracies, then routing; at last what the LayerNorm does by itself."""
    rows, found = by_row(stored["results"]), []
    for network, heading in HEADINGS.items():
        cells = [cell for cell in rows if cell["network"] == network]
        found.append(Section(heading, cells, ACCURACIES, pairs=PAIRS))
        found.append(Section(f"{heading}: routing", cells, ROUTING, pairs=PAIRS))
    plain = [{**cell, "row": cell["network"]} for cell in rows if cell["row"] == "none"]
    found.append(Section("## The LayerNorm alone", plain, ACCURACIES, pairs=[("layernorm", "bare")]))
    return found


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """None: the tables say it."""
    return {}


FULL = card(Sizes(small_images(4_000, 4, k=1), validated=1_000, tested=2_000, seeds=5))
_TINY: dict[str, Any] = {"img_size": 8, "patch_size": 2, "embed_dim": 32, "depth": 2, "num_heads": 2}
_QUICK = small_images(300, 2, k=1, bottleneck=32).model_copy(update={"data": "digits"})
QUICK = card(
    Sizes(
        _QUICK.model_copy(update={"backbone": _QUICK.backbone.model_copy(update={"arguments": _TINY})}),
        validated=100,
        tested=200,
        seeds=1,
    )
)
