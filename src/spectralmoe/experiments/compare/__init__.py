"""A comparison: several routers under one budget, trained, adapted to single samples, shown side by side."""

from spectralmoe.experiments.compare.grid import run, take
from spectralmoe.experiments.compare.settings import CompareSettings

__all__ = ["CompareSettings", "run", "take"]
