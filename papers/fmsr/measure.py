"""What the card measures beside the scores: what a gate reads tells of the damage, and what the experts make of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.data.degradations import DEGRADATIONS, KINDS, Pairs
from spectralmoe.experiments.cards import Trained, experts_of_kinds, told_by_experts
from spectralmoe.layers import moe_layers
from spectralmoe.recorder import record
from spectralmoe.scorers import SpectrumScorer
from spectralmoe.training.tasks import RestorationTask

__all__ = ["measure", "probe", "reads"]

_FITTED = 1_000
_SINGLE = torch.tensor([KINDS.index(kind) for kind in DEGRADATIONS])


def measure(trained: Trained) -> dict[str, Any]:
    """How much the expert tells about the damage, and how often a linear probe finds it in what the gate reads."""
    task = trained.task
    assert isinstance(task, RestorationTask)
    table = experts_of_kinds(trained.network, task)[_SINGLE]
    parts = [_single(pairs) for pairs in (task.parts["train"], task.parts["test"])]
    features = [reads(trained, pairs) for pairs in parts]
    right = probe(features[0], parts[0].kinds, features[1]) == parts[1].kinds
    told = {f"probe_{kind}": float(right[parts[1].kinds == KINDS.index(kind)].double().mean()) for kind in DEGRADATIONS}
    return {"told": told_by_experts(table), "probe": sum(told.values()) / len(told), **told}


def reads(trained: Trained, pairs: Pairs) -> Tensor:
    """What the network's gate reads of each image (N, F) float64: pooled features, features of its own, or both."""
    task = trained.task
    assert isinstance(task, RestorationTask)
    ((name, layer),) = moe_layers(trained.network).items()
    with torch.no_grad(), record(trained.network, keep="tokens") as tape:
        task.restored(trained.network, pairs)
    pooled = torch.cat([item.tensor("tokens") for item in tape.layer(name)]).double()
    scorer = layer.router.scorer
    if not isinstance(scorer, SpectrumScorer):
        return pooled
    own = scorer.features(pairs.images).double()
    return torch.cat([own, pooled], 1) if scorer.token else own


def probe(train: Tensor, kinds: Tensor, test: Tensor, ridge: float = 1e-3) -> Tensor:
    """The kind that ridge regression on standardised features (N, F) gives each row of ``test``: (M,) int64."""
    centre, spread = train.mean(0), train.std(0).clamp_min(1e-9)
    seen, asked = (F.pad((part - centre) / spread, (0, 1), value=1.0) for part in (train, test))
    gram = seen.T @ seen + ridge * len(seen) * torch.eye(seen.shape[1]).to(seen)
    weights = torch.linalg.solve(gram, seen.T @ F.one_hot(kinds, len(KINDS)).to(seen))
    return (asked @ weights).argmax(1)


def _single(pairs: Pairs) -> Pairs:
    """At most a thousand of the pairs with one kind of damage."""
    return pairs[torch.isin(pairs.kinds, _SINGLE).nonzero().flatten()[:_FITTED]]
