"""A deep MoE network for images or feature vectors: a stem, MoE stages and a head.

Delibasoglu, "Spectral Manifold Regularization for Stable and Modular Routing in Deep MoE Architectures" (SR-MoE),
arXiv 2601.03889: convolutional stem, then stages of a local processor (Linear, ReLU, LayerNorm) and an MoE layer with
prototype routing, and a two-part spectral penalty on the routing. No public code. The paper leaves open what follows;
here each is an option: the residual path around each stage (without it accuracy falls with depth), the centring of the
tokens behind the LayerNorm (without it accuracy falls, and corrections of one expert cost more), soft or sparse
routing, which matrix the penalty reads, and its form. Ours and fixed are the LayerNorm before the head, the sizes of
the stem, and the experts (Linear, ReLU, Linear). The terms are those of ``spectralmoe.regularizers``.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from spectralmoe.errors import UserError
from spectralmoe.experts import FeedForward
from spectralmoe.models.build import ExpertsFactory, RouterFactory, layers_of
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import PrototypeScorer
from spectralmoe.selectors import Balanced, Soft

__all__ = ["ConvStem", "SRMoE", "Stage", "VectorStem", "prototype_router", "sr_moe"]


class ConvStem(nn.Module):
    """Maps images (B, C, H, W) with values in [0, 1] to features (B, D), by two convolutions, pooling, a linear layer.

    Args:
        channels: C.
        width: D.
        mean, std: the mean and standard deviation of the training images' pixels, one value a channel.
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
        ).to(memory_format=torch.channels_last)  # a third less time for the stem on a CPU
        self.project = nn.Linear(32 * self.GRID**2, width)

    def forward(self, images: Tensor) -> Tensor:
        rows = torch.tensor([self.mean, self.std], dtype=images.dtype).to(images.device, non_blocking=True)
        mean, std = rows.view(2, -1, 1, 1)
        grid = self.convolutions((images - mean) / std)
        # There and back: so the gradient comes in channels-last too, which the convolutions' backward wants.
        there = grid.permute(0, 2, 3, 1).flatten(1)
        back = there.unflatten(1, (*grid.shape[2:], grid.shape[1])).permute(0, 3, 1, 2).flatten(1)
        features: Tensor = self.project(back)
        return features


class VectorStem(nn.Module):
    """Maps feature vectors (B, F) to features (B, D), by a linear layer.

    Args:
        features: F.
        width: D.
    """

    def __init__(self, features: int, width: int) -> None:
        super().__init__()
        self.features, self.width = features, width
        self.project = nn.Linear(features, width)

    def forward(self, vectors: Tensor) -> Tensor:
        features: Tensor = self.project(vectors)
        return features


class Stage(nn.Module):
    r"""A stage of a local processor and an MoE layer on features z (B, D).

    .. math:: z' = \mathrm{LN}(\mathrm{ReLU}(A z + a)), \qquad z \leftarrow z + \mathrm{MoE}(z')

    Args:
        moe: the MoE layer, of width D.
        residual: whether z is added; without it the stage returns MoE(z'), which is another reading of the paper.
        centred: whether z' goes through a BatchNorm without weights, so that tokens are spread around zero and not
            around the common direction that a ReLU leaves.
    """

    def __init__(self, moe: MoE, *, residual: bool = True, centred: bool = False) -> None:
        super().__init__()
        dim = moe.router.scorer.dim
        self.residual, self.centred = residual, centred
        self.processor = nn.Sequential(nn.Linear(dim, dim), nn.ReLU(), nn.LayerNorm(dim))
        if centred:
            self.processor.append(nn.BatchNorm1d(dim, affine=False))
        self.moe = moe

    def forward(self, z: Tensor) -> Tensor:
        y: Tensor = self.moe(self.processor(z))
        return z + y if self.residual else y


class SRMoE(nn.Module):
    """A classifier that maps images (B, C, H, W) or vectors (B, F) to logits (B, num_classes). ``sr_moe`` builds one.

    It is made of a stem, MoE stages, a LayerNorm and a linear head.

    Args:
        stem: maps inputs to features (B, D).
        stages: the MoE stages, all of width D.
        num_classes: the number of logits.

    Raises:
        UserError: there is no stage, or a stage and the stem differ in width.
    """

    def __init__(self, stem: ConvStem | VectorStem, stages: Sequence[Stage], num_classes: int) -> None:
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

    def forward(self, inputs: Tensor) -> Tensor:
        return self.classify(self.stem(inputs))

    def classify(self, features: Tensor, first: int = 0) -> Tensor:
        """Return logits, given the input (B, D) of stage ``first``."""
        for stage in self.stages[first:]:
            features = stage(features)
        logits: Tensor = self.head(self.norm(features))
        return logits

    def split(self, layer: str) -> tuple[nn.Module, nn.Module]:
        """Split the network in front of the stage that holds ``layer``: (head, tail) with ``tail(head(x)) == self(x)``.

        Both use this network's modules; layers keep their names in the tail.

        Raises:
            UserError: there is no such layer.
        """
        first = next((i for i in range(len(self.stages)) if layer == f"stages.{i}.moe"), None)
        if first is None:
            raise UserError(f"SRMoE: there is no layer {layer!r}; known: stages.0.moe to stages.N.moe")
        return nn.Sequential(self.stem, *self.stages[:first]), _Tail(self, first)


class _Tail(nn.Module):
    """A network from stage ``first`` on."""

    def __init__(self, network: SRMoE, first: int) -> None:
        super().__init__()
        self.stages = nn.ModuleDict({str(i): stage for i, stage in enumerate(network.stages) if i >= first})
        self.norm, self.head = network.norm, network.head

    def forward(self, features: Tensor) -> Tensor:
        for stage in self.stages.values():
            features = stage(features)
        logits: Tensor = self.head(self.norm(features))
        return logits


def prototype_router(dim: int, num_experts: int) -> Router:
    """Make a prototype gate with two experts a token and a loss-free selection bias; with E < 3 all experts are used.

    The reproduction card in papers/sr-moe supports this routing.
    """
    scorer = PrototypeScorer(dim, num_experts, temperature=1.0, scale=dim**-0.5)
    if num_experts < 3:
        return Router(scorer, Soft())
    return Router(scorer, Balanced(2, score="softmax", normalize=False, rate=1e-2))


def sr_moe(
    num_classes: int,
    *,
    channels: int = 1,
    features: int | None = None,
    width: int = 64,
    depth: int = 2,
    num_experts: int = 8,
    hidden: int = 32,
    spare: int = 0,
    router: RouterFactory = prototype_router,
    experts: ExpertsFactory | None = None,
    residual: bool = True,
    centred: bool = True,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
) -> SRMoE:
    """Build an ``SRMoE`` network of ``depth`` equal stages.

    With the same seed, two networks that differ only in their routers start with the same stem, experts and head. The
    experts' last layers start small, so that the variance of the residual stream stays bounded at any depth.

    Args:
        num_classes: the number of logits.
        channels: the number of channels C of images (B, C, H, W).
        features: F, for feature vectors (B, F) instead of images.
        width, depth, num_experts, hidden: D, the number of stages, E, H.
        spare: how many hidden units of each expert start at zero, for later corrections (``FeedForward``).
        router: a function (D, E) -> router; the default is ``prototype_router``.
        experts: a function (E, D, H) -> bank; None makes ReLU networks with biases and ``spare`` units.
        residual, centred: see ``Stage``.
        mean, std: the mean and standard deviation of the training images' pixels, one value a channel; None is 0.5 and
            0.25.

    >>> sr_moe(10, depth=2)(torch.rand(3, 1, 28, 28)).shape
    torch.Size([3, 10])
    >>> sr_moe(4, features=12)(torch.rand(3, 12)).shape
    torch.Size([3, 4])
    """
    stem: ConvStem | VectorStem
    if features is None:
        stem = ConvStem(channels, width, mean or [0.5] * channels, std or [0.25] * channels)
    else:
        stem = VectorStem(features, width)
    make_bank = experts or partial(FeedForward, activation="relu", bias=True, spare=spare)
    banks = [make_bank(num_experts, width, hidden) for _ in range(depth)]
    for bank in banks:
        if isinstance(bank, FeedForward):
            _start_small(bank, depth)
    layers = layers_of(banks, router, width, num_experts)
    stages = [Stage(layer, residual=residual, centred=centred) for layer in layers]
    return SRMoE(stem, stages, num_classes)


@torch.no_grad()
def _start_small(bank: FeedForward, depth: int) -> None:
    down = bank.down[..., : bank.width]
    down.copy_(down.new_empty(down.shape).normal_(0, (bank.width * depth) ** -0.5))  # the same draws with spare units
    if bank.down_bias is not None:
        bank.down_bias.zero_()
