"""What a branch is made of: routing, adapters, and the blocks that get one."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch

from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Adapter
from spectralmoe.moe import MoE
from spectralmoe.router import Router
from spectralmoe.scorers import EigenbasisScorer
from spectralmoe.scorers.principal import PrincipalScorer
from spectralmoe.selectors import Selector, Soft, TopK

__all__ = ["BranchSpec", "EMoESpec", "Mode", "RouterFactory", "Start", "Tokens"]

RouterFactory = Callable[[int, int], Router]
Tokens = Literal["patches", "all"]
Mode = Literal["soft", "top1", "top2"]
Start = Literal["model", "authors"]

_SELECTORS: dict[str, Callable[[], Selector]] = {"soft": Soft, "top1": partial(TopK, 1), "top2": partial(TopK, 2)}


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
            have it. With scale 0, which leaves the model as it is too, they start at random: of two factors at zero
            neither gets a gradient.

    Raises:
        UserError: experts or bottleneck below 1, a negative prefix, an unknown ``tokens`` or ``start``, a scale that is
            not finite.

    >>> from spectralmoe import LinearScorer
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

    def make_router(self, dim: int) -> Router:
        """A new router for tokens of width ``dim``."""
        return self.router(dim, self.experts)

    def make_moe(self, dim: int) -> MoE:
        """A new router and a new bank of adapters; under one seed the same adapters for every router."""
        experts = Adapter(self.experts, dim, self.bottleneck)
        if self.start == "model" and self.scale != 0:
            torch.nn.init.zeros_(experts.down)
        with torch.random.fork_rng(devices=[]):
            return MoE(self.make_router(dim), experts)


@dataclass(frozen=True, kw_only=True)
class EMoESpec(BranchSpec):
    """The EMoE preset: adapters behind a router that reads energies along shared orthonormal directions.

    Cheng et al., "Eigenbasis-Guided Routing for Mixture-of-Experts" (EMoE), arXiv 2601.12137, in two forms:

    - the default, the idea done well: ``PrincipalScorer`` on normalised tokens, class token included;
    - ``faithful``: the authors' layer, h + alpha * sum_e gate_e E_e(h) on patch tokens, with ``EigenbasisScorer``
      (eps 1e-6) and weights that are not renormalised after the top-k.

    Attributes:
        faithful: which form.
        rank: R; None: 128, or D where that is less (faithful); half of E, rounded up (default).
        mode: "soft", "top1" or "top2".
        tau: temperature; None: 1.0 (faithful), the scorer's own (default).
        tokens, norm, start: None: "patches", False, "authors" (faithful), "all", True, "model" (default).

    Raises:
        UserError: as ``BranchSpec``; an unknown mode. A rank above D is refused when the router is made.

    >>> EMoESpec(faithful=True).tokens, EMoESpec().tokens
    ('patches', 'all')
    """

    router: RouterFactory = field(init=False, repr=False, compare=False)
    tokens: Tokens = None  # type: ignore[assignment]  # until __post_init__, which knows the form
    norm: bool = None  # type: ignore[assignment]
    start: Start = None  # type: ignore[assignment]
    faithful: bool = False
    rank: int | None = None
    mode: Mode = "top1"
    tau: float | None = None

    def __post_init__(self) -> None:
        if self.mode not in _SELECTORS:
            raise one_of("mode of EMoESpec", self.mode, _SELECTORS)
        form = faithful_router if self.faithful else principal_router
        own = {
            "router": partial(form, rank=self.rank, mode=self.mode, tau=self.tau),
            "tokens": ("patches" if self.faithful else "all") if self.tokens is None else self.tokens,
            "norm": not self.faithful if self.norm is None else self.norm,
            "start": ("authors" if self.faithful else "model") if self.start is None else self.start,
        }
        for name, value in own.items():
            object.__setattr__(self, name, value)
        super().__post_init__()


def faithful_router(dim: int, num_experts: int, *, rank: int | None, mode: Mode, tau: float | None) -> Router:
    """The routing of the paper: masked energies, tau 1, rank 128, weights as the softmax gives them."""
    rank, tau = min(128, dim) if rank is None else rank, 1.0 if tau is None else tau
    scorer = EigenbasisScorer(dim, num_experts, rank=rank, temperature=tau, eps=1e-6)
    return Router(scorer, _SELECTORS[mode]())


def principal_router(dim: int, num_experts: int, *, rank: int | None, mode: Mode, tau: float | None) -> Router:
    """Routing by energies along the principal directions of the tokens."""
    options: dict[str, Any] = {"rank": rank} if tau is None else {"rank": rank, "temperature": tau}
    return Router(PrincipalScorer(dim, num_experts, **options), _SELECTORS[mode]())
