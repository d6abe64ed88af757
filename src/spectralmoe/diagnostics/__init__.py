"""Diagnostics: functions that measure what a router does, given tapes, routers, loads and experts.

Each value says on how much data it rests (``Measure``). What each expert adds to a token is in
``spectralmoe.attribution``.
"""

from spectralmoe.diagnostics.association import association, label_table, specialisation
from spectralmoe.diagnostics.bound import empirical_rademacher, generalization_bound, natarajan_linear
from spectralmoe.diagnostics.certificate import attack_distance, routing_radius
from spectralmoe.diagnostics.change import Change, accuracy_change
from spectralmoe.diagnostics.entropy import mean_entropy, token_entropies, token_entropy
from spectralmoe.diagnostics.evaluation import Evaluation, evaluate, evaluation_mode, holds_moe
from spectralmoe.diagnostics.evidence import Evidence
from spectralmoe.diagnostics.geometry import (
    effective_rank,
    jacobian_norm,
    row_cosine,
    row_cosines,
    row_spread,
    sigma_1,
    spectrum,
    stable_rank,
)
from spectralmoe.diagnostics.load import (
    DEAD_SHARE,
    concentration,
    dead_experts,
    gini,
    load_imbalance,
    max_share,
    max_vio,
    min_share,
    per_sequence,
)
from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.paths import co_activation, joint_counts, mutual_information
from spectralmoe.diagnostics.similarity import (
    centred_cosines,
    cosine_matrix,
    duplicates,
    expert_outputs,
    linear_cka,
    mean_offdiagonal,
    subspace_overlap,
    weight_cosine,
)
from spectralmoe.diagnostics.stability import (
    changed_between,
    margins,
    near_ties,
    noise_flips,
    precision_flips,
    sound_flips,
)
from spectralmoe.diagnostics.statistics import LayerStatistics
from spectralmoe.diagnostics.table import VALUES, Value, measured
from spectralmoe.diagnostics.watch import Seen, Watch, Watched, watch

__all__ = [
    "DEAD_SHARE",
    "VALUES",
    "Change",
    "Evaluation",
    "Evidence",
    "LayerStatistics",
    "Measure",
    "Seen",
    "Value",
    "Watch",
    "Watched",
    "accuracy_change",
    "association",
    "attack_distance",
    "centred_cosines",
    "changed_between",
    "co_activation",
    "concentration",
    "cosine_matrix",
    "dead_experts",
    "duplicates",
    "effective_rank",
    "empirical_rademacher",
    "evaluate",
    "evaluation_mode",
    "expert_outputs",
    "generalization_bound",
    "gini",
    "holds_moe",
    "jacobian_norm",
    "joint_counts",
    "label_table",
    "linear_cka",
    "load_imbalance",
    "margins",
    "max_share",
    "max_vio",
    "mean_entropy",
    "mean_offdiagonal",
    "measured",
    "min_share",
    "mutual_information",
    "natarajan_linear",
    "near_ties",
    "noise_flips",
    "per_sequence",
    "precision_flips",
    "routing_radius",
    "row_cosine",
    "row_cosines",
    "row_spread",
    "sigma_1",
    "sound_flips",
    "specialisation",
    "spectrum",
    "stable_rank",
    "subspace_overlap",
    "token_entropies",
    "token_entropy",
    "watch",
    "weight_cosine",
]
