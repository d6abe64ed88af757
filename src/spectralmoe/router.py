"""The router: a scorer and a selector, in full precision."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows, rows_of
from spectralmoe.errors import UserError
from spectralmoe.parts import Part, in_full_precision
from spectralmoe.routing import EMPTY, Routing
from spectralmoe.scorers import Scorer
from spectralmoe.selectors import Selector
from spectralmoe.stacks import chosen_experts
from spectralmoe.torch_private import transforming

__all__ = ["Router", "shard_routers"]


class Router(nn.Module):
    """Maps tokens to a ``Routing``: the scorer gives logits, and the selector chooses experts and weighs them.

    Logits and weights are computed in fp32 (float64 for float64 tokens) with autocast off. The router's parameters and
    buffers stay fp32 if the model is cast down (``.to(torch.bfloat16)``, ``.half()``). So under FSDP2 a router needs a
    group of its own (``shard_routers``).

    Args:
        scorer: the scorer.
        selector: the selector; it belongs to this router alone.

    Raises:
        UserError: the selector does not fit the number of experts.

    >>> from spectralmoe import LinearScorer, TopK
    >>> router = Router(LinearScorer(16, 8), TopK(2))
    >>> routing = router(torch.randn(5, 16))
    >>> routing.indices.shape, int(routing.counts().sum())
    (torch.Size([5, 2]), 10)
    """

    def __init__(self, scorer: Scorer, selector: Selector) -> None:
        super().__init__()
        self.scorer, self.selector = scorer, selector
        selector.bind(scorer.num_experts)
        self.soft, self.fills = selector.soft, selector.fills

    @property
    def num_experts(self) -> int:
        """The number of experts E, zero experts included."""
        return self.scorer.num_experts

    @property
    def k(self) -> int | None:
        """K of the selector, or of the one that it wraps; None where the number of experts a token varies."""
        numbers = (getattr(part, "k", None) for part in self.selector.modules())
        return next((k for k in numbers if isinstance(k, int)), None)

    @property
    def per_token(self) -> bool:
        """Whether a token alone decides its experts: the selector compares no tokens, and no part reads a context."""
        return self.selector.per_token and not any(part.reads for part in self.modules() if isinstance(part, Part))

    @property
    def is_frozen(self) -> bool:
        """Whether the router is frozen: the scorer is, and no parameter of the selector is trained."""
        return self.scorer.is_frozen and not any(parameter.requires_grad for parameter in self.selector.parameters())

    def forward(
        self,
        x: Tensor,
        *,
        mask: Tensor | None = None,
        context: Context | Rows | None = None,
        replay: Routing | Tensor | None = None,
    ) -> Routing:
        """Route x (..., D).

        Args:
            mask: (...) bool, True for a real token. Padding gets no expert and is not counted.
            context: side information for the scorer and the selector: a ``Context``, or its rows (N, ...) by name.
            replay: a routing, or indices (N, K) of integers, whose choice is used again. The weights are computed from
                the logits of this forward; what the router itself would have chosen is ``Routing.live``.

        Raises:
            UserError: x is not D wide, or the mask or the replayed choice has another shape; replayed indices are no
                integers, or, on a CPU, name an expert that there is not.
        """
        shape, dim = x.shape[:-1], self.scorer.dim
        if x.shape[-1] != dim:
            raise UserError(
                f"Router: tokens are {x.shape[-1]} wide, but the scorer was made for D={dim}; make it for this width"
            )
        if mask is not None and mask.shape != shape:
            raise UserError(
                f"Router: mask has shape {tuple(mask.shape)}, but the tokens have {tuple(shape)}; give each a value"
            )
        tokens = (x if x.dim() == 2 else x.reshape(-1, dim)).to(torch.promote_types(x.dtype, torch.float32))
        flat_mask = None if mask is None else mask.reshape(-1).bool()
        if flat_mask is not None:
            tokens = tokens.masked_fill(~flat_mask[:, None], 0)  # padding may hold nan, which 0 * nan would spread
        rows = rows_of(context, x, mask)
        with torch.autocast(device_type=x.device.type, enabled=False):
            logits = self.scorer(tokens, context=rows)
            wanted = self.selector.choose(logits.detach(), mask=flat_mask, context=rows)
            indices = self.selector.limit(wanted, self.num_experts)
            used = indices if replay is None else _replayed(replay, logits, flat_mask)
            score, weights = self.selector.scored(logits), self.selector.weigh(logits, used)
            asked = None if wanted is indices else (wanted >= 0).sum()
            full = self.fills and flat_mask is None and replay is None
            routing = Routing(logits, weights, used, score, flat_mask, tuple(shape), self.soft, asked, full=full)
            if replay is None:
                return routing
            live = replace(routing, weights=self.selector.weigh(logits.detach(), indices), indices=indices)
            return replace(routing, asked=None, live=live)

    def select(self, indices: Sequence[int] | Tensor) -> Router:
        """Return a new router for the experts ``indices`` alone, in this order.

        It decides as this one would if all other experts had a logit of minus infinity and could not be chosen. Only
        what a selector computes from E itself (capacities, noise of 1/E) goes by the number of experts that are left.

        Raises:
            UserError: ``indices`` is empty or names an expert twice or one that does not exist; the scorer cannot be
                cut down; or too few experts are left for the selector.
        """
        chosen = chosen_experts("Router.select", indices, self.num_experts)
        if len(set(chosen)) < len(chosen):
            raise UserError(f"Router.select: every expert may stand once, got {chosen}")
        parts = {id(part): part.select(chosen) for part in (self.scorer, self.selector)}
        router = copy.deepcopy(self, dict(parts))
        router.soft, router.fills = router.selector.soft, router.selector.fills
        return router

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Router:
        super()._apply(in_full_precision(fn), recurse)  # type: ignore[no-untyped-call]
        return self


def shard_routers(model: nn.Module, **options: Any) -> None:
    """Give every router of ``model`` its own FSDP2 group in fp32; call it before ``fully_shard(model)``.

    Args:
        options: options of ``torch.distributed.fsdp.fully_shard`` (``mesh``, ``reshard_after_forward``, ...) other than
            ``mp_policy``, which is set to fp32 without input casts.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32, cast_forward_inputs=False)
    for module in model.modules():
        if isinstance(module, Router):
            fully_shard(module, mp_policy=policy, **options)


def _whole(indices: Tensor) -> Tensor:
    """Replayed indices (N, K) as int64."""
    if indices.dim() != 2 or indices.is_floating_point() or indices.is_complex() or indices.dtype == torch.bool:
        kind = f"{indices.dtype} {tuple(indices.shape)}".removeprefix("torch.")
        raise UserError(f"Router: replayed indices must be whole numbers (N, K), got {kind}")
    return indices.long()


def _replayed(replay: Routing | Tensor, logits: Tensor, mask: Tensor | None) -> Tensor:
    tokens, experts = logits.shape
    if isinstance(replay, Tensor):
        replay = _whole(replay)
    n, e = (len(replay), experts) if isinstance(replay, Tensor) else replay.logits.shape
    if (n, e) != (tokens, experts):
        raise UserError(
            f"Router: the replayed routing has N={n}, E={e}, but this forward has N={tokens}, E={experts}; replay it "
            "on the batch that it was recorded on"
        )
    indices = replay.to(logits.device) if isinstance(replay, Tensor) else replay.indices
    if indices.device.type == "cpu" and indices.numel() and not (torch.compiler.is_compiling() or transforming()):
        least, most = (int(end) for end in indices.aminmax())  # a device is not waited for
        if least < EMPTY or most >= experts:
            wrong = least if least < EMPTY else most
            raise UserError(
                f"Router: the replayed choice names expert {wrong}; there are 0 to {experts - 1}, and {EMPTY} for an "
                "empty slot"
            )
    return indices if mask is None else indices.masked_fill(~mask[:, None], EMPTY)
