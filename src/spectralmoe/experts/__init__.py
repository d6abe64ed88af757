"""Experts: rows sorted by expert (M, D) -> (M, D). One file a kind of bank."""

from spectralmoe.experts.adapter import Adapter
from spectralmoe.experts.base import Experts
from spectralmoe.experts.eigen import EigenExperts
from spectralmoe.experts.feed_forward import FeedForward
from spectralmoe.experts.modules import ModuleExperts

__all__ = ["EXPERTS", "Adapter", "EigenExperts", "Experts", "FeedForward", "ModuleExperts"]

EXPERTS: dict[str, type[Experts]] = {
    "feed_forward": FeedForward,
    "adapter": Adapter,
    "eigen": EigenExperts,
    "modules": ModuleExperts,
}
