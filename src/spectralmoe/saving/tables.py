"""The classes that a saved folder may be built of, by name."""

from __future__ import annotations

from spectralmoe.models import MODELS
from spectralmoe.spec import PARTS
from spectralmoe.vision.branches import Branch
from spectralmoe.vision.model import VisionMoE
from spectralmoe.vision.replace_mlp import MlpCopies

__all__ = ["TABLES"]

TABLES: dict[str, type] = {
    **PARTS,
    **MODELS,
    "vision_moe": VisionMoE,
    "branch": Branch,
    "mlp_copies": MlpCopies,
}
