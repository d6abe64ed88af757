"""Experts: rows sorted by expert (M, *S) -> (M, *S). One file a kind of bank."""

from spectralmoe.experts.adapter import Adapter
from spectralmoe.experts.base import Answer, Experts
from spectralmoe.experts.confident import ConfidentExperts
from spectralmoe.experts.conv import ConvExperts
from spectralmoe.experts.eigen import EigenExperts
from spectralmoe.experts.feed_forward import FeedForward
from spectralmoe.experts.modulated import ModulatedExperts
from spectralmoe.experts.modules import ModuleExperts
from spectralmoe.experts.mpo import MPOExperts
from spectralmoe.experts.multilinear import MultilinearExperts

__all__ = [
    "EXPERTS",
    "Adapter",
    "Answer",
    "ConfidentExperts",
    "ConvExperts",
    "EigenExperts",
    "Experts",
    "FeedForward",
    "MPOExperts",
    "ModulatedExperts",
    "ModuleExperts",
    "MultilinearExperts",
]

EXPERTS: dict[str, type[Experts]] = {
    "feed_forward": FeedForward,
    "adapter": Adapter,
    "eigen": EigenExperts,
    "modules": ModuleExperts,
    "conv": ConvExperts,
    "confident": ConfidentExperts,
    "multilinear": MultilinearExperts,
    "mpo": MPOExperts,
    "modulated": ModulatedExperts,
}
