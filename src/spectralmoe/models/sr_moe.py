"""A small deep MoE network for images: stem, N MoE stages, head.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889: convolutional stem, then stages of a local processor (Linear, ReLU, LayerNorm) and an MoE layer. No
public code. Not given in the paper and chosen here: the residual path around each stage (without it accuracy falls
with depth), the LayerNorm before the head, the stem's sizes, the experts (Linear, ReLU, Linear).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import PrototypeScorer
from spectralmoe.selectors import TopK

__all__ = ["ConvStem", "SRMoE", "Stage", "sr_moe"]


class ConvStem(nn.Module):
    """Images (B, C, H, W) with values in [0, 1] -> features (B, D): two strided convolutions, pooling, a linear layer.

    Args:
        channels: C.
        width: D.
        mean, std: pixel statistics of the training images, one value a channel.
    """

    GRID = 4

    def __init__(
        self, channels: int, width: int, mean: Sequence[float] = (0.5,), std: Sequence[float] = (0.25,)
    ) -> None:
        super().__init__()
        self.channels, self.width = channels, width
        self.mean, self.std = list(mean), list(std)
        self.convolutions = nn.Sequential(
            nn.Conv2d(channels, 16, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(self.GRID),
            nn.Flatten(),
        )
        self.project = nn.Linear(32 * self.GRID**2, width)

    def forward(self, images: Tensor) -> Tensor:
        mean, std = (images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std))
        features: Tensor = self.project(self.convolutions((images - mean) / std))
        return features


class Stage(nn.Module):
    r"""One MoE stage: :math:`z' = \mathrm{LN}(\mathrm{ReLU}(A z + a))`, :math:`z \leftarrow z + \mathrm{MoE}(z')`.

    Args:
        moe: the layer, D wide.
        residual: add z; without it the stage returns MoE(z') alone, as the paper may be read.
    """

    def __init__(self, moe: MoE, *, residual: bool = True) -> None:
        super().__init__()
        dim = moe.router.scorer.dim
        self.residual = residual
        self.processor = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim))
        self.moe = moe

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.moe(self.processor(z))
        return z + y if self.residual else y


class SRMoE(nn.Module):
    """Images (B, C, H, W) -> class logits (B, num_classes): stem, stages, LayerNorm and linear head.

    Args:
        stem: images -> (B, D).
        stages: the MoE stages, all D wide.
        num_classes: number of logits.

    Raises:
        UserError: no stage; stages of another width than the stem.
    """

    def __init__(self, stem: ConvStem, stages: Sequence[Stage], num_classes: int) -> None:
        super().__init__()
        if not stages:
            raise UserError("SRMoE: depth must be at least 1")
        for stage in stages:
            if stage.moe.router.scorer.dim != stem.width:
                raise UserError(
                    f"SRMoE: a stage is {stage.moe.router.scorer.dim} wide, but the stem gives D={stem.width}"
                )
        self.stem = stem
        self.stages = nn.ModuleList(stages)
        self.norm = nn.LayerNorm(stem.width)
        self.head = nn.Linear(stem.width, num_classes)
        self.num_classes = num_classes

    def forward(self, images: Tensor) -> Tensor:
        return self.classify(self.stem(images))

    def classify(self, features: Tensor, first: int = 0) -> Tensor:
        """Logits from the input (B, D) of stage ``first``: the rest of the network after a prefix was cached."""
        for stage in self.stages[first:]:
            features = stage(features)
        logits: Tensor = self.head(self.norm(features))
        return logits


RouterFactory = Callable[[int, int], Router]


def sr_moe(
    num_classes: int,
    *,
    channels: int = 1,
    width: int = 64,
    depth: int = 2,
    num_experts: int = 8,
    hidden: int = 32,
    router: RouterFactory | None = None,
    residual: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SRMoE:
    """An SRMoE network of ``depth`` equal stages.

    Everything but the routers is initialised first: under one seed two networks that differ only in their routers
    start with the same stem, experts and head.

    Args:
        router: (D, E) -> a router; default: prototypes with soft routing.

    >>> sr_moe(10, depth=2)(torch.rand(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    """
    make_router = router or (lambda dim, experts: Router(PrototypeScorer(dim, experts), TopK()))
    stem = ConvStem(channels, width, mean or [0.5] * channels, std or [0.25] * channels)
    banks = [FeedForward(num_experts, width, hidden, activation="relu", bias=True) for _ in range(depth)]
    state = torch.get_rng_state()
    routers = [make_router(width, num_experts) for _ in range(depth)]
    torch.set_rng_state(state)
    stages = [Stage(MoE(r, bank), residual=residual) for r, bank in zip(routers, banks, strict=True)]
    return SRMoE(stem, stages, num_classes)
