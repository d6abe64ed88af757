"""Whole networks: those of the papers, a language model, and networks for images, signals and several views."""

from torch import nn

from spectralmoe.models.language import DecoderBlock, LanguageMoE, language_moe
from spectralmoe.models.modulated import ModulatedBlock
from spectralmoe.models.multilinear_block import MultilinearBlock
from spectralmoe.models.restoration import RestorationBlock, RestorationMoE, restoration_moe
from spectralmoe.models.signal import SignalBlock, SignalExpert, SignalMoE, signal_experts, signal_moe
from spectralmoe.models.soft_routed import SoftRouted, overlaps, prune_units
from spectralmoe.models.sr_moe import ConvStem, SRMoE, Stage, VectorStem, prototype_router, sr_moe
from spectralmoe.models.sr_moe_loss import sr_moe_terms
from spectralmoe.models.views import SparseCrossImputer, ViewsBlock, ViewsMoE, views_moe

__all__ = [
    "MODELS",
    "ConvStem",
    "DecoderBlock",
    "LanguageMoE",
    "ModulatedBlock",
    "MultilinearBlock",
    "RestorationBlock",
    "RestorationMoE",
    "SRMoE",
    "SignalBlock",
    "SignalExpert",
    "SignalMoE",
    "SoftRouted",
    "SparseCrossImputer",
    "Stage",
    "VectorStem",
    "ViewsBlock",
    "ViewsMoE",
    "language_moe",
    "overlaps",
    "prototype_router",
    "prune_units",
    "restoration_moe",
    "signal_experts",
    "signal_moe",
    "sr_moe",
    "sr_moe_terms",
    "views_moe",
]

MODELS: dict[str, type[nn.Module]] = {
    "sr_moe": SRMoE,
    "sr_moe_stage": Stage,
    "conv_stem": ConvStem,
    "vector_stem": VectorStem,
    "language_moe": LanguageMoE,
    "decoder_block": DecoderBlock,
    "multilinear_block": MultilinearBlock,
    "modulated_block": ModulatedBlock,
    "signal_moe": SignalMoE,
    "signal_block": SignalBlock,
    "signal_expert": SignalExpert,
    "restoration_moe": RestorationMoE,
    "restoration_block": RestorationBlock,
    "views_moe": ViewsMoE,
    "views_block": ViewsBlock,
    "sparse_cross_imputer": SparseCrossImputer,
}
