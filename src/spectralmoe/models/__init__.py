"""Whole networks: those of the papers, a small language model, and a classifier of signals."""

from torch import nn

from spectralmoe.models.language import DecoderBlock, LanguageMoE, language_moe
from spectralmoe.models.restoration import RestorationBlock, RestorationMoE, restoration_moe
from spectralmoe.models.signal import SignalBlock, SignalExpert, SignalMoE, signal_experts, signal_moe
from spectralmoe.models.sr_moe import ConvStem, SRMoE, Stage, VectorStem, prototype_router, sr_moe
from spectralmoe.models.sr_moe_loss import sr_moe_terms

__all__ = [
    "MODELS",
    "ConvStem",
    "DecoderBlock",
    "LanguageMoE",
    "RestorationBlock",
    "RestorationMoE",
    "SRMoE",
    "SignalBlock",
    "SignalExpert",
    "SignalMoE",
    "Stage",
    "VectorStem",
    "language_moe",
    "prototype_router",
    "restoration_moe",
    "signal_experts",
    "signal_moe",
    "sr_moe",
    "sr_moe_terms",
]

MODELS: dict[str, type[nn.Module]] = {
    "sr_moe": SRMoE,
    "sr_moe_stage": Stage,
    "conv_stem": ConvStem,
    "vector_stem": VectorStem,
    "language_moe": LanguageMoE,
    "decoder_block": DecoderBlock,
    "signal_moe": SignalMoE,
    "signal_block": SignalBlock,
    "signal_expert": SignalExpert,
    "restoration_moe": RestorationMoE,
    "restoration_block": RestorationBlock,
}
