"""``--log csv``: a table with one line an epoch."""

from __future__ import annotations

import csv
import io
import math
from pathlib import Path

from spectralmoe.files import write_text
from spectralmoe.training.logs.base import Epochs

__all__ = ["CsvLog"]

FILE = "log.csv"


class CsvLog:
    """Writes ``log.csv`` anew after every epoch, whole or not at all."""

    def __init__(self, folder: Path, title: str) -> None:
        self.path = folder / FILE

    def write(self, epochs: Epochs) -> None:
        """Write all epochs; an undefined number becomes an empty field."""
        text = io.StringIO()
        table = csv.writer(text, lineterminator="\n")
        table.writerow(["epoch", *(epochs[0] if epochs else ())])
        for number, values in enumerate(epochs, 1):
            table.writerow([number, *("" if math.isnan(value) else value for value in values.values())])
        write_text(self.path, text.getvalue())

    def close(self) -> None:
        """Do nothing: no file is kept open."""
