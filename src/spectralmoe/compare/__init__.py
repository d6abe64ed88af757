"""The main job: several routers under one budget, trained, adapted to single samples, shown side by side."""

from spectralmoe.compare.grid import run
from spectralmoe.compare.settings import CompareSettings

__all__ = ["CompareSettings", "run"]
