"""What stands in the blocks of a restoring network: whole networks, modulations, one network of as many numbers."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn

from spectralmoe import FeedForward, LinearScorer, MoE, Router, Scorer, TopK
from spectralmoe.experts import Experts, ModulatedExperts
from spectralmoe.models import ModulatedBlock
from spectralmoe.scorers import MonteCarlo

__all__ = ["Recipe", "make_place"]

EXPANSION, SHARED = 4, 5


class Recipe(NamedTuple):
    """One row of the card.

    Attributes:
        kind: "networks", modulations "linear" or "vector", or "one" network with the numbers of linear modulations.
        experts: E.
        form: of the passes with dropout around the router; None: a plain linear router.
    """

    kind: str
    experts: int
    form: str | None = None


def make_place(recipe: Recipe, dim: int, k: int) -> nn.Module:
    """A new module (..., D) -> (..., D) of the recipe, k experts a position.

    With all its experts E networks have 8 E D^2 numbers, modulations 2 E D^2 + 10 D^2, and so has the one network.
    """
    if recipe.kind == "one":
        router = Router(LinearScorer(dim, 1), TopK(1))
        return MoE(router, FeedForward(1, dim, (recipe.experts + SHARED) * dim))
    scorer: Scorer = LinearScorer(dim, recipe.experts)
    if recipe.form is not None:
        scorer = MonteCarlo(scorer, form=recipe.form)
    router = Router(scorer, TopK(k, normalize=True))
    bank: Experts = FeedForward(recipe.experts, dim, EXPANSION * dim)
    if recipe.kind == "networks":
        return MoE(router, bank)
    bank = ModulatedExperts(recipe.experts, dim, form=recipe.kind)
    return ModulatedBlock(MoE(router, bank), residual=False)
