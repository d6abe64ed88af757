"""Suite ``router``: what each scorer costs against the linear one, top-k included."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor

from spectralmoe.bench.case import Candidate, Case
from spectralmoe.bench.gate import difference
from spectralmoe.bench.problem import Form
from spectralmoe.bench.settings import Settings
from spectralmoe.bench.suites.layer import FORMS
from spectralmoe.router import Router
from spectralmoe.scorers import CosineScorer, EigenbasisScorer, LinearScorer, PrototypeScorer
from spectralmoe.scorers.principal import PrincipalScorer
from spectralmoe.selectors import TopK

__all__ = ["FULL", "cases", "count", "name"]

FULL, QUICK = (4096, 768, 64, 128), (256, 64, 16, 32)
"""N, D, E, and R of the eigenbasis."""
K = 2


def name(form: Form, sizes: tuple[int, int, int, int]) -> str:
    """Of the case."""
    n, d, e, r = sizes
    return f"N{n} D{d} E{e} k{K} r{r} float32 {form}"


def count(settings: Settings) -> int:
    """How many cases there will be."""
    return len(FORMS)


def cases(settings: Settings) -> Iterator[Case]:
    """Tokens (N, D) -> weights and indices (N, k), in fp32 as routers always compute."""
    sizes = QUICK if settings.quick else FULL
    n, d, e, r = sizes
    source = torch.Generator(settings.device).manual_seed(0)
    x, gradient = (torch.randn(n, w, device=settings.device, generator=source) for w in (d, K))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        scorers = {
            "linear": LinearScorer(d, e),
            "prototype": PrototypeScorer(d, e, scale=d**-0.5),
            "cosine": CosineScorer(d, e),
            "eigenbasis": EigenbasisScorer(d, e, rank=r),
            "principal": PrincipalScorer(d, e),
        }
    routers = {kind: Router(scorer, TopK(K)).to(settings.device) for kind, scorer in scorers.items()}
    for form in FORMS:
        candidates = [_candidate(kind, router, x, gradient, form) for kind, router in routers.items()]
        candidates.append(_limit(routers["linear"], x, gradient, form))
        yield Case("router", name(form, sizes), candidates, settings.device, baseline="linear")


def _candidate(kind: str, router: Router, x: Tensor, gradient: Tensor, form: Form) -> Candidate:
    parameters = dict(router.named_parameters())

    def run() -> dict[str, Tensor | None]:
        router.train(form != "forward")
        if form == "forward":
            with torch.no_grad():
                return {"weights": router(x).weights}
        for parameter in parameters.values():
            parameter.grad = None
        leaf = x.detach().requires_grad_()
        weights = router(leaf).weights
        weights.backward(gradient)
        return {"weights": weights, "x": leaf.grad, **{name: p.grad for name, p in parameters.items()}}

    def check() -> str | None:
        """Against the same router in float64, with the same choice of experts."""
        computed, twin = run(), copy.deepcopy(router).double()
        leaf = x.double().requires_grad_()
        weights = twin(leaf, replay=router(x)).weights
        weights.backward(gradient.double())
        truth = {"weights": weights.detach(), "x": leaf.grad, **{name: p.grad for name, p in twin.named_parameters()}}
        wanted = {name: value for name, value in truth.items() if value is not None and name in computed}
        return difference(computed, wanted, torch.float32)

    return Candidate(kind, run, "ours", check=check)


def _limit(linear: Router, x: Tensor, gradient: Tensor, form: Form) -> Candidate:
    """The GEMMs of a linear router and a top-k, nothing else."""
    matrix = next(linear.parameters()).detach()

    def forward() -> Tensor:
        logits = x @ matrix.T
        logits.topk(K)
        return logits

    def forward_and_backward() -> tuple[Tensor, Tensor]:
        logits = forward()
        return logits @ matrix, logits.T @ x

    return Candidate("GEMMs and top-k", forward if form == "forward" else forward_and_backward, "limit")
