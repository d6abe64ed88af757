"""Optimizers of a whole model and schedules of the learning rate, by name. One file a method."""

from spectralmoe.optim.muon import Muon
from spectralmoe.optim.orthogonal_experts import OrthogonalExperts
from spectralmoe.optim.plain import adamw, sgd
from spectralmoe.optim.table import OPTIMIZERS, SCHEDULES, find_optimizer, find_schedule, make_optimizer
from spectralmoe.optim.together import Together

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "Muon",
    "OrthogonalExperts",
    "Together",
    "adamw",
    "find_optimizer",
    "find_schedule",
    "make_optimizer",
    "sgd",
]
