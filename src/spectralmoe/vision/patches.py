"""Which expert takes which patch of an image, from the record of a layer."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.tape import Record

__all__ = ["patch_experts"]


def patch_experts(record: Record, grid: Sequence[int] | None = None) -> Tensor:
    """The expert with the largest weight of each patch: (B, h, w) int64, -1 where a patch has no expert.

    Class, distillation and register tokens stand in front of the patches and are left out.

    Args:
        record: of a layer in a vision model, from ``record(model)``.
        grid: (h, w), the patches that the model cuts an image into, in rows from the top left (not so in Hiera); timm:
            ``model.patch_embed.grid_size``. None: the layer reads maps (B, h, w), as in Swin and ConvNeXt.

    Raises:
        UserError: the layer reads sequences and there is no grid; a grid that does not fit.

    >>> import torch
    >>> from spectralmoe import Adapter, LinearScorer, MoE, Router, TopK, record
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(1)), Adapter(4, 8, 2))
    >>> with record(layer) as tape:
    ...     y = layer(torch.randn(3, 1 + 6, 8))  # a class token, and 2 x 3 patches
    >>> tuple(patch_experts(tape[0], (2, 3)).shape)
    (3, 2, 3)
    """
    shape, experts = record.routing.shape or (), record.routing.top_expert()
    if grid is None:
        if len(shape) != 3:
            raise UserError(
                f"layer {record.name!r} reads tokens of shape {tuple(shape)}, not maps (B, h, w); say grid=(h, w), in "
                "timm model.patch_embed.grid_size"
            )
        return experts.view(shape)
    patches = prod(grid)
    if len(grid) != 2 or len(shape) != 2 or not 0 < patches <= shape[1]:
        raise UserError(f"grid={tuple(grid)} does not fit layer {record.name!r}, whose tokens are {tuple(shape)}")
    return experts.view(shape)[:, -patches:].reshape(shape[0], *grid)
