"""A router of this library inside the MoE layers of Megatron-core, written against its interface of 0.16.1.

Authors' code: https://github.com/NVIDIA/Megatron-LM (Apache 2.0), ``megatron/core/transformer/moe``.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.integrations.guest_router import GuestRouter, read_router_row
from spectralmoe.naming import Table
from spectralmoe.router import Router
from spectralmoe.routing import Routing
from spectralmoe.rows import Preset
from spectralmoe.tape import Record
from spectralmoe.terms import Term

try:
    from megatron.core.transformer.module import MegatronModule
    from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, save_to_aux_losses_tracker
except ImportError as error:
    raise UserError("this needs Megatron-core; install it with 'pip install spectralmoe[megatron]'") from error

__all__ = ["SpectralRouter"]

_INSTEAD = {
    "moe_aux_loss_coeff": "a term, {terms = {load_balance = 0.01}}",
    "moe_z_loss_coeff": "a term, {terms = {router_z = 0.001}}",
    "moe_input_jitter_eps": "the selector noisy_topk",
    "moe_router_enable_expert_bias": "the selector balanced, with attach(optimizer, model)",
    "moe_router_num_groups": "the selector group_limited",
    "moe_expert_capacity_factor": "the selector capacity",
    "moe_enable_routing_replay": "feed(model, replay=tape)",
    "moe_router_force_load_balancing": "Megatron's own router, for its benchmark",
}
"""What a config may ask of Megatron's router alone, and what stands in its place here."""


class SpectralRouter(MegatronModule, GuestRouter):  # type: ignore[misc]
    r"""Scorer and selector of a row in the place of Megatron's ``TopKRouter``.

    It goes into the spec of a layer, and everything else stays Megatron's: experts, dispatch, parallelism::

        spec = get_moe_module_spec(use_te=True, num_experts=64)
        spec.submodules.router = SpectralRouter.configure("sr-moe")

    Each layer adds its terms, :math:`\sum_j w_j f_j / P` over P ranks of its tensor and context parallel group, to the
    gradient through Megatron's ``MoEAuxLossAutoScaler``, in training, where its own auxiliary losses are added and with
    the same scale. Each layer computes its terms by itself and layers add up, whatever ``Term.reduce`` says. A term of
    the statistics of a batch (``load_balance``) reads the tokens of its rank. Megatron's tracker of auxiliary losses
    has the unweighted values, under the names of the terms.

    Padding (True in the padding mask) gets no expert: its output is 0. An empty slot (threshold, capacity) has no entry
    in the routing map. Parameters stay fp32 in a bf16 model, and so do the weights that are returned, as under
    ``moe_router_dtype="fp32"``.

    ``record``, ``feed``, ``Monitor`` and ``attach`` find the layer under the name of its MoE layer. Under pipeline
    parallelism the stages hold different layers, so selection biases are summed over
    ``group=get_tensor_and_data_parallel_group(with_context_parallel=True)``.

    Args:
        config: the ``TransformerConfig``; ``hidden_size`` is D, ``num_moe_experts`` E, ``moe_router_topk`` k.
        pg_collection: the process groups, as ``MoELayer`` hands them on.
        is_mtp_layer: later versions pass it; nothing depends on it.
        preset: what ``configure`` read.

    Raises:
        UserError: what the parts of the row refuse; a setting of ``config`` that only Megatron's own router follows; a
            term that needs more than the router of one layer. In forward: a slot that is empty, or may be, where the
            dispatcher needs exactly k experts a token.
    """

    config: Any
    router: Router

    def __init__(self, config: Any, pg_collection: Any, is_mtp_layer: bool = False, *, preset: Preset) -> None:
        super().__init__(config)  # type: ignore[call-arg]
        _refuse_orders(config)
        self.router = preset.make_router(config.hidden_size, config.num_moe_experts, k=config.moe_router_topk)
        self.terms = {name: _of_a_router(name, term) for name, term in preset.terms.items()}
        self.layer_number: int | None = None
        self.tp_group, self.tp_cp_group = pg_collection.tp, pg_collection.tp_cp
        self.tp_dp_cp_group = pg_collection.tp_dp_cp
        for parameter in self.router.parameters():
            parameter.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    @classmethod
    def configure(cls, row: str | Table) -> Callable[..., SpectralRouter]:
        """What goes into a spec as ``MoESubmodules.router``.

        Args:
            row: scorer, selector and terms as everywhere: a name (``"sr-moe"``), a table (``{"scorer": "cosine",
                "selector": "topp", "p": 0.7, "terms": {"load_balance": 0.01}}``), or ``pkg:object`` of your own.

        Raises:
            UserError: as ``find_preset``; a row with experts or an optimizer of its own.
        """
        return partial(cls, preset=read_router_row(row, "Megatron"))

    def set_layer_number(self, layer_number: int) -> None:
        """The layer's number in the whole model, from 1."""
        self.layer_number = layer_number

    def forward(self, input: Tensor, padding_mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Tokens (S, B, D) -> the combine weights (N, E) with gradient, and which expert serves which token (N, E).

        Args:
            padding_mask: (S, B) bool, True for padding.
        """
        keep = tuple(name for term in self.terms.values() for name in term.keeps)
        record = self.decide(input, None if padding_mask is None else ~padding_mask.bool(), keep=keep)
        self._check_slots(record.routing)
        self.leave_record(record)
        probs, scale = record.routing.gates(), self.config.moe_router_topk_scaling_factor
        probs = probs if scale is None else probs * scale
        if self.terms and self.training and torch.is_grad_enabled():
            probs = MoEAuxLossAutoScaler.apply(probs, self._penalty(record))
        return probs, record.routing.members()

    def _check_slots(self, routing: Routing) -> None:
        config = self.config
        dispatcher, fused = config.moe_token_dispatcher_type, config.moe_permute_fusion
        counts_on_k = dispatcher == "flex" or (dispatcher == "alltoall" and fused)
        if counts_on_k and not (routing.full and routing.indices.shape[1] == config.moe_router_topk):
            raise UserError(
                f"SpectralRouter: the dispatcher {dispatcher!r}{' with moe_permute_fusion' if fused else ''} counts on "
                f"k = {config.moe_router_topk} experts for every token; take a selector that fills k slots, without "
                "padding mask or replay, or moe_token_dispatcher_type='alltoall' with moe_permute_fusion=False"
            )

    def _penalty(self, record: Record) -> Tensor:
        """The terms' weighted sum, as this rank's share of it, in the scale of Megatron's own losses."""
        total = record.routing.logits.new_zeros(())
        layers = self.config.num_layers + (self.config.mtp_num_layers or 0)
        for name, term in self.terms.items():
            value = term.fn(record)
            if term.weight and self.trains_router and not value.requires_grad:
                raise UserError(f"term {name!r} has no gradient, so that it would change nothing; leave it out")
            save_to_aux_losses_tracker(name, value, self.layer_number, layers, avg_group=self.tp_dp_cp_group)
            total = total + term.weight * value.to(total)  # type: ignore[operator]
        share: Tensor = total / self.tp_cp_group.size()
        if not self.config.calculate_per_token_loss:
            return share
        mask = record.routing.mask
        return share * (len(record.routing.logits) if mask is None else mask.sum())


def _refuse_orders(config: Any) -> None:
    """Refuse settings that only Megatron's own router would follow."""
    for name, instead in _INSTEAD.items():
        value = getattr(config, name, None)
        if any(value) if isinstance(value, list | tuple) else value:
            raise UserError(
                f"SpectralRouter: {name}={value} is an order to Megatron's own router; here it is {instead}"
            )
    if "sinkhorn" in config.moe_router_load_balancing_type:
        raise UserError(
            "SpectralRouter: moe_router_load_balancing_type='sinkhorn' is a way to choose of Megatron's own router; "
            "say 'none', and name a selector"
        )


def _of_a_router(name: str, term: Term) -> Term:
    """``term``, if the router of one layer can give it all that it needs."""
    wants = [f"the tensor {kept!r} of the experts" for kept in term.keeps if kept != "tokens"]
    wants += ["the records of all layers"] if term.scope == "model" else []
    wants += [f"layers={term.layers!r}"] if term.layers != "*" else []
    wants += ["the number of the step"] if callable(term.weight) else []
    if wants:
        raise UserError(
            f"SpectralRouter: term {name!r} wants {wants[0]}, which the router of one layer does not know; leave it out"
        )
    return term
