"""Small runs that cards share, so that their results are comparable: clothing, bytes of English, photos."""

from __future__ import annotations

from typing import Any

from spectralmoe.training.settings.run import TrainSettings

__all__ = ["small_images", "small_restoration", "small_text"]


def small_images(train_size: int = 4_000, epochs: int = 4, **moe: Any) -> TrainSettings:
    """A ViT with experts in both of its blocks (D = 64, 16 patches of 7 x 7 of Fashion-MNIST), 2 of 8 a patch.

    Args:
        moe: settings of its MoE parts in place of these, such as ``k=1`` or ``experts=16``.

    >>> small_images(k=1).moe.k
    1
    """
    vit = {"img_size": 28, "patch_size": 7, "embed_dim": 64, "depth": 2, "num_heads": 4}
    parts = {"kind": "replace_mlp", "init": "random", "blocks": "last2", "experts": 8, "k": 2, "bottleneck": 128}
    return _run(
        data="fashion-mnist",
        train_size=train_size,
        backbone={"name": "vit_tiny_patch16_224", "arguments": vit},
        moe={**parts, **moe},
        optimization={"epochs": epochs, "lr": 3e-3, "batch_size": 64},
    )


def small_text(windows: int = 5_000, **network: Any) -> TrainSettings:
    """A decoder of 2 blocks (D = 64) on the bytes of ``text:pydoc``, windows of 64, each read once; 2 of 8 experts.

    Args:
        windows: training windows.
        network: settings of the network in place of these, such as ``k=1``.

    >>> small_text().optimization.epochs
    1
    """
    sizes = {"width": 64, "num_experts": 8, "hidden": 64, "k": 2}
    return _run(
        data="text:pydoc",
        train_size=windows,
        depth=2,
        network={**sizes, **network},
        text={"length": 64, "vocab": "bytes", "measured": 128},
        optimization={"epochs": 1, "lr": 3e-3, "batch_size": 4},
    )


def small_restoration(train_size: int = 2_000, epochs: int = 6, **restore: Any) -> TrainSettings:
    """A restoration network with one MoE place (D = 32, 8 x 8 positions of patches of 32 x 32), one of 4 experts each.

    Its rows come from ``find_preset`` as those of other tasks; with ``unit="sample"`` whole patches are routed.

    Args:
        restore: settings of ``[restore]`` in place of these, such as ``unit="sample"`` or ``scale=2``; ``network`` is a
            table of settings of ``[network]``.

    >>> run = small_restoration(unit="sample", network={"num_experts": 8})
    >>> run.restore.unit, run.network.num_experts, run.network.k
    ('sample', 8, 1)
    """
    network = {"width": 32, "num_experts": 4, "hidden": 64, "k": 1, **restore.pop("network", {})}
    return _run(
        data="restore:photos",
        train_size=train_size,
        depth=1,
        network=network,
        restore={"scale": 4, **restore},
        optimization={"epochs": epochs, "lr": 3e-3, "batch_size": 32},
    )


def _run(**settings: Any) -> TrainSettings:
    return TrainSettings(**settings)
