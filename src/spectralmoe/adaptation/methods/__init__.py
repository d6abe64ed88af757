"""Ways to correct samples by writing into chosen weights: correction -> steps taken, whether they succeeded or not."""

from collections.abc import Callable

from spectralmoe.adaptation.correction import Correction
from spectralmoe.adaptation.methods.descent import sgd
from spectralmoe.adaptation.methods.hidden_unit import unit
from spectralmoe.adaptation.methods.small_steps import low_rank, margin, null_space

__all__ = ["METHODS", "NEEDS_REFERENCE", "Method"]

Method = Callable[[Correction], int]

METHODS: dict[str, Method] = {
    "sgd": sgd,
    "margin": margin,
    "null_space": null_space,
    "low_rank": low_rank,
    "unit": unit,
}

NEEDS_REFERENCE = ("null_space", "low_rank", "unit")
"""Methods that read what the experts see of the guard's reference data."""
