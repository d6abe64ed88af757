"""What all cells of one comparison share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from spectralmoe.compare.settings import CompareSettings
from spectralmoe.training.data import ImageData

__all__ = ["Setup"]


@dataclass(frozen=True, slots=True)
class Setup:
    """Settings, data, the folder for everything that is written, and the device."""

    settings: CompareSettings
    data: ImageData
    out: Path
    device: torch.device
