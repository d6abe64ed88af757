"""MoE = router x dispatch x experts (+ shared expert)."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows, rows_of
from spectralmoe.dispatch import DISPATCHES, Dispatch, pick_dispatch
from spectralmoe.dispatch.base import combine, sort_slots, spread
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.placement import Placement
from spectralmoe.recording import Kept, Recordable
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.transforms import transforming

__all__ = ["MoE"]


class MoE(Recordable):
    r"""Mixture-of-Experts layer: :math:`y_t = \sum_j w_{tj} E_{i_{tj}}(x_t) + S(x_t)`.

    Args:
        router: scorer and selector. It may count more experts than the bank has: those are zero experts.
        experts: the bank.
        placement: which places of the bank hold each expert of the router; None: place e is expert e.
        dispatch: "auto" (``pick_dispatch``), "loop", "dense", "grouped", or a callable.
        shared: module applied to every token, added to the sum.

    Raises:
        UserError: unknown dispatch; fewer experts in the router than in the bank; a placement of other sizes.

    >>> from spectralmoe import FeedForward, LinearScorer, TopK
    >>> layer = MoE(Router(LinearScorer(16, 4), TopK(2)), FeedForward(4, dim=16, hidden=32))
    >>> layer(torch.randn(2, 5, 16)).shape
    torch.Size([2, 5, 16])
    """

    router: Router

    def __init__(
        self,
        router: Router,
        experts: Experts,
        *,
        dispatch: str | Dispatch = "auto",
        shared: nn.Module | None = None,
        placement: Placement | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(router, Router) or not isinstance(experts, Experts):
            raise UserError(f"MoE: takes a Router and Experts, got {type(router).__name__}, {type(experts).__name__}")
        if getattr(experts, "dim", router.scorer.dim) != router.scorer.dim:
            raise UserError(f"MoE: the router reads tokens of width D={router.scorer.dim}, the experts {experts.dim}")
        if isinstance(dispatch, str) and dispatch not in ("auto", *DISPATCHES):
            raise one_of("dispatch", dispatch, ["auto", *DISPATCHES])
        if not isinstance(placement, Placement | None):
            raise UserError(f"MoE: placement takes a Placement, got {type(placement).__name__}")
        if placement is not None:
            placement.check(router.num_experts, experts.num_experts)
        elif router.num_experts < experts.num_experts:
            raise UserError(
                f"MoE: the router knows E={router.num_experts} experts, but the bank holds {experts.num_experts}"
            )
        self.router, self.experts, self.dispatch, self.shared = router, experts, dispatch, shared
        self.placement = placement
        router.scorer.meet(experts)

    def places(self, e: int) -> list[int]:
        """The places of the bank that hold expert ``e`` of the router: none for a zero expert."""
        if self.placement is not None:
            return self.placement.places(e)
        return [e] if 0 <= e < self.experts.num_experts else []

    def forward(
        self,
        x: Tensor,
        mask: Tensor | None = None,
        context: Context | Rows | None = None,
        scale: Tensor | None = None,
    ) -> Tensor:
        """x (..., D) -> (..., D).

        Args:
            mask: (...), True for real tokens: the others get no expert, their output is 0, and so is their part
                in every gradient, whatever they hold.
            context: side information that parts read by name: a ``Context``, or its rows (N, ...).
            scale: a number that multiplies all that the layer adds; for the routed experts their N * K weights instead
                of N * D outputs.
        """
        fed, replay = self.take_feed(x.device), None
        if fed is not None:
            mask = fed.mask if mask is None else mask
            context = fed.context if context is None else context
            replay = fed.next_replay()
        rows = rows_of(context, x.shape[:-1], mask)
        routing = self.router(x, mask=mask, context=rows, replay=replay)
        tokens = x if x.dim() == 2 else x.reshape(-1, x.shape[-1])
        streams = self.router.scorer.streams_tokens or self.experts.streams_tokens
        seen = tokens.detach() if streams and self.training and self.router.training else None
        if torch.is_autocast_enabled(x.device.type):
            tokens = tokens.to(torch.get_autocast_dtype(x.device.type))
        scaled = routing if scale is None else replace(routing, weights=_without(routing.weights * scale, routing.mask))
        placed = scaled if self.placement is None else self.placement(scaled)
        y, kept = self._run(self.experts.beside(tokens, rows), placed)
        self.leave(routing, kept, seen, rows)
        y = y if x.dim() == 2 else y.reshape(x.shape)
        if self.shared is None:
            return y
        shared: Tensor = self.shared(_without(x, mask))
        shared = shared if scale is None else shared * scale.to(shared.dtype)
        return y + _without(shared, mask)

    def _run(self, tokens: Tensor, routing: Routing) -> tuple[Tensor, Kept | None]:
        if keep := self.names_to_keep():
            return self._run_keeping(tokens, routing, keep)
        if isinstance(self.dispatch, str):
            dispatch = pick_dispatch(routing, self.experts) if self.dispatch == "auto" else DISPATCHES[self.dispatch]()
        else:
            dispatch = self.dispatch
        return dispatch(tokens, routing, self.experts), None

    def _run_keeping(self, tokens: Tensor, routing: Routing, keep: frozenset[str]) -> tuple[Tensor, Kept]:
        """The grouped dispatch, step by step, with its sorted tensors kept."""
        if transforming():
            raise UserError(
                "record(keep=...) cannot keep tensors inside a transform of torch.func; record without keep"
            )
        slots = sort_slots(routing, self.experts.num_experts)
        rows = spread(tokens, slots)
        hidden = self.experts.hidden(rows, slots.counts) if "hidden" in keep else None
        if "hidden" in keep and hidden is None:
            raise UserError(f"record(keep=...): {type(self.experts).__name__} has no 'hidden' to keep")
        result = self.experts(rows, slots.counts) if hidden is None else self.experts.project(hidden, slots.counts)
        tensors = {"input": rows} | ({} if hidden is None else {"hidden": hidden})
        tensors["output"] = result[0] * result[1][:, None] if isinstance(result, tuple) else result
        y = combine(result, routing.weights.to(tokens.dtype), slots)
        return y, Kept(slots, tensors)


def _without(values: Tensor, mask: Tensor | None) -> Tensor:
    """``values`` (..., D) with zeros where ``mask`` (...) has no real token, in value and gradient."""
    return values if mask is None else values.masked_fill(~mask.bool().unsqueeze(-1), 0)
