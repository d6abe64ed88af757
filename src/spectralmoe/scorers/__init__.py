"""Scorers turn tokens (N, D) into logits (N, E). Each file holds one method."""

from spectralmoe.scorers.base import Scorer
from spectralmoe.scorers.basis import BasisScorer
from spectralmoe.scorers.context import ContextScorer
from spectralmoe.scorers.cosine import CosineScorer
from spectralmoe.scorers.eigenbasis import EigenbasisScorer
from spectralmoe.scorers.linear import LinearScorer
from spectralmoe.scorers.monte_carlo import MonteCarlo
from spectralmoe.scorers.principal import PrincipalScorer
from spectralmoe.scorers.prototype import PrototypeScorer
from spectralmoe.scorers.saturated import SaturatedScorer
from spectralmoe.scorers.spectrum import SpectrumScorer
from spectralmoe.scorers.statistics_memory import StatisticsMemory

__all__ = [
    "SCORERS",
    "BasisScorer",
    "ContextScorer",
    "CosineScorer",
    "EigenbasisScorer",
    "LinearScorer",
    "MonteCarlo",
    "PrincipalScorer",
    "PrototypeScorer",
    "SaturatedScorer",
    "Scorer",
    "SpectrumScorer",
    "StatisticsMemory",
]

SCORERS: dict[str, type[Scorer]] = {
    "linear": LinearScorer,
    "cosine": CosineScorer,
    "prototype": PrototypeScorer,
    "eigenbasis": EigenbasisScorer,
    "principal": PrincipalScorer,
    "context": ContextScorer,
    "basis": BasisScorer,
    "saturated": SaturatedScorer,
    "monte_carlo": MonteCarlo,
    "spectrum": SpectrumScorer,
}
