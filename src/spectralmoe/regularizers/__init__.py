"""Regularizers: record -> scalar, unweighted, fp32, mean over real tokens. Weigh them with ``Term``."""

from collections.abc import Callable

from torch import Tensor

from spectralmoe.regularizers.balance import importance_cv2, load_balance, router_z
from spectralmoe.regularizers.cluster_variance import cluster_variance
from spectralmoe.regularizers.orthonormality import orthonormality
from spectralmoe.regularizers.output_overlap import output_overlap
from spectralmoe.regularizers.spectral import spectral_norm, spectral_penalty, stable_rank

__all__ = [
    "REGULARIZERS",
    "cluster_variance",
    "importance_cv2",
    "load_balance",
    "orthonormality",
    "output_overlap",
    "router_z",
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
    "cluster_variance": cluster_variance,
}
