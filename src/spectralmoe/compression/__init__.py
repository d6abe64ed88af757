"""Compression: models with fewer experts, merged ones or replicas; pure functions, one file a method."""

from spectralmoe.compression.merge import group_by_affinity, merge
from spectralmoe.compression.prune import prune
from spectralmoe.compression.replicate import replicas_by_load, replicate
from spectralmoe.compression.saliency import SALIENCIES, frequency, random, reap, removal

__all__ = [
    "SALIENCIES",
    "frequency",
    "group_by_affinity",
    "merge",
    "prune",
    "random",
    "reap",
    "removal",
    "replicas_by_load",
    "replicate",
]
