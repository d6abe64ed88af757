"""The base class of logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Epochs", "Log"]

Epochs = Sequence[Mapping[str, float]]
"""All epochs so far, the first one first: loss, validation accuracy (NaN without a validation part), seconds."""


class Log(Protocol):
    """A log of the epochs of one run; after a stop and a resume it holds every epoch exactly once."""

    def write(self, epochs: Epochs) -> None:
        """Bring the log up to date; ``epochs`` are all so far, those of an earlier process too."""

    def close(self) -> None:
        """Flush and close."""
