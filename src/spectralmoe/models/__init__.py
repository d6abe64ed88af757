"""Whole networks of the papers."""

from torch import nn

from spectralmoe.models.sr_moe import ConvStem, SRMoE, Stage, VectorStem, prototype_router, sr_moe
from spectralmoe.models.sr_moe_loss import sr_moe_terms

__all__ = ["MODELS", "ConvStem", "SRMoE", "Stage", "VectorStem", "prototype_router", "sr_moe", "sr_moe_terms"]

MODELS: dict[str, type[nn.Module]] = {
    "sr_moe": SRMoE,
    "sr_moe_stage": Stage,
    "conv_stem": ConvStem,
    "vector_stem": VectorStem,
}
