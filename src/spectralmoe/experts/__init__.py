"""Experts: rows sorted by expert (M, *S) -> (M, *S). One file a kind of bank."""

from torch import nn

from spectralmoe.experts.adapter import Adapter
from spectralmoe.experts.base import Answer, Experts
from spectralmoe.experts.confident import ConfidentExperts
from spectralmoe.experts.conv import ConvExperts
from spectralmoe.experts.eigen import EigenExperts
from spectralmoe.experts.feed_forward import FeedForward
from spectralmoe.experts.frequency_mixer import FrequencyMixer
from spectralmoe.experts.heterogeneous import HeterogeneousExperts
from spectralmoe.experts.modules import ModuleExperts
from spectralmoe.experts.patch_mixer import PatchMixer

__all__ = [
    "EXPERTS",
    "MODULES",
    "Adapter",
    "Answer",
    "ConfidentExperts",
    "ConvExperts",
    "EigenExperts",
    "Experts",
    "FeedForward",
    "FrequencyMixer",
    "HeterogeneousExperts",
    "ModuleExperts",
    "PatchMixer",
]

EXPERTS: dict[str, type[Experts]] = {
    "feed_forward": FeedForward,
    "adapter": Adapter,
    "eigen": EigenExperts,
    "modules": ModuleExperts,
    "conv": ConvExperts,
    "confident": ConfidentExperts,
    "heterogeneous": HeterogeneousExperts,
}

MODULES: dict[str, type[nn.Module]] = {"patch_mixer": PatchMixer, "frequency_mixer": FrequencyMixer}
"""Modules for the experts of ``ModuleExperts`` and ``HeterogeneousExperts``."""
