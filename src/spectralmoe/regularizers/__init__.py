"""Regularizers are losses on what a layer's router or experts did in one forward.

Each takes a ``Record``, one entry of a tape, and returns a scalar in fp32, unweighted, a mean over the real tokens.
Those marked ``of_model`` take the records of all layers. ``Term`` gives a regularizer its weight in the training loss.
"""

from collections.abc import Callable

from torch import Tensor

from spectralmoe.regularizers.activation_overlap import activation_overlap
from spectralmoe.regularizers.balance import importance_cv2, load_balance, router_z
from spectralmoe.regularizers.cluster_variance import cluster_variance
from spectralmoe.regularizers.complexity_balance import complexity_balance
from spectralmoe.regularizers.confidence import class_target, confidence_loss
from spectralmoe.regularizers.expected_cost import expected_cost
from spectralmoe.regularizers.orthonormality import orthonormality
from spectralmoe.regularizers.output_overlap import output_overlap
from spectralmoe.regularizers.path_coupling import path_coupling
from spectralmoe.regularizers.score_variance import score_variance
from spectralmoe.regularizers.severity import severity_balance
from spectralmoe.regularizers.spectral import spectral_norm, spectral_penalty, stable_rank

__all__ = [
    "REGULARIZERS",
    "activation_overlap",
    "class_target",
    "cluster_variance",
    "complexity_balance",
    "confidence_loss",
    "expected_cost",
    "importance_cv2",
    "load_balance",
    "orthonormality",
    "output_overlap",
    "path_coupling",
    "router_z",
    "score_variance",
    "severity_balance",
    "spectral_norm",
    "spectral_penalty",
    "stable_rank",
]

REGULARIZERS: dict[str, Callable[..., Tensor]] = {
    "spectral_norm": spectral_norm,
    "spectral_penalty": spectral_penalty,
    "stable_rank": stable_rank,
    "orthonormality": orthonormality,
    "load_balance": load_balance,
    "router_z": router_z,
    "importance_cv2": importance_cv2,
    "output_overlap": output_overlap,
    "score_variance": score_variance,
    "activation_overlap": activation_overlap,
    "path_coupling": path_coupling,
    "cluster_variance": cluster_variance,
    "severity_balance": severity_balance,
    "complexity_balance": complexity_balance,
    "expected_cost": expected_cost,
}
