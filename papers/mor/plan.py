"""What the card runs: ranks as experts in a network that knows noise alone, routed by severity, true or shuffled."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from network import ROWS, Restorer
from safetensors.torch import load_file, save_file
from task import THIRDS, Restoration, Sizes, new_base, restored
from torch import Tensor

from spectralmoe import record
from spectralmoe.data.degradations import DEGRADATIONS
from spectralmoe.draw.panels import Panel
from spectralmoe.experiments.cards import Card, Cells, Desk, Section, Tuning, difference_panels, try_settings
from spectralmoe.experiments.compare.columns import Column
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.experiments.compare.tuning import candidates
from spectralmoe.layers import moe_layers
from spectralmoe.training.loop import train
from spectralmoe.training.settings import Optimization
from spectralmoe.training.tasks.restoration_scores import PSNR

FROZEN = "frozen"
ESTIMATE = {"noise": 0, "rain": 0, "blur": 1, "haze": 2}
"""Degradation -> the one of the three estimates that is meant for it."""

PAIRS = (
    ("mor", "mor, shuffled"),
    ("mor", "ranks, zero experts"),
    ("mor", "ranks"),
    ("mor", "lora-moe"),
    ("mor", "lora, rank 16"),
    ("mor", "lora, rank 40"),
    ("ranks", "lora-moe"),
    ("lora, rank 40", "lora, rank 16"),
    ("mor, known", "mor"),
)


def base_of(desk: Desk, sizes: Sizes) -> Restorer:
    """The network trained on noise alone, the same for all rows and seeds."""

    def fill(place: Path) -> None:
        base = new_base(sizes)
        settings = Optimization(epochs=sizes.base, batch_size=sizes.batch, lr=sizes.base_rate)
        train(base, Restoration(sizes, kinds=("noise",)), settings)
        place.mkdir()
        save_file(base.state_dict(), place / "base.safetensors")

    base = new_base(sizes)
    base.load_state_dict(load_file(desk.kept("base", fill) / "base.safetensors"))
    return base


def adapted(
    row: str, sizes: Sizes, tuned: Tuned, seed: int, desk: Desk, progress: Any = None
) -> tuple[Restorer, Restoration, float]:
    """The network of a row after training, its task, and its PSNR on validation images."""
    torch.set_num_threads(1)
    base = base_of(desk, sizes)
    task = Restoration(sizes, ROWS[row].reads)
    torch.manual_seed(seed)
    network = ROWS[row].network(base, width=task.parts["train"].severity.shape[1])
    settings = Optimization(epochs=sizes.epochs, batch_size=sizes.batch, lr=sizes.rate * tuned.lr, seed=seed)
    history = train(network, task, settings, terms=ROWS[row].strengthened(tuned.strength), progress=progress)
    return network, task, history.validation


def tune(row: str, desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """The factors on learning rate and terms that validation images prefer, in half of the epochs."""
    shorter = replace(sizes, epochs=max(1, sizes.epochs // 2))

    def validation(setting: Mapping[str, Any]) -> tuple[float, None]:
        return adapted(row, shorter, Tuned(**setting), 0, desk)[2], None

    tried = try_settings([each._asdict() for each in candidates(sizes.tries)], validation, progress, PSNR)
    return {row: {"setting": dict(tried.setting), "tries": tried.tries}}


def measure(cell: Mapping[str, Any], desk: Desk, progress: Any, *, sizes: Sizes) -> dict[str, Any]:
    """PSNR on test images, and how many ranks which images got; of the frozen network PSNR alone."""
    if cell["row"] == FROZEN:
        task = Restoration(sizes)
        return {**task.score(base_of(desk, sizes), "test"), **seen(task)}
    tuned = Tuned(**desk.tuned["tuning"][cell["row"]]["setting"])
    network, task, validation = adapted(cell["row"], sizes, tuned, cell["seed"], desk, progress)
    return {**task.score(network, "test"), "validation_psnr": validation, **used(network, task)}


def seen(task: Restoration) -> dict[str, float | None]:
    """How the estimate that is meant for each degradation follows its true severity: rank correlations."""
    found, values = task.parts["test"], {}
    for place, name in enumerate(DEGRADATIONS):
        mine = found.pairs.kinds == place
        values[f"seen_{name}"] = spearman(found.severity[mine, ESTIMATE[name]], found.pairs.severity[mine, place])
    return values


@torch.no_grad()
def used(network: Restorer, task: Restoration) -> dict[str, float | None]:
    """Real ranks an image gets, their rank correlation with its true severity, and the share of zero experts."""
    found = task.as_given("test")
    with record(network.eval()) as tape:
        restored(network, found)
    active, zeros = [], []
    for item in tape:
        real = (item.routing.indices < item.layer.ranks).sum(1)
        active.append(real.view(item.routing.shape).double().mean(1))
        zeros.append(1 - real.sum() / item.routing.indices.numel())
    each = torch.stack(active).mean(0)
    follows = spearman(each, found.pairs.severity.amax(1)) if any(layer.zero for layer in layers(network)) else None
    return {"active": float(each.mean()), "follows": follows, "zeros": float(torch.stack(zeros).mean())}


def layers(network: Restorer) -> list[Any]:
    return list(moe_layers(network).values())


def spearman(one: Tensor, two: Tensor) -> float | None:
    """The rank correlation of two lists of numbers (N,), equal ones sharing a rank; None where all of one are equal."""
    ranks = [(x[:, None] > x).double().sum(1) + (x[:, None] == x).double().sum(1) / 2 for x in (one, two)]
    a, b = (r - r.mean() for r in ranks)
    size = float(a.norm() * b.norm())
    return float(a @ b) / size if size else None


def card(sizes: Sizes) -> Card:
    """One form of the card."""
    wanted = [{"row": row, "seed": seed} for seed in range(sizes.seeds) for row in (FROZEN, *ROWS)]
    steps = [
        Tuning("tuning", list(ROWS), partial(tune, sizes=sizes)),
        Cells("results", wanted, partial(measure, sizes=sizes)),
    ]
    settings = {name: value for name, value in asdict(sizes).items() if name != "seeds"}
    return Card("Mixture of Ranks", ABOUT, settings, steps, sections, figures)


ABOUT = """
Written by `spectralmoe card papers/mor`: mean and 95% interval over seeds; the test photographs chose nothing. PSNR in
dB, mean over test images; low, middle and high: thirds of the true severity. Active: real ranks of the 8 that an image
gets, mean over layers. Follows: rank correlation of that number with the true severity. Zeros: share of the choices
that fall on zero experts. Differences are paired: the same seed, so the same start and the same order of images, on the
same processor; "separated" where their 95% interval leaves out 0. Single cells are not stable across processors, means
over seeds are.
"""

PSNRS = [
    Column("psnr", "PSNR", 2, "mean over test images", better="higher", unit="dB"),
    *(Column(f"psnr_{name}", name, 2, f"PSNR of {name}", better="higher", unit="dB") for name in DEGRADATIONS),
    *(Column(f"psnr_{name}", name, 2, f"PSNR at {name} severity", better="higher", unit="dB") for name in THIRDS),
]
ROUTING = [
    Column("active", "active", 2, "real ranks of the chosen, mean over layers"),
    Column("follows", "follows", 2, "rank correlation of active ranks with the true severity", better="higher"),
    Column("zeros", "zeros %", 1, "choices that fall on zero experts", 100.0),
]
SEEN = [
    Column(f"seen_{name}", name, 2, f"rank correlation of its estimate with the severity of {name}", better="higher")
    for name in DEGRADATIONS
]


def sections(stored: Mapping[str, Any]) -> list[Section]:
    """PSNR with its differences, which ranks were used, and what the estimate sees."""
    frozen = [cell for cell in stored["results"] if cell["row"] == FROZEN]
    routed = [cell for cell in stored["results"] if cell["row"] != FROZEN]
    return [
        Section("## Restored images", stored["results"], PSNRS, pairs=PAIRS),
        Section("## Ranks in use", routed, ROUTING, pairs=PAIRS[:2]),
        Section("## What the estimate sees", frozen, SEEN),
    ]


def figures(stored: Mapping[str, Any]) -> dict[str, list[Panel]]:
    """Every row less the LoRA with as many ranks in use."""
    adapted_cells = [cell for cell in stored["results"] if cell["row"] != FROZEN]
    return {"psnr": difference_panels(adapted_cells, PSNRS, "lora, rank 16")}


FULL = card(Sizes())
QUICK = card(Sizes(train=64, held=24, width=8, base=1, epochs=1, tries=1, seeds=1))
