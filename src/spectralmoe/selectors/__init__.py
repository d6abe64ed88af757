"""Selectors: logits (N, E) -> indices and weights (N, K). One file a method."""

from spectralmoe.selectors.balanced import Balanced
from spectralmoe.selectors.base import Selector
from spectralmoe.selectors.capacity import Capacity
from spectralmoe.selectors.expert_choice import ExpertChoice
from spectralmoe.selectors.noisy_topk import NoisyTopK
from spectralmoe.selectors.soft_balanced import SoftBalanced
from spectralmoe.selectors.top_p import TopP
from spectralmoe.selectors.topk import TopK

__all__ = ["SELECTORS", "Balanced", "Capacity", "ExpertChoice", "NoisyTopK", "Selector", "SoftBalanced", "TopK", "TopP"]

SELECTORS: dict[str, type[Selector]] = {
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "expert_choice": ExpertChoice,
    "top_p": TopP,
    "balanced": Balanced,
    "soft_balanced": SoftBalanced,
    "capacity": Capacity,
}
