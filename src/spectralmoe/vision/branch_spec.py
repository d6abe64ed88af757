"""What a branch is made of: routing, adapters, and the blocks that get one."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Adapter
from spectralmoe.models.build import ExpertsFactory, RouterFactory
from spectralmoe.moe import MoE
from spectralmoe.naming import Table
from spectralmoe.presets import find_preset
from spectralmoe.router import Router
from spectralmoe.rows import K, experts_a_token

__all__ = ["BranchSpec", "Start", "Tokens"]

Tokens = Literal["patches", "all"]
Start = Literal["model", "authors"]


@dataclass(frozen=True, kw_only=True)
class BranchSpec:
    """Routing, experts and place of MoE branches.

    Attributes:
        router: (D, E) -> a router.
        experts: E.
        bottleneck: hidden width H of each expert, an adapter D -> H -> D.
        blocks: which blocks, see ``choose_blocks``.
        tokens: "patches" (class, distillation and register tokens bypass the branch) or "all".
        prefix: how many such tokens there are in front; None: what the model says, ``num_prefix_tokens`` (timm), or 0.
        norm: LayerNorm without factors in front of router and experts.
        scale: start of the learnable factor alpha; 0 leaves the model as it is.
        start: "model": the adapters' output matrices start at zero, so that the model computes what it did until the
            first step (as in LoRA, Hu et al., arXiv 2106.09685); "authors": they start at random, as EMoE's authors
            have it. With scale 0, which also leaves the model as it is, they always start at random: if both factors
            were zero, neither would get a gradient.
        bank: (E, D, H) -> a bank in the place of an MLP (``replace_mlp``); None: adapters in a branch, and experts of
            the MLP's form in its place.

    Raises:
        UserError: experts or bottleneck below 1, a negative prefix, an unknown ``tokens`` or ``start``, a scale that is
            not finite.

    >>> from spectralmoe import LinearScorer, TopK
    >>> spec = BranchSpec(router=lambda d, e: Router(LinearScorer(d, e), TopK(1)), experts=4, bottleneck=8)
    >>> spec.make_moe(16).experts.up.shape
    torch.Size([4, 8, 16])
    """

    router: RouterFactory
    experts: int = 8
    bottleneck: int = 192
    blocks: str | Sequence[int] = "last6"
    tokens: Tokens = "patches"
    prefix: int | None = None
    norm: bool = False
    scale: float = 1.0
    start: Start = "model"
    bank: ExpertsFactory | None = None

    def __post_init__(self) -> None:
        for name, value in (("experts", self.experts), ("bottleneck", self.bottleneck)):
            if not isinstance(value, int) or value < 1:
                raise UserError(f"{type(self).__name__}: {name} must be at least 1, got {value}")
        if self.tokens not in ("patches", "all"):
            raise one_of(f"tokens of {type(self).__name__}", self.tokens, ["all", "patches"])
        if self.start not in ("model", "authors"):
            raise one_of(f"start of {type(self).__name__}", self.start, ["authors", "model"])
        if self.prefix is not None and self.prefix < 0:
            raise UserError(f"{type(self).__name__}: prefix must not be negative, got {self.prefix}")
        if not math.isfinite(self.scale):
            raise UserError(f"{type(self).__name__}: scale must be finite, got {self.scale}")

    @classmethod
    def of(cls, row: str | Table, *, k: K = 1, **options: Any) -> BranchSpec:
        """Branches with a router by name, ``"emoe"``, or any row that ``find_preset`` reads.

        EMoE (Cheng et al., "Eigenbasis-Guided Routing for Mixture-of-Experts", arXiv 2601.12137) has two forms here:
        ``"emoe"``, the default form of this library: ``PrincipalScorer`` on normalised tokens, class token included;
        and ``"emoe-faithful"``, the authors' layer: h + alpha * sum_e gate_e E_e(h) on patch tokens, with
        ``EigenbasisScorer`` and weights that are not renormalised after the top-k.

        Args:
            k: experts a token, or "soft".
            options: attributes of the class. ``tokens``, ``norm`` and ``start`` default to those of the row, which are
                "all", True and "model" for most rows.

        Raises:
            UserError: as ``find_preset`` and the class.

        >>> BranchSpec.of("emoe-faithful").tokens, BranchSpec.of("emoe", blocks="last2").tokens
        ('patches', 'all')
        """
        preset = find_preset(row)
        k = experts_a_token(k)
        wanted = (options.pop("experts", cls.experts), options.pop("bottleneck", cls.bottleneck))
        experts, bottleneck = preset.sizes(*wanted, k)
        options = {**preset.branch, **options, "experts": experts, "bottleneck": bottleneck}
        bank = None if preset.experts is None else preset.make_experts
        return cls(router=preset.routers(k), bank=bank, **options)

    def make_router(self, dim: int) -> Router:
        """A new router for tokens of width ``dim``."""
        return self.router(dim, self.experts)

    def make_moe(self, dim: int) -> MoE:
        """A new router and a new bank of adapters; under one seed the same adapters for every router.

        Raises:
            UserError: a bank of its own.
        """
        if self.bank is not None:
            raise UserError("branches have adapters; leave the experts of the row out, or put them in place of MLPs")
        experts = Adapter(self.experts, dim, self.bottleneck)
        if self.start == "model" and self.scale != 0:
            torch.nn.init.zeros_(experts.down)
        with torch.random.fork_rng(devices=[]):
            return MoE(self.make_router(dim), experts)
