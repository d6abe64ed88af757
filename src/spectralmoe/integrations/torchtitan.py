"""A router of this library by the contract of torchtitan's ``TokenChoiceTopKRouter``: three tensors for its dispatch.

Authors' code: https://github.com/pytorch/torchtitan (BSD 3-clause), ``models/common/moe.py``, of August 2026.
Nothing of it is imported: ``MoE`` calls ``config.router.build()`` and what that returns.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.integrations.guest_router import GuestRouter, read_router_row
from spectralmoe.naming import Table, shown
from spectralmoe.router import Router
from spectralmoe.sharding import assign_

__all__ = ["SpectralRouter"]


class SpectralRouter(GuestRouter):
    """Scorer and selector of a row in the place of torchtitan's router.

    ``record``, ``feed(context=...)``, ``Monitor`` and ``attach`` find the layer under the name of its MoE layer. The
    router adds nothing to a loss: the terms of the row are ``terms``, for ``penalty``.

    Args:
        config: the row and the sizes.

    Raises:
        UserError: what the parts of the row refuse; a row with experts or an optimizer of its own; a selector that may
            leave slots empty. In forward: torchtitan's own selection bias; a choice that is not ``top_k`` experts for
            every token.

    >>> router = SpectralRouter.Config(row="sr-moe", dim=16, num_experts=8, top_k=2).build()
    >>> scores, ids, all_scores = router(torch.randn(5, 16))
    >>> tuple(scores.shape), tuple(ids.shape), tuple(all_scores.shape)
    ((5, 2), (5, 2), (5, 8))
    >>> list(router.terms)
    ['spectral_penalty']
    """

    router: Router

    @dataclass(kw_only=True, slots=True)
    class Config:
        """What ``MoE.Config(router=...)`` takes.

        Args:
            row: scorer, selector and terms as everywhere: a name, a table, or ``pkg:object`` of your own.
            dim: D, the width of the tokens.
            num_experts: E.
            top_k: K, as the token dispatcher has it.
        """

        row: str | Table
        dim: int
        num_experts: int
        top_k: int = 1

        def build(self) -> SpectralRouter:
            """A new router."""
            return SpectralRouter(self)

    def __init__(self, config: Config) -> None:
        super().__init__()
        self.preset, self.config = read_router_row(config.row, "torchtitan"), config
        self.router, self.terms = self._drawn(), dict(self.preset.terms)
        if not self.router.fills:
            raise UserError(
                f"router {shown(config.row)!r}: {type(self.router.selector).__name__} may leave slots empty, but "
                "torchtitan's dispatch takes the same number of experts for every token; name a selector such as "
                "topk or balanced"
            )

    def _drawn(self) -> Router:
        return self.preset.make_router(self.config.dim, self.config.num_experts, k=self.config.top_k)

    @torch.no_grad()
    def init_states(self, **_: Any) -> None:
        """Draw all weights, where they are, as after ``to_empty`` of a model that was built without memory."""
        fresh = self._drawn()
        drawn = dict(chain(fresh.named_parameters(), fresh.named_buffers()))
        for name, tensor in chain(self.router.named_parameters(), self.router.named_buffers()):
            assign_(tensor, drawn[name])

    def forward(self, x_TD: Tensor, expert_bias_E: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Tokens (T, D) -> their combine weights (T, K) with gradient, their experts (T, K) int64, all scores (T, E).

        Args:
            expert_bias_E: None; the loss-free bias here is that of the selector.
        """
        if expert_bias_E is not None:
            raise UserError(
                "SpectralRouter: torchtitan's selection bias is not read; set load_balance_coeff=None, and use the "
                "selector balanced with attach(optimizer, model)"
            )
        record = self.decide(x_TD)
        routing = record.routing
        if not routing.full or routing.indices.shape[1] != self.config.top_k:
            raise UserError(
                f"SpectralRouter: torchtitan's dispatch takes top_k = {self.config.top_k} experts for every token, "
                f"but this choice has {routing.indices.shape[1]} slots or may leave some empty (a mask, a replay)"
            )
        self.leave_record(record)
        return routing.weights, routing.indices, routing.scores
