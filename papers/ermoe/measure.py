"""What the card measures beside the common columns: who is eligible, how near bases are, what noise changes."""

from __future__ import annotations

import math
import statistics
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe import MoE, Record, record
from spectralmoe.diagnostics.evaluation import run_over
from spectralmoe.experiments.cards import Trained
from spectralmoe.experts import EigenExperts
from spectralmoe.linalg import orthonormality_error, qr_retraction
from spectralmoe.selectors import Threshold

__all__ = ["about_bases", "basis_overlap", "eligible", "flips"]

IMAGES = 256
NOISE = 0.05


@torch.no_grad()
def about_bases(trained: Trained) -> dict[str, Any]:
    """Means over layers, on test images; a measure that a row does not have is left out."""
    inputs = trained.task.inputs("test")
    with record(trained.network, keep=("tokens",)) as tape:
        run_over(trained.network, inputs[torch.linspace(0, len(inputs) - 1, min(IMAGES, len(inputs))).long()])
    found: dict[str, list[float]] = {}
    for item in tape:
        layer = item.layer
        assert isinstance(layer, MoE)
        values = {"flips": flips(item), "experts_used": used(item)}
        if isinstance(layer.router.selector, Threshold):
            values["eligible"] = eligible(item)
        if isinstance(layer.experts, EigenExperts):
            right = layer.experts.right
            values["basis_overlap"] = basis_overlap(right)
            values["off_manifold"] = float(orthonormality_error(right).max())
        for name, value in values.items():
            found.setdefault(name, []).append(value)
    return {name: statistics.fmean(values) for name, values in found.items()}


def eligible(item: Record) -> float:
    """Share of all pairs of a token and an expert that reach the threshold."""
    selector = item.layer.router.selector
    values = item.routing.logits if selector.score == "logit" else item.routing.scores
    return float((values >= selector.threshold).double().mean())


def used(item: Record) -> float:
    """Experts a token, empty slots not counted."""
    return float((item.routing.indices >= 0).sum(-1).double().mean())


def basis_overlap(bases: Tensor) -> float:
    r"""Mean over pairs of experts of :math:`\|V_i^\top V_j\|_F^2 / R` for bases (E, D, R): R/D of random ones."""
    exact = qr_retraction(bases.double())
    experts, _, rank = exact.shape
    square = (exact.mT[:, None] @ exact).square().sum((-2, -1)) / rank
    return float(square.sum() - square.diagonal().sum()) / (experts * (experts - 1))


def flips(item: Record) -> float:
    """Share of tokens whose experts change under noise of 5% of their norm; what the attention gave stays."""
    tokens, router = item.tensor("tokens"), item.layer.router
    noise = F.normalize(torch.randn(tokens.shape, generator=torch.Generator().manual_seed(0)), dim=-1)
    moved = tokens + NOISE * tokens.norm(dim=-1, keepdim=True) * noise
    before, after = (router(x, context=item.context).members() for x in (tokens, moved))
    share = float((before != after).any(-1).double().mean())
    return share if math.isfinite(share) else 0.0
