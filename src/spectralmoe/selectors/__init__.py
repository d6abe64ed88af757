"""Selectors turn logits (N, E) into the experts of each token and their weights (N, K). Each file holds one method."""

from spectralmoe.selectors.around import Around
from spectralmoe.selectors.balanced import Balanced
from spectralmoe.selectors.base import Selector
from spectralmoe.selectors.capacity import Capacity
from spectralmoe.selectors.cluster_dropout import ClusterDropout
from spectralmoe.selectors.entmax import Entmax
from spectralmoe.selectors.expert_choice import ExpertChoice
from spectralmoe.selectors.group_limited import GroupLimited
from spectralmoe.selectors.noisy_topk import NoisyTopK
from spectralmoe.selectors.soft import Soft
from spectralmoe.selectors.soft_balanced import SoftBalanced
from spectralmoe.selectors.threshold import Threshold
from spectralmoe.selectors.top_p import TopP
from spectralmoe.selectors.topk import TopK
from spectralmoe.selectors.unweighted import Unweighted

__all__ = [
    "SELECTORS",
    "Around",
    "Balanced",
    "Capacity",
    "ClusterDropout",
    "Entmax",
    "ExpertChoice",
    "GroupLimited",
    "NoisyTopK",
    "Selector",
    "Soft",
    "SoftBalanced",
    "Threshold",
    "TopK",
    "TopP",
    "Unweighted",
]

SELECTORS: dict[str, type[Selector]] = {
    "topk": TopK,
    "noisy_topk": NoisyTopK,
    "expert_choice": ExpertChoice,
    "topp": TopP,
    "balanced": Balanced,
    "soft": Soft,
    "soft_balanced": SoftBalanced,
    "capacity": Capacity,
    "cluster_dropout": ClusterDropout,
    "group_limited": GroupLimited,
    "threshold": Threshold,
    "entmax": Entmax,
    "unweighted": Unweighted,
}
