"""The spectral part of SR-MoE's loss, as terms; each choice that the paper leaves open is an option.

Delibasoglu, SR-MoE, arXiv 2601.03889: spectral norm and stable rank of each layer's "routing weights". The paper gives
no formulas, target or weights; the defaults are those of the reproduction card in papers/sr-moe.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

from torch import Tensor

from spectralmoe.errors import one_of
from spectralmoe.models.sr_moe import SRMoE, Stage
from spectralmoe.regularizers import spectral_norm, stable_rank
from spectralmoe.regularizers.spectral import Matrix, NormForm, RankForm
from spectralmoe.tape import Record
from spectralmoe.terms import Term

__all__ = ["sr_moe_terms"]

RoutingWeights = Literal["router", "gates", "processor", "both"]


def sr_moe_terms(
    network: SRMoE,
    *,
    norm: float = 0.1,
    rank: float = 0.1,
    matrix: RoutingWeights = "router",
    norm_form: NormForm = "hinge",
    rank_form: RankForm = "deficit",
    bound: float = 1.0,
    target: float | None = None,
) -> dict[str, Term]:
    r"""Make the terms :math:`\sum_l \lambda_s\,n(\sigma_1(M_l)) + \lambda_r\,r(M_l)` for ``penalty``.

    Args:
        network: the network; "processor" and "both" read its processors.
        norm, rank: :math:`\lambda_s` and :math:`\lambda_r`; a term with weight 0 is left out.
        matrix: which matrix M is: "router" (prototypes or gate weights), "gates" (the batch's gates), "processor" (the
            Linear in front of the router), or "both", router and processor.
        norm_form, bound, rank_form, target: see ``spectral_norm`` and ``stable_rank``.

    Raises:
        UserError: the matrix is unknown; or, when the terms are evaluated, a form is.

    >>> import torch
    >>> from spectralmoe import penalty, record
    >>> from spectralmoe.models import sr_moe
    >>> network = sr_moe(3, features=5)
    >>> terms = sr_moe_terms(network, matrix="both")
    >>> with record(network) as tape:
    ...     logits = network(torch.randn(6, 5))
    >>> extra, parts = penalty(tape, terms)
    >>> sorted(parts)
    ['processor_spectral_norm', 'processor_stable_rank', 'spectral_norm', 'stable_rank']
    """
    processor: Matrix = partial(_processor, {id(s.moe): s for s in network.stages if isinstance(s, Stage)})
    looks: dict[str, dict[str, Matrix]] = {
        "router": {"": "router"},
        "gates": {"": "gates"},
        "processor": {"": processor},
        "both": {"": "router", "processor_": processor},
    }
    if matrix not in looks:
        raise one_of("matrix of sr_moe_terms", matrix, looks)
    terms = {}
    for prefix, chosen in looks[matrix].items():
        if norm:
            fn = partial(spectral_norm, bound=bound, form=norm_form, matrix=chosen)
            terms[f"{prefix}spectral_norm"] = Term(fn, norm, reduce="sum")
        if rank:
            fn = partial(stable_rank, form=rank_form, target=target, matrix=chosen)
            terms[f"{prefix}stable_rank"] = Term(fn, rank, reduce="sum")
    return terms


def _processor(stages: dict[int, Stage], record: Record) -> Tensor:
    """The weight (D, D) of the Linear before this record's router."""
    return stages[id(record.layer)].processor.get_parameter("0.weight")
