"""The settings of a run, a file for each section; read from TOML and written as it."""

from spectralmoe.training.settings.base import (
    Network,
    Optimization,
    Positive,
    Row,
    Seed,
    Settings,
    Several,
    laid_over,
    parse,
    pick_device,
)

__all__ = [
    "Network",
    "Optimization",
    "Positive",
    "Row",
    "Seed",
    "Settings",
    "Several",
    "laid_over",
    "parse",
    "pick_device",
]
