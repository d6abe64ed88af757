"""``--log wandb``: a run of Weights & Biases."""

from __future__ import annotations

import math
import uuid
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError, first_line
from spectralmoe.files import write_text
from spectralmoe.training.logs.base import Epochs

__all__ = ["WandbLog"]

ID = "wandb-id.txt"


class WandbLog:
    """Logs to the project "spectralmoe", offline where ``WANDB_MODE`` says so; the run's id stays in ``wandb-id.txt``.

    Raises:
        UserError: wandb refuses the run (no account, no network).
    """

    def __init__(self, folder: Path, title: str) -> None:
        import wandb

        if not (folder / ID).exists():
            write_text(folder / ID, uuid.uuid4().hex[:12])
        name = (folder / ID).read_text(encoding="utf-8").strip()
        try:
            self.run: Any = wandb.init(project="spectralmoe", name=title, id=name, resume="allow", dir=str(folder))
        except Exception as error:  # wandb's own kinds
            raise UserError(f"--log wandb: {first_line(error)}") from error
        self.written = max(int(self.run.step) - 1, 0)  # of an earlier process

    def write(self, epochs: Epochs) -> None:
        """Log each epoch as a step."""
        for number, values in enumerate(epochs[self.written :], self.written + 1):
            self.run.log({name: value for name, value in values.items() if not math.isnan(value)}, step=number)
        self.written = max(self.written, len(epochs))

    def close(self) -> None:
        """Wait until everything is sent."""
        self.run.finish()
