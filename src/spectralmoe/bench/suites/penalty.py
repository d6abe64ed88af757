"""Suite ``penalty``: what spectral terms add to a training step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.gate import difference
from spectralmoe.bench.settings import Settings
from spectralmoe.models.sr_moe import sr_moe
from spectralmoe.recorder import record
from spectralmoe.regularizers.spectral import spectral_norm, spectral_penalty, stable_rank
from spectralmoe.router import Router
from spectralmoe.scorers import PrototypeScorer
from spectralmoe.selectors import TopK
from spectralmoe.steps import after_step, param_groups
from spectralmoe.tape import Record
from spectralmoe.terms import Term, penalty

__all__ = ["ALL", "FULL", "PLAIN", "cases", "count", "name"]

FULL = {"depth": 12, "width": 768, "num_experts": 64, "hidden": 256, "batch": 2048}
QUICK = {"depth": 2, "width": 64, "num_experts": 16, "hidden": 32, "batch": 128}
PARTS: dict[str, Callable[..., Tensor]] = {
    "spectral_penalty": spectral_penalty,
    "spectral_norm": spectral_norm,
    "stable_rank": stable_rank,
}
PLAIN, ALL = "without terms", "all spectral terms"


def _terms(*matrices: str, parts: tuple[str, ...] = ("spectral_penalty",)) -> dict[str, Term]:
    return {f"{part} of {m}": Term(partial(PARTS[part], matrix=m), 1e-2) for m in matrices for part in parts}


SETS: dict[str, dict[str, Term]] = {
    "router's matrix": _terms("router"),
    ALL: _terms("router", "gates"),
    "all, each part a term of its own": _terms("router", "gates", parts=("spectral_norm", "stable_rank")),
}


def name(sizes: Mapping[str, int]) -> str:
    """Of the case."""
    return "{depth} layers, N{batch} D{width} E{num_experts} H{hidden} k2 float32 step".format(**sizes)


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return 1


def cases(settings: Settings) -> Iterator[Case]:
    """Steps of one network with terms and without, and the terms alone on what a forward left."""
    sizes = QUICK if settings.quick else FULL
    trial = Trial(settings.device, **sizes)
    candidates = [
        Candidate(PLAIN, partial(trial.step, {}), "unlike"),
        Candidate("without terms, again", partial(trial.step, {}), "unlike", note="the noise of this case"),
    ]
    for kind, terms in SETS.items():
        check = partial(trial.check, terms)
        candidates.append(Candidate(kind, partial(trial.step, terms), "ours", check=check))
        candidates.append(Candidate(f"{kind}, alone", partial(trial.alone, terms), "ours", check=check))
    yield Case("penalty", name(sizes), candidates, settings.device, baseline=PLAIN)


class Trial:
    """One network in training."""

    def __init__(
        self, device: torch.device, *, batch: int, depth: int, width: int, num_experts: int, hidden: int
    ) -> None:
        def router(dim: int, experts: int) -> Router:
            return Router(PrototypeScorer(dim, experts), TopK(2))

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            network = sr_moe(10, router=router, depth=depth, width=width, num_experts=num_experts, hidden=hidden)
            self.network = network.to(device)
            self.images, self.labels = torch.rand(batch, 1, 28, 28).to(device), torch.randint(10, (batch,)).to(device)
        self.optimizer = torch.optim.AdamW(param_groups(self.network, 1e-2), lr=1e-4)
        self.records = self._forward()

    def step(self, terms: Mapping[str, Term]) -> None:
        """Forward, backward, optimizer, and the work around it."""
        with record(self.network) as tape:
            logits = self.network(self.images)
        loss = F.cross_entropy(logits, self.labels)
        if terms:
            loss = loss + penalty(tape, terms)[0]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        after_step(self.network, tape)

    def alone(self, terms: Mapping[str, Term]) -> Tensor:
        """Forward and backward of the terms on given records."""
        for item in self.records:
            item.scorer.zero_grad(set_to_none=True)  # type: ignore[union-attr]
        values = torch.stack([term.reduced([v for _, v in term.values(self.records)]) for term in terms.values()])
        values.sum().backward()
        return values.detach()

    def check(self, terms: Mapping[str, Term]) -> str | None:
        """Values, and gradients of the routers' matrices, against singular values in float64."""
        leaves = [item.matrix.detach().double().requires_grad_() for item in self.records]  # type: ignore[union-attr]
        matrices = {"router": leaves, "gates": [_gates(item).detach().double() for item in self.records]}
        exact = {}
        for term in terms:
            part, _, kind = term.partition(" of ")
            values = [_exact(part, m, m.shape[1] if kind == "gates" else min(m.shape)) for m in matrices[kind]]
            exact[term] = torch.stack(values).mean()
        torch.stack(list(exact.values())).sum().backward()
        computed: dict[str, Tensor | None] = dict(zip(terms, self.alone(terms), strict=True))
        truth = {term: value.detach() for term, value in exact.items()}
        for place, (item, leaf) in enumerate(zip(self.records, leaves, strict=True)):
            computed[f"gradient {place}"] = item.matrix.grad  # type: ignore[union-attr]
            truth[f"gradient {place}"] = leaf.grad  # type: ignore[assignment]
        return difference(computed, truth, torch.float32)

    def _forward(self) -> list[Record]:
        """Records whose scores are leaves, so that a backward ends there."""
        with record(self.network) as tape, torch.no_grad():
            self.network(self.images)
        return [
            replace(item, routing=replace(item.routing, score=item.routing.scores.detach().requires_grad_()))
            for item in tape
        ]


def _gates(item: Record) -> Tensor:
    gates: Tensor = item.routing.probs * (item.routing.num_experts / len(item.routing.probs)) ** 0.5
    return gates


def _exact(part: str, matrix: Tensor, largest: int) -> Tensor:
    """The definitions, from all singular values."""
    sigma = torch.linalg.svdvals(matrix)
    norm = (sigma[0] - 1).clamp_min(0).square()
    rank = 1 - sigma.square().sum() / sigma[0].square() / largest
    exact: Tensor = {"spectral_norm": norm, "stable_rank": rank, "spectral_penalty": norm + rank}[part]
    return exact
