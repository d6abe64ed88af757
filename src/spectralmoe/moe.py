"""The MoE layer: a router, a dispatch, a bank of experts and, if wanted, a shared expert."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from spectralmoe.context import Context, Rows, rows_of, without_padding
from spectralmoe.dispatch import DISPATCHES, Dispatch, pick_dispatch
from spectralmoe.dispatch.base import Kept
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import Experts
from spectralmoe.placement import Placement, check_places
from spectralmoe.recording import KEEPABLE, Recordable
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.scorers import Scorer, StatisticsMemory
from spectralmoe.units import Token, Unit

__all__ = ["MoE"]

Plain = Callable[[Tensor, Routing, Experts], Tensor]


class MoE(Recordable):
    r"""A Mixture-of-Experts layer: :math:`y_t = \sum_j w_{tj} E_{i_{tj}}(x_t) + S(x_t)`.

    For token t the router chooses experts :math:`i_{tj}` with weights :math:`w_{tj}`, j = 1 ... K; E_i are the routed
    experts and S is the shared expert, if there is one.

    Args:
        router: scorer and selector. If it counts more experts than the bank holds, the last ones are zero experts,
            which can be chosen and add nothing to the output.
        experts: the bank of routed experts, such as ``FeedForward``.
        placement: which places of the bank hold each expert of the router; None puts expert e at place e.
        dispatch: "auto", the fastest for each call (``pick_dispatch``); "loop", "dense" or "grouped"; a ``Dispatch``;
            or a function (x, routing, experts) -> y.
        shared: S, a module that is applied to every token; None adds nothing.
        unit: what is routed: ``Token()``, the default, ``Pixel()`` or ``Sample()`` (``spectralmoe.units``).
        memory: aligns shifted inputs with the tokens of training, in evaluation (``StatisticsMemory``).

    Raises:
        UserError: the dispatch is unknown; the router has fewer experts than the bank; widths of router, experts or
            memory differ; the placement does not fit; or the memory is to align the experts of a unit that pools. In
            forward: the bank does not take rows of this shape.

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
        dispatch: str | Dispatch | Plain = "auto",
        shared: nn.Module | None = None,
        placement: Placement | None = None,
        unit: Unit | None = None,
        memory: StatisticsMemory | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(router, Router) or not isinstance(experts, Experts):
            raise UserError(
                f"MoE: takes a Router and Experts, got {type(router).__name__}, {type(experts).__name__}; write "
                "MoE(Router(scorer, selector), FeedForward(...))"
            )
        unit = Token() if unit is None else unit
        if not unit.pooled and getattr(experts, "dim", router.scorer.dim) != router.scorer.dim:
            raise UserError(
                f"MoE: the router reads tokens of width D={router.scorer.dim}, the experts {experts.dim}; make both "
                "for the same width"
            )
        if isinstance(dispatch, str) and dispatch not in ("auto", *DISPATCHES):
            raise one_of("dispatch", dispatch, ["auto", *DISPATCHES])
        check_places(placement, router.num_experts, experts.num_experts)
        if placement is not None and type(router.scorer).bind_experts is not Scorer.bind_experts:
            raise UserError(
                f"MoE: {type(router.scorer).__name__} reads expert e in place e, so it takes no placement; leave it out"
            )
        self.router, self.experts, self.dispatch, self.shared = router, experts, dispatch, shared
        if memory is not None and memory.dim != router.scorer.dim:
            raise UserError(
                f"MoE: the router reads tokens of width D={router.scorer.dim}, the memory {memory.dim}; make it with "
                f"StatisticsMemory({router.scorer.dim})"
            )
        if memory is not None and unit.pooled and memory.where == "layer":
            raise UserError(
                f"MoE: under {type(unit).__name__} the memory knows pooled features alone; use where='router'"
            )
        self.placement, self.unit, self.memory = placement, unit, memory
        router.scorer.bind_experts(experts)

    def spec_arguments(self) -> dict[str, object]:
        """Return the constructor arguments that are not attributes of the same name."""
        of_machine = isinstance(self.dispatch, Dispatch) and self.dispatch.of_machine
        unit = None if isinstance(self.unit, Token) else self.unit
        return {"unit": unit, "dispatch": "auto" if of_machine else self.dispatch}

    @property
    def keepable(self) -> tuple[str, ...]:
        """The names of the tensors that ``record`` can keep of this layer."""
        return (*KEEPABLE, *self.experts.says)

    @property
    def reads_alike(self) -> bool:
        """Whether the experts read exactly what the router reads."""
        aligns_router_alone = self.memory is not None and self.memory.where == "router"
        return not (self.experts.reads or self.unit.pooled or aligns_router_alone)

    @property
    def reads(self) -> frozenset[str]:
        """The names of the side information that the layer's parts read."""
        return frozenset(name for _, part in self.parts() for name in part.reads)

    def places(self, e: int) -> list[int]:
        """Return the places of the bank that hold expert ``e`` of the router; none for a zero expert."""
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
        """Run the layer on x (..., D) -> (..., D); with other units x is laid out as they say.

        Args:
            mask: (...), True for real tokens. Padding gets no expert, its output is 0, and it has no part in any
                gradient, whatever it holds.
            context: side information that the layer's parts read by name: a ``Context``, or its rows (N, ...).
            scale: a number that multiplies the output; it is applied to the routed experts' combine weights.
        """
        mask, context, replay = self.begin(x, mask, context)
        if self.unit.pooled and mask is not None and mask.shape == x.shape[: mask.dim()]:  # else the router refuses it
            x = without_padding(x, mask)
        queries, units = self.unit.split(x)
        if self.memory is not None:
            queries, units = self.memory.beside(queries, units, mask)
        leading = queries.dim() - 1
        side = rows_of(context, queries, mask)
        routing = self.router(queries, mask=mask, context=side, replay=replay)
        names = self.names_to_keep()
        streams = self.router.scorer.streams_tokens or self.experts.streams_tokens or self.memory is not None
        seen = self.seen(queries, names, streams=streams)
        scaled = routing
        if scale is not None:
            scaled = replace(routing, weights=without_padding(routing.weights * scale, routing.mask))
        placed = scaled if self.placement is None else self.placement(scaled)
        rows = self.experts.beside(self._rows(units, leading), side)
        y, kept = self._run(rows, placed, names - {"tokens"})
        self.leave(routing, kept, seen, side)
        y = y if leading == 1 else y.reshape(*units.shape[:leading], *y.shape[1:])
        if self.shared is None:
            return self.unit.join(y)
        shared: Tensor = self.shared(without_padding(units, mask))
        shared = shared if scale is None else shared * scale.to(shared.dtype)
        return self.unit.join(y + without_padding(shared, mask))

    def _rows(self, units: Tensor, leading: int) -> Tensor:
        """Rows (N, *S) from units (*L, *S), in the precision of autocast."""
        shape = units.shape[leading:]
        if self.experts.row_dims not in (None, len(shape)):
            raise UserError(
                f"MoE: {type(self.experts).__name__} takes rows of {self.experts.row_dims} dimensions, but "
                f"unit={type(self.unit).__name__} gives it rows of shape {tuple(shape)}"
            )
        if torch.is_autocast_enabled(units.device.type):
            units = units.to(torch.get_autocast_dtype(units.device.type))
        return units if leading == 1 else units.reshape(-1, *shape)

    def _run(self, rows: Tensor, routing: Routing, names: frozenset[str]) -> tuple[Tensor, Kept | None]:
        if not isinstance(self.dispatch, str):
            dispatch = self.dispatch
        else:
            dispatch = pick_dispatch(routing, self.experts) if self.dispatch == "auto" else DISPATCHES[self.dispatch]()
        if not names:
            return dispatch(rows, routing, self.experts), None
        if not isinstance(dispatch, Dispatch):
            raise UserError(
                "MoE(dispatch=...): a plain function keeps no tensors; derive from Dispatch, or keep nothing"
            )
        return dispatch.keeping(rows, routing, self.experts, names)
