"""Diagnostics: what a router does, as pure functions of tapes, routers and loads."""

from spectralmoe.diagnostics.certificate import attack_distance, routing_radius
from spectralmoe.diagnostics.change import Change, accuracy_change
from spectralmoe.diagnostics.evaluation import Evaluation, evaluate, evaluation_mode, holds_moe
from spectralmoe.diagnostics.load import DEAD_SHARE, dead_experts, gini, max_vio, min_share

__all__ = [
    "DEAD_SHARE",
    "Change",
    "Evaluation",
    "accuracy_change",
    "attack_distance",
    "dead_experts",
    "evaluate",
    "evaluation_mode",
    "gini",
    "holds_moe",
    "max_vio",
    "min_share",
    "routing_radius",
]
