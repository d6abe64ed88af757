"""The network, and what the sizes of a form of the card are."""

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
class Sizes:
    """Sizes of one form of the card; those of ``GROWING`` change no cell that is there.

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


GROWING = ("seeds", "ablation_seeds", "tasks", "shots", "draws")
