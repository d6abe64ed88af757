"""The rows: routers by name, and what each of them may be tuned in."""

from __future__ import annotations

from typing import NamedTuple

from spectralmoe.presets import find_preset
from spectralmoe.rows import Preset

__all__ = ["BASELINES", "ROWS", "Setting", "preset_of", "tries"]

ROWS = ("dense", "linear", "linear+load_balance", "linear+balanced", "cosine", "sr-moe", "emoe")
"""Names of presets; ``dense`` is the twin of equal active width. A later method joins by its name."""

BASELINES = (
    ("linear", "dense"),
    ("linear+load_balance", "linear"),
    ("linear+balanced", "linear"),
    ("cosine", "linear"),
    ("sr-moe", "linear"),
    ("emoe", "linear"),
    ("sr-moe", "linear+balanced"),
    ("emoe", "linear+load_balance"),
)
"""Which rows are compared seed by seed, and with which: the linear gate, and what else could explain a gain."""


class Setting(NamedTuple):
    """What a row is tuned in.

    Attributes:
        lr: learning rate.
        strength: factor on the weights of its terms.
    """

    lr: float
    strength: float


def preset_of(row: str, strength: float = 1.0) -> Preset:
    """The preset of a row with its terms multiplied by ``strength``."""
    return find_preset(row).strengthened(strength)


def tries(row: str) -> list[Setting]:
    """Four for each row: three learning rates, then other weights of its terms, or one more rate where it has none."""
    rates = [Setting(lr, 1.0) for lr in (1.5e-3, 3e-3, 6e-3)]
    return [*rates, Setting(3e-3, 0.3) if preset_of(row).terms else Setting(1.2e-2, 1.0)]
