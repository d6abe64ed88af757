"""Optimizers of a whole model, wrappers that change their steps, and schedules of the learning rate."""

from spectralmoe.optim.gradient_mask import mask_central, mask_gradient
from spectralmoe.optim.muon import Muon
from spectralmoe.optim.orthogonal_experts import OrthogonalExperts
from spectralmoe.optim.plain import adamw, sgd
from spectralmoe.optim.sphere import SphereStep
from spectralmoe.optim.table import (
    OPTIMIZERS,
    SCHEDULES,
    WRAPPERS,
    find_optimizer,
    find_schedule,
    make_optimizer,
)
from spectralmoe.optim.together import Together

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "WRAPPERS",
    "Muon",
    "OrthogonalExperts",
    "SphereStep",
    "Together",
    "adamw",
    "find_optimizer",
    "find_schedule",
    "make_optimizer",
    "mask_central",
    "mask_gradient",
    "sgd",
]
