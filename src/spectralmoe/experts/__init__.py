"""Banks of experts: each holds the E experts of a layer and runs them on rows sorted by expert, (M, *S) -> (M, *S).

Each file holds one kind. ``RankExperts`` can be imported from here, too; it is a layer with a router of its own and
stands in ``spectralmoe.ranks``.
"""

from typing import TYPE_CHECKING

from torch import nn

from spectralmoe.experts.adapter import Adapter
from spectralmoe.experts.answer import Answer
from spectralmoe.experts.base import Experts
from spectralmoe.experts.confident import ConfidentExperts
from spectralmoe.experts.conv import ConvExperts
from spectralmoe.experts.eigen import EigenExperts
from spectralmoe.experts.feed_forward import FeedForward
from spectralmoe.experts.frequency_mixer import FrequencyMixer
from spectralmoe.experts.heterogeneous import HeterogeneousExperts
from spectralmoe.experts.modulated import ModulatedExperts
from spectralmoe.experts.modules import ModuleExperts
from spectralmoe.experts.mpo import MPOExperts
from spectralmoe.experts.multilinear import MultilinearExperts
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
    "MPOExperts",
    "ModulatedExperts",
    "ModuleExperts",
    "MultilinearExperts",
    "PatchMixer",
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
    "heterogeneous": HeterogeneousExperts,
}

MODULES: dict[str, type[nn.Module]] = {"patch_mixer": PatchMixer, "frequency_mixer": FrequencyMixer}
"""Modules for the experts of ``ModuleExperts`` and ``HeterogeneousExperts``."""

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """What stands above the routers, which read banks themselves: imported when it is first asked for."""
        if name == "RankExperts":
            from importlib import import_module

            return import_module("spectralmoe.ranks").RankExperts
        raise AttributeError(f"module 'spectralmoe.experts' has no attribute {name!r}")
