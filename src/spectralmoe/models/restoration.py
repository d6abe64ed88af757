"""A small network that restores images: an encoder, MoE layers on its coarse maps, and a decoder.

The form of networks for all-in-one restoration, such as Zamfir et al., "Complexity Experts are Task-Discriminative
Learners for Any Image Restoration" (MoCE-IR), arXiv 2411.18466, section 3, with one level.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.context import Context
from spectralmoe.errors import UserError
from spectralmoe.experts import ConvExperts, FeedForward
from spectralmoe.models.build import ExpertsFactory, RouterFactory, layers_of
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import Soft, TopK
from spectralmoe.units import Pixel, Token, Unit

__all__ = ["RestorationBlock", "RestorationMoE", "restoration_moe"]


class RestorationMoE(nn.Module):
    r"""A network that maps images (B, C, H, W) to restored ones, :math:`y = x + f(x)`, where f starts at 0.

    It treats each channel by itself: a convolution, one of stride ``scale`` to D channels, the blocks, a linear map
    back to all pixels, the sum with the output of the first convolution, and a last convolution. If ``scale`` does not
    divide the sides, they are padded inside. ``restoration_moe`` builds one.

    MoE layers can read two values as side information, one for each sample: "severity" (B, P), and "map" (B, 1, H, W),
    the degraded image.

    Args:
        blocks: the blocks, all of width D.
        stem: the number of channels in front of the coarse maps.
        scale: the side in pixels of a position of the coarse maps.
        severities: P.

    Raises:
        UserError: there is no block, the blocks differ in width, or a size is below 1. In forward: the images are not
            (B, C, H, W), or the severity has another shape.

    >>> import torch
    >>> model = restoration_moe(width=16, num_experts=4, hidden=8)
    >>> images = torch.rand(2, 3, 17, 20)
    >>> torch.equal(model(images), images)  # before it is trained
    True
    """

    def __init__(
        self, blocks: Sequence[RestorationBlock], *, stem: int = 16, scale: int = 2, severities: int = 4
    ) -> None:
        super().__init__()
        widths = sorted({block.dim for block in blocks})
        if len(widths) != 1:
            raise UserError(f"RestorationMoE: needs blocks of one width, got {widths or 'no block'}")
        if min(stem, scale, severities) < 1:
            raise UserError(
                f"RestorationMoE: stem, scale and severities must be at least 1, got {stem}, {scale}, {severities}"
            )
        self.stem, self.scale, self.severities, dim = stem, scale, severities, widths[0]
        self.first = nn.Conv2d(1, stem, 3, padding=1)
        self.down = nn.Conv2d(stem, dim, scale + 2, stride=scale, padding=1)
        self.blocks = nn.ModuleList(blocks)
        self.up = nn.Conv2d(dim, stem * scale**2, 1)
        self.last = nn.Conv2d(stem, 1, 3, padding=1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)  # type: ignore[arg-type]

    def forward(self, images: Tensor, severity: Tensor | None = None) -> Tensor:
        """Restore images (B, C, H, W).

        Args:
            severity: (B, P), how badly each image is degraded in each of P ways; None is 0, not at all.
        """
        if images.dim() != 4:
            raise UserError(f"RestorationMoE: takes images (B, C, H, W), got {[*images.shape]}")
        batch, channels, height, width = images.shape
        severity = images.new_zeros(batch, self.severities) if severity is None else severity
        if severity.shape != (batch, self.severities):
            raise UserError(f"RestorationMoE: severity is ({batch}, {self.severities}), got {[*severity.shape]}")
        planes = images.reshape(-1, 1, height, width)
        side = {"severity": severity.repeat_interleave(channels, 0), "map": planes}
        edges = (0, -width % self.scale, 0, -height % self.scale)
        fine = F.gelu(self.first(F.pad(planes, edges, mode="replicate")))
        coarse = self.down(fine)
        for block in self.blocks:
            coarse = block(coarse, side)
        fine = F.gelu(fine + F.pixel_shuffle(self.up(coarse), self.scale))
        change = self.last(fine)[..., :height, :width]
        restored: Tensor = images + change.reshape(images.shape)
        return restored


class RestorationBlock(nn.Module):
    r"""A block of a 3 x 3 convolution W and an MoE layer on maps x (B, D, H, W).

    .. math:: x \leftarrow x + \mathrm{gelu}(W * \mathrm{norm}(x)), \qquad x \leftarrow x +
        \mathrm{MoE}(\mathrm{norm}(x))

    The norm is a LayerNorm over the D numbers of each position.

    Args:
        moe: an MoE layer of any unit, or any module that maps (B, H, W, D) to (B, H, W, D).
        dim: D.
    """

    def __init__(self, moe: nn.Module, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.local_norm, self.local = nn.LayerNorm(dim), nn.Conv2d(dim, dim, 3, padding=1)
        self.moe_norm, self.moe = nn.LayerNorm(dim), moe

    def forward(self, x: Tensor, side: dict[str, Tensor] | None = None) -> Tensor:
        """Run the block on maps (B, D, H, W).

        Args:
            side: side information by name, one value for each sample (B, ...); the layer gets what it reads.
        """
        x = x + F.gelu(self.local(self.local_norm(x.movedim(1, -1)).movedim(-1, 1)))
        rows = self.moe_norm(x.movedim(1, -1))
        if not isinstance(self.moe, MoE):
            y: Tensor = self.moe(rows).movedim(-1, 1)
            return x + y
        samples = {name: value for name, value in (side or {}).items() if name in self.moe.reads}
        context = Context(samples=samples) if samples else None
        if isinstance(self.moe.unit, Token):
            y = self.moe(rows, context=context).movedim(-1, 1)
        else:
            y = self.moe(rows.movedim(-1, 1), context=context)
        return x + y


def restoration_moe(
    *,
    width: int = 32,
    depth: int = 1,
    num_experts: int = 4,
    hidden: int = 64,
    stem: int = 16,
    scale: int = 2,
    severities: int = 4,
    unit: Unit | None = None,
    router: RouterFactory | None = None,
    experts: ExpertsFactory | None = None,
) -> RestorationMoE:
    """Build a ``RestorationMoE`` of ``depth`` equal blocks.

    With the same seed, two models that differ only in their routers start with the same other weights, because the
    routers' draws leave torch's random generator as it was.

    Args:
        width, depth, num_experts, hidden: D, the number of blocks, E, H.
        stem, scale, severities: as in ``RestorationMoE``.
        unit: what the layers route; None is every position of the coarse maps (``Pixel``).
        router: a function (D, E) -> router; None makes a linear gate with one expert a unit.
        experts: a function (E, D, H) -> bank; None makes ``ConvExperts`` for whole samples, else ``FeedForward``.
    """
    unit = Pixel() if unit is None else unit
    make_bank = experts or (ConvExperts if unit.pooled else FeedForward)
    banks = [make_bank(num_experts, width, hidden) for _ in range(depth)]
    layers = layers_of(banks, router or _one_expert, width, num_experts, unit=unit)
    blocks = [RestorationBlock(layer, width) for layer in layers]
    return RestorationMoE(blocks, stem=stem, scale=scale, severities=severities)


def _one_expert(dim: int, num_experts: int) -> Router:
    return Router(LinearScorer(dim, num_experts), TopK(1) if num_experts > 1 else Soft())
