"""The base class of logs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

__all__ = ["Epochs", "Log"]

Epochs = Sequence[Mapping[str, float]]
"""All epochs so far, the first one first: loss, validation accuracy (NaN without a validation part), seconds."""


class Log(Protocol):
    """A place for the epochs of one run. A run that goes on after a stop leaves no epoch out and none twice."""

    def write(self, epochs: Epochs) -> None:
        """Bring the log up to date; ``epochs`` are all so far, those of an earlier process too."""

    def close(self) -> None:
        """Flush and let go."""
