"""Compression: functions that return a copy of a model with fewer, merged, replicated or quantised experts."""

from spectralmoe.compression.merge import group_by_affinity, merge
from spectralmoe.compression.prune import prune
from spectralmoe.compression.quantize import fake_quantize, stored_bytes
from spectralmoe.compression.replicate import replicas_by_load, replicate
from spectralmoe.compression.replicate_quantize import replicate_and_quantize
from spectralmoe.compression.saliency import SALIENCIES, frequency, random, reap, removal, wanda
from spectralmoe.compression.scheme import LayerReport, Report

__all__ = [
    "SALIENCIES",
    "LayerReport",
    "Report",
    "fake_quantize",
    "frequency",
    "group_by_affinity",
    "merge",
    "prune",
    "random",
    "reap",
    "removal",
    "replicas_by_load",
    "replicate",
    "replicate_and_quantize",
    "stored_bytes",
    "wanda",
]
