"""``--log tensorboard``: scalars by epoch."""

from __future__ import annotations

import math
from pathlib import Path

from spectralmoe.training.logs.base import Epochs

__all__ = ["TensorBoardLog"]

FOLDER = "tensorboard"


class TensorBoardLog:
    """Writes events to ``tensorboard/``; a run that goes on purges its older events and writes all epochs again."""

    def __init__(self, folder: Path, title: str) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.events = SummaryWriter(str(folder / FOLDER), purge_step=0)
        self.written = 0

    def write(self, epochs: Epochs) -> None:
        """Each value under its name; epochs count from 1."""
        for number, values in enumerate(epochs[self.written :], self.written + 1):
            for name, value in values.items():
                if not math.isnan(value):
                    self.events.add_scalar(name, value, number)
        self.written = len(epochs)
        self.events.flush()

    def close(self) -> None:
        """Flush the events."""
        self.events.close()
