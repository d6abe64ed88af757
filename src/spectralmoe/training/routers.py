"""Routers by preset name, from one table: a scorer, the terms trained with it, and how its load is balanced."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch

from spectralmoe.errors import UserError, one_of
from spectralmoe.models.sr_moe import RouterFactory
from spectralmoe.regularizers import load_balance, spectral_penalty
from spectralmoe.router import Router
from spectralmoe.scorers import CosineScorer, EigenbasisScorer, LinearScorer, PrincipalScorer, PrototypeScorer, Scorer
from spectralmoe.selectors import Balanced, Selector, Soft, SoftBalanced, TopK
from spectralmoe.spec import describe, find_class
from spectralmoe.terms import Term
from spectralmoe.training.names import DEFAULT_ROUTERS

__all__ = ["DEFAULT_ROUTERS", "ROUTERS", "Preset", "find_preset", "router_factory"]


@dataclass(frozen=True, slots=True)
class Preset:
    """One row of a comparison.

    Attributes:
        summary: one line for ``spectralmoe list``.
        scorer: (D, E) -> scorer.
        terms: regularizers by name, with their weights.
        balanced: with the loss-free bias, on the choice, or on the weights where routing is soft.
    """

    summary: str
    scorer: Callable[[int, int], Scorer]
    terms: Mapping[str, Term] = field(default_factory=dict)
    balanced: bool = False

    def strengthened(self, factor: float) -> Preset:
        """The same row with the weights of its terms multiplied by ``factor``."""
        return replace(self, terms={name: _scaled(term, factor) for name, term in self.terms.items()})


def _scaled(term: Term, factor: float) -> Term:
    if callable(term.weight):
        raise UserError("a term whose weight is a function of the step cannot be tuned")
    return replace(term, weight=term.weight * factor)


def _prototypes(dim: int, num_experts: int) -> Scorer:
    return PrototypeScorer(dim, num_experts, temperature=1.0, scale=dim**-0.5)  # tokens come at norm sqrt(D)


def _eigenbasis(dim: int, num_experts: int) -> Scorer:
    return EigenbasisScorer(dim, num_experts, rank=min(dim, 4 * num_experts), temperature=0.1)


_SPECTRAL = {"spectral": Term(spectral_penalty, 0.1, reduce="sum")}

ROUTERS: dict[str, Preset] = {
    "linear": Preset("dot-product gate", LinearScorer),
    "linear+load_balance": Preset(
        "dot-product gate with the Switch loss", LinearScorer, {"load_balance": Term(load_balance, 1e-2)}
    ),
    "linear+balanced": Preset("dot-product gate with the loss-free selection bias", LinearScorer, balanced=True),
    "cosine": Preset("cosine gate", CosineScorer),
    "prototype": Preset("distance to learned prototypes", _prototypes),
    "sr-moe": Preset(
        "prototypes with both spectral terms and the loss-free bias (SR-MoE)", _prototypes, _SPECTRAL, balanced=True
    ),
    "eigenbasis": Preset("energy shares in an orthonormal basis (EMoE, the paper's equations)", _eigenbasis),
    "emoe": Preset("energy on the sides of principal directions (EMoE, the default form)", PrincipalScorer),
}

_BIAS_RATE = 1e-2


def find_preset(name: str) -> Preset:
    """The preset called ``name``, or one made of a user's scorer class, ``pkg:Class``.

    Raises:
        UserError: no such preset, class or module; the class is not a ``Scorer``.
    """
    if name in ROUTERS:
        return ROUTERS[name]
    if ":" not in name:
        raise one_of("router", name, [*ROUTERS, "pkg:Class"])
    cls = find_class(name)
    if not (isinstance(cls, type) and issubclass(cls, Scorer)):
        raise UserError(f"router {name!r} is not a subclass of spectralmoe.Scorer")
    preset = Preset(f"a class of your own, {name}", cls)
    _try(preset, name)
    return preset


def _try(preset: Preset, name: str) -> None:
    """Build a user's scorer and run two tokens, so that a mistake shows at once and not after training."""
    try:
        scorer = preset.scorer(8, 4)
        logits = scorer(torch.zeros(2, 8))
        describe(scorer)
        next(scorer.parameters())
    except UserError as error:
        raise UserError(f"router {name!r}: {error}") from error
    except Exception as error:
        reason = str(error).splitlines() or [type(error).__name__]
        raise UserError(f"router {name!r} does not work as {name}(8, 4) on two tokens: {reason[0]}") from error
    if logits.shape != (2, 4) or logits.dtype != torch.float32:
        raise UserError(
            f"router {name!r} gives {logits.dtype} logits of shape {tuple(logits.shape)}, not fp32 of (N, E)"
        )


def router_factory(preset: Preset, k: int | None) -> RouterFactory:
    """(D, E) -> router, with top-k of the softmax scores for every preset (k=None, or all experts: soft)."""

    def make(dim: int, num_experts: int) -> Router:
        selector: Selector
        if k is None or k == num_experts:
            selector = SoftBalanced(rate=_BIAS_RATE) if preset.balanced else Soft()
        elif preset.balanced:
            selector = Balanced(k, score="softmax", normalize=False, rate=_BIAS_RATE)
        else:
            selector = TopK(k)
        return Router(preset.scorer(dim, num_experts), selector)

    return make
