"""How a Hugging Face router makes choice and weights from its logits, and in which form it returns them.

The rule is found by trying: a copy of the router with random weights routes random tokens, and the known rule with the
same routing is taken. No family is named.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from spectralmoe.diagnostics.entropy import are_probabilities
from spectralmoe.errors import UserError
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.routers.gates import Gate, gate_of
from spectralmoe.hf.routing import Returned, read_returned
from spectralmoe.hf.scores import real_logits
from spectralmoe.hf.structure import correction_bias, matrix_name, number_of
from spectralmoe.routing import EMPTY, Routing
from spectralmoe.selectors import Balanced, Selector
from spectralmoe.sharding import assign_
from spectralmoe.spec import build

__all__ = ["Rule", "put_bias", "read_rule"]

_TOKENS, _BIAS, _NEAR = 64, 0.1, 1e-3
_MOST = 0.95  # of the tokens must agree: two logits may lie within rounding of each other
_FORMS = (
    {"logits", "weights", "indices"},
    {"probabilities", "weights", "indices"},
    {"gates", "logits"},
    {"mask", "weights", "logits"},
)


@dataclass(frozen=True, slots=True)
class Rule:
    """The steps of a family's routers after the logits.

    Attributes:
        roles: what they return, in order: "logits" or "probabilities" (N, E), "weights" and "indices" (N, K),
            "gates" (N, E), the weights with 0 for what was not chosen, and "mask" (N, E), 1 for the chosen one.
        sequences: whether tokens that come as (B, S, D) are returned so.
        scale: factor of the weights (``routed_scaling_factor``).
        capacity: how many tokens of a sequence an expert takes; 0: all.
        affine: whether their logits are those of one matrix, and a bias.
    """

    roles: tuple[str, ...]
    sequences: bool
    scale: float = 1.0
    capacity: int = 0
    affine: bool = True

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
    trial = _try(layer)
    capacity = number_of((layer.router,), "expert_capacity") or 0
    scale = float(getattr(layer.router, "routed_scaling_factor", 1.0))
    known = ((spec, ratio) for spec in _selectors(layer, trial) if (ratio := trial.ratio(spec)) is not None)
    spec, ratio = next(known, (None, scale))
    scale = scale if abs(ratio - scale) < _NEAR * scale else ratio
    return Rule(trial.roles, trial.output[0].dim() == 3, scale, capacity, trial.is_affine), spec


@dataclass(frozen=True, slots=True)
class _Trial:
    """Random tokens through a copy of a stock router with random weights.

    Attributes:
        tokens: (N, D).
        gate: of the copy.
        bias: its selection bias (E,); None without.
        output: what it returned.
        roles: of the parts of the output.
        returned: the output by role.
    """

    tokens: Tensor
    gate: Gate
    bias: Tensor | None
    output: tuple[Tensor, ...]
    roles: tuple[str, ...]
    returned: Returned

    @property
    def logits(self) -> Tensor:
        """The real logits (N, E) that it returned, up to a shift of each token."""
        return real_logits(self.returned.logits, "probabilities" in self.roles)

    @property
    def is_affine(self) -> bool:
        """Whether the logits are those of the gate, up to a shift of each token."""
        gates = F.linear(self.tokens, self.gate.weight, self.gate.bias)
        off = (self.logits - self.logits.mean(-1, keepdim=True)) - (gates - gates.mean(-1, keepdim=True))
        return bool(off.abs().max() < _NEAR * gates.abs().max())

    def ratio(self, spec: dict[str, Any]) -> float | None:
        """By what the weights of this selector must be multiplied to be those returned; None where they differ."""
        try:
            selector: Selector = build(spec)
            selector.bind(len(self.gate.weight))
        except UserError:  # it cannot be for these sizes
            return None
        put_bias(selector, self.bias)
        logits, indices = self.logits, selector.choose(self.logits)
        ours = Routing(logits, selector.weigh(logits, indices), indices).gates()
        theirs = Routing(logits, self.returned.weights, self.returned.indices).gates()
        ratio = float(theirs.sum() / ours.sum())
        agree = (ours * ratio - theirs).abs().amax(-1) < _NEAR * theirs.amax(-1)
        return ratio if float(agree.float().mean()) >= _MOST else None


def _try(layer: HFLayer) -> _Trial:
    """Try the router of ``layer``."""
    make = torch.Generator().manual_seed(0)
    router = _random_copy(layer, make)
    gate = gate_of(layer, router)
    more = {
        name: _BIAS * torch.rand(value.shape, generator=make) if isinstance(value, Tensor) else value
        for name, value in layer.more_inputs().items()
    }
    given = [value for value in more.values() if isinstance(value, Tensor) and value.numel() == layer.num_experts]
    bias = correction_bias((router,), layer.num_experts)
    tokens = torch.randn(_TOKENS, gate.weight.shape[1], generator=make)
    output = layer.call(router, tokens, more)
    parts = tuple(output) if isinstance(output, tuple | list) else (output,)
    logits = F.linear(tokens, gate.weight, gate.bias)
    returned = read_returned(parts, layer.num_experts, lambda: logits, layer.top_k)
    roles = _roles(parts, logits, layer.top_k)
    if returned is None or {*roles} not in _FORMS:
        kinds = ", ".join(f"{tuple(each.shape)}" if isinstance(each, Tensor) else type(each).__name__ for each in parts)
        raise UserError(
            f"{layer.name} ({type(layer.layer).__name__}) is of a model family whose routers cannot be swapped: they "
            f"return {kinds}, not logits, weights and indices"
        )
    return _Trial(tokens, gate, bias if bias is not None else next(iter(given), None), parts, roles, returned)


def _random_copy(layer: HFLayer, make: torch.Generator) -> nn.Module:
    """A copy of the router with other weights, on the CPU: logits of unit variance, small biases."""
    router = layer.router_copy(torch.float32)
    on_meta = any(tensor.is_meta for tensor in router.parameters())
    router = router.to_empty(device="cpu") if on_meta else router.cpu()
    matrix = matrix_name(router, layer.num_experts)
    for name, tensor in (*router.named_parameters(), *router.named_buffers()):
        if name == matrix:
            tensor.copy_(torch.randn(tensor.shape, generator=make) * tensor.shape[1] ** -0.5)
        elif tensor.is_floating_point():
            tensor.copy_(_BIAS * torch.rand(tensor.shape, generator=make))
    return router


def _roles(parts: tuple[Any, ...], logits: Tensor, k: int | None) -> tuple[str, ...]:
    """The roles of what a router returned, "" for what is unknown; ``logits`` (N, E) are those of its gate."""
    if not all(isinstance(part, Tensor) for part in parts):
        return ("",)
    size, roles = logits.shape[1], []
    floats = [part for part in parts if part.is_floating_point()]
    wide = [part for part in floats if part.numel() == logits.numel() and part.shape[-1] == size]
    off = [float((part.reshape_as(logits) - logits).abs().max()) for part in wide]
    nearest = wide[off.index(min(off))] if wide else None
    for part in parts:
        if not part.is_floating_point():
            roles.append("mask" if part.shape[-1] == size != k else "indices")
        elif nearest is not None and part is nearest:
            roles.append("probabilities" if are_probabilities(part.reshape_as(logits)) else "logits")
        else:
            roles.append("weights" if len(floats) < len(parts) else "gates")
    return tuple(roles)


def _selectors(layer: HFLayer, trial: _Trial) -> Iterator[dict[str, Any]]:
    """The specs of the choices and weights that are known."""
    k, (groups, groups_on) = trial.returned.indices.shape[1], layer.groups
    kind = "topk" if trial.bias is None else "balanced"
    for score in ("softmax", "sigmoid"):
        for normalize in (False, True) if k > 1 else (False,):
            plain = {"type": kind, "k": k, "score": score, "normalize": normalize}
            if groups_on == groups:
                yield plain
            for counted in (2, 1) if groups_on < groups else ():
                limit = {"groups": groups, "groups_on": groups_on, "counted": counted}
                yield {"type": "group_limited", "selector": plain, **limit}
