"""What the card runs: the network, and the sizes of the full and the quick form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WIDTH, HEADS, DEPTH, PATCH = 64, 4, 4, 7
HIDDEN, EXPERTS, MOE_BLOCKS = 128, 8, 2
BOTTLENECK = 32
BATCH, WEIGHT_DECAY = 128, 0.05
SEEN = 5
"""Classes of fashion-mnist that the backbone of the few-shot part is trained on; the others are new to it."""


def vit_arguments(size: int) -> dict[str, Any]:
    """A small ViT for images of ``size`` pixels a side: 16 patches at 28 pixels, mean pooling, no class token."""
    return {
        "img_size": size,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "mlp_ratio": HIDDEN / WIDTH,
        "class_token": False,
        "global_pool": "avg",
    }


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes of one form of the card.

    Attributes:
        epochs, train_size: of every network of part (a); None: all images.
        seeds: of part (a).
        tune_size, tune_epochs: where settings are chosen, on validation data.
        ablation_size, ablation_epochs, ablation_seeds: of part (c).
        backbone_epochs: of the frozen backbone of part (b), on ``SEEN`` classes.
        shots, draws, shot_epochs: of part (b).
    """

    dataset: str
    epochs: int
    train_size: int | None
    seeds: int
    tune_size: int
    tune_epochs: int
    ablation_size: int
    ablation_epochs: int
    ablation_seeds: int
    backbone_epochs: int
    tasks: tuple[str, ...]
    shots: tuple[int, ...]
    draws: int
    shot_epochs: int


FULL = Plan(
    dataset="fashion-mnist",
    epochs=2,
    train_size=None,
    seeds=5,
    tune_size=20_000,
    tune_epochs=2,
    ablation_size=20_000,
    ablation_epochs=2,
    ablation_seeds=1,
    backbone_epochs=3,
    tasks=("new classes", "mnist5k"),
    shots=(1, 5, 10),
    draws=5,
    shot_epochs=60,
)

CHECKED = ("EMoE",)
"""The rows that ``--check`` runs again."""

QUICK = Plan(
    dataset="mnist5k",
    epochs=2,
    train_size=1_000,
    seeds=1,
    tune_size=500,
    tune_epochs=1,
    ablation_size=500,
    ablation_epochs=1,
    ablation_seeds=1,
    backbone_epochs=2,
    tasks=("new classes",),
    shots=(1, 5),
    draws=1,
    shot_epochs=5,
)
