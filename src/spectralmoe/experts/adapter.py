"""Bottleneck adapters as experts.

Houlsby et al., "Parameter-Efficient Transfer Learning for NLP", arXiv 1902.00751; as experts behind an eigenbasis
router in EMoE, arXiv 2601.12137 (width 192 for ViT-B).
"""

from __future__ import annotations

from spectralmoe.experts.feed_forward import FeedForward

__all__ = ["Adapter"]


class Adapter(FeedForward):
    """Holds E bottleneck networks D -> H -> D with GELU and without bias, to be added to a frozen layer's output.

    Args:
        bottleneck: H.

    >>> import torch
    >>> Adapter(4, dim=16, bottleneck=4)(torch.randn(3, 16), torch.tensor([1, 0, 2, 0])).shape
    torch.Size([3, 16])
    """

    def __init__(self, num_experts: int, dim: int, bottleneck: int) -> None:
        super().__init__(num_experts, dim, bottleneck, activation="gelu")

    def spec_arguments(self) -> dict[str, object]:
        return {"bottleneck": self.width}
