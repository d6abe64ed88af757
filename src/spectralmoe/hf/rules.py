"""How a Hugging Face router goes on from its logits, and in which form it returns what it decided.

Read by trying: a copy of the router with random weights routes random tokens, and the rule is the one among those
known whose routing is the same. No family is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics.entropy import are_probabilities
from spectralmoe.errors import UserError
from spectralmoe.hf.layers import HFLayer
from spectralmoe.hf.routing import read_returned
from spectralmoe.hf.structure import correction_bias, matrix_name, number_of
from spectralmoe.router import Router
from spectralmoe.routing import EMPTY, Routing
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import Balanced, Selector
from spectralmoe.sharding import assign_
from spectralmoe.spec import build

__all__ = ["Rule", "put_bias", "read_rule"]

_TOKENS, _BIAS = 64, 0.1
_MOST = 0.95  # of the tokens must agree: two logits may lie within rounding of each other
_FORMS = (
    {"logits", "weights", "indices"},
    {"probabilities", "weights", "indices"},
    {"gates", "logits"},
    {"mask", "weights", "logits"},
)


@dataclass(frozen=True, slots=True)
class Rule:
    """What a family's routers do beside scoring.

    Attributes:
        roles: what they return, in order: "logits" or "probabilities" (N, E), "weights" and "indices" (N, K),
            "gates" (N, E), the weights with 0 for what was not chosen, and "mask" (N, E), 1 for the chosen one.
        sequences: whether tokens that come as (B, S, D) are returned so.
        scale: factor of the weights (``routed_scaling_factor``).
        capacity: how many tokens of a sequence an expert takes; 0: all.
    """

    roles: tuple[str, ...]
    sequences: bool
    scale: float = 1.0
    capacity: int = 0

    def limited(self, routing: Routing) -> Routing:
        """``routing`` without the tokens of a sequence that overrun the capacity of their expert, the last ones."""
        if not self.capacity:
            return routing
        members = routing.members().unflatten(0, routing.shape or (-1,))
        late = (members & (members.long().cumsum(-2) > self.capacity)).flatten(0, -2)
        lost = late.gather(1, routing.indices.clamp_min(0)) & (routing.indices >= 0)
        return replace(
            routing,
            indices=routing.indices.masked_fill(lost, EMPTY),
            weights=routing.weights.masked_fill(lost, 0),
            asked=(routing.indices >= 0).sum(),
            full=False,
        )

    def arrange(self, routing: Routing, tokens: Tensor) -> tuple[Tensor, ...]:
        """``routing`` as the stock router returns it for ``tokens`` (N, D) or (B, S, D), weights in their precision."""
        lead = tokens.shape[:-1] if self.sequences else (len(routing.indices),)
        return tuple(self._tensor(role, routing, tokens.dtype).unflatten(0, lead) for role in self.roles)

    def _tensor(self, role: str, routing: Routing, dtype: torch.dtype) -> Tensor:
        match role:
            case "logits":
                return routing.logits
            case "probabilities":
                return routing.logits.softmax(-1)
            case "weights":
                return (routing.weights * self.scale).to(dtype)
            case "indices":
                return routing.indices.clamp_min(0)
            case "gates":
                return (routing.gates() * self.scale).to(dtype)
            case _:
                return routing.members().long()


def put_bias(selector: Selector, bias: Tensor | None) -> None:
    """Give the ``Balanced`` in a bound selector this bias of the choice (E,)."""
    for part in selector.modules():
        if isinstance(part, Balanced) and bias is not None:
            assign_(part.bias, bias.flatten().to(part.bias))


@torch.no_grad()
def read_rule(layer: HFLayer) -> tuple[Rule, dict[str, Any] | None]:
    """The rule of a stock router as its forward shows it, and the spec of its selector; None where that is unknown.

    Raises:
        UserError: it returns something unknown, or needs more than tokens.
    """
    trial = _Trial(layer)
    capacity = number_of((layer.router,), "expert_capacity") or 0
    scale = float(getattr(layer.router, "routed_scaling_factor", 1.0))
    for spec in trial.selectors():
        ratio = trial.ratio(spec)
        if ratio is not None:
            scale = scale if abs(ratio - scale) < 1e-3 * scale else ratio
            return Rule(*trial.form(), scale, capacity), spec
    return Rule(*trial.form(), scale, capacity), None


class _Trial:
    """Random tokens (N, D) through a copy of a stock router with random weights."""

    def __init__(self, layer: HFLayer) -> None:
        self.layer, make = layer, torch.Generator().manual_seed(0)
        self.router = layer.router_copy(torch.float32)
        on_meta = any(tensor.is_meta for tensor in self.router.parameters())
        self.router = self.router.to_empty(device="cpu") if on_meta else self.router.cpu()
        for tensor in (*self.router.parameters(), *self.router.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(_BIAS * torch.rand(tensor.shape, generator=make))
        name = matrix_name(self.router, layer.num_experts)
        if name is None:
            raise UserError(f"{layer.name}: its router has several layers, and no single gate")
        self.matrix = self.router.get_parameter(name)
        self.matrix.copy_(torch.randn(self.matrix.shape, generator=make) * self.matrix.shape[1] ** -0.5)
        self.bias = dict(self.router.named_parameters()).get(f"{name.removesuffix('weight')}bias")
        more = {
            name: _BIAS * torch.rand(value.shape, generator=make) if isinstance(value, Tensor) else value
            for name, value in layer.more_inputs().items()
        }
        given = [value for value in more.values() if isinstance(value, Tensor) and value.numel() == layer.num_experts]
        bias = correction_bias((self.router,), layer.num_experts)
        self.selection_bias = bias if bias is not None else next(iter(given), None)
        self.tokens = torch.randn(_TOKENS, self.matrix.shape[1], generator=make)
        output = layer.call(self.router, self.tokens, more)
        self.output = tuple(output) if isinstance(output, tuple | list) else (output,)
        self.logits = F.linear(self.tokens, self.matrix, self.bias)
        returned = read_returned(self.output, layer.num_experts, lambda: self.logits, layer.top_k)
        if returned is None or {*self.form()[0]} not in _FORMS:
            kinds = ", ".join(f"{tuple(each.shape)}" if isinstance(each, Tensor) else "?" for each in self.output)
            raise UserError(
                f"{layer.name} ({type(layer.layer).__name__}) is of a model family whose routers cannot be swapped: "
                f"they return {kinds}, not logits, weights and indices"
            )
        self.k = returned.indices.shape[1]
        gates = torch.zeros(_TOKENS, layer.num_experts + 1)
        places = torch.where(returned.indices < 0, layer.num_experts, returned.indices)
        self.gates = gates.scatter(1, places, returned.weights)[:, :-1]

    def form(self) -> tuple[tuple[str, ...], bool]:
        """The roles of what was returned, "" for what is unknown, and whether it came in sequences."""
        size, roles = self.layer.num_experts, []
        chosen = any(not part.is_floating_point() for part in self.output)
        wide = [part for part in self.output if part.is_floating_point() and part.shape[-1] == size]
        nearest = min(
            wide, key=lambda part: float((part.reshape_as(self.logits) - self.logits).abs().max()), default=None
        )
        for part in self.output:
            if not part.is_floating_point():
                roles.append("mask" if part.shape[-1] == size != self.layer.top_k else "indices")
            elif nearest is not None and part is nearest:
                roles.append("probabilities" if are_probabilities(part.flatten(0, -2)) else "logits")
            else:
                roles.append("weights" if chosen else "gates")
        return tuple(roles), self.output[0].dim() == 3

    def selectors(self) -> Iterator[dict[str, Any]]:
        """The specs of the choices and weights that are known."""
        groups, groups_on = self.layer.groups
        for score in ("softmax", "sigmoid"):
            for normalize in (False, True) if self.k > 1 else (False,):
                kind = "topk" if self.selection_bias is None else "balanced"
                plain = {"type": kind, "k": self.k, "score": score, "normalize": normalize}
                if groups_on == groups:
                    yield plain
                for counted in (2, 1) if groups_on < groups else ():
                    limit = {"groups": groups, "groups_on": groups_on, "counted": counted}
                    yield {"type": "group_limited", "selector": plain, **limit}

    def ratio(self, spec: dict[str, Any]) -> float | None:
        """By what the weights of this selector must be multiplied to be those returned; None where they differ."""
        with torch.random.fork_rng(devices=[]):
            scorer = LinearScorer(*reversed(self.matrix.shape), bias=self.bias is not None)
        try:
            router = Router(scorer, build(spec))
        except UserError:
            return None
        scorer.weight.copy_(self.matrix)
        if scorer.bias is not None and self.bias is not None:
            scorer.bias.copy_(self.bias)
        put_bias(router.selector, self.selection_bias)
        gates = router(self.tokens).gates()
        ratio = float(self.gates.sum() / gates.sum())
        agree = (gates * ratio - self.gates).abs().amax(-1) < 1e-3 * self.gates.amax(-1)
        return ratio if float(agree.float().mean()) >= _MOST else None
