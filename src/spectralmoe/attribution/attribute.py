"""``attribute_experts``: it measures what each expert, neuron or layer adds to the log-probability of a token."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor, nn

from spectralmoe.attribution.frozen import Readout
from spectralmoe.attribution.neurons import expert_part, neuron_parts
from spectralmoe.attribution.stream import Stream, find_norm, find_unembed, slack
from spectralmoe.attribution.table import NONE, Level, Table, joined
from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.diagnostics.watch import OwnLayer, Seen, Watched, watch
from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.routers.swapped import SwappedLayer
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.layers import moe_layers, stock_experts, unwrapped
from spectralmoe.moe import MoE
from spectralmoe.sharding import is_sharded

__all__ = ["attribute_experts"]


@torch.no_grad()
def attribute_experts(
    model: nn.Module,
    tokens: Tensor,
    target: int | Tensor,
    *,
    unembed: Callable[[Tensor], Tensor] | None = None,
    norm: nn.Module | None = None,
    level: Level = "expert",
) -> Table:
    r"""Measure what each expert adds to the log-probability of the token t that follows a text.

    .. math:: I_j = \log p(t \mid u + g_j E_j(x)) - \log p(t \mid u)

    u is the residual stream in front of the layer at the last token, x the layer's input there, and g the combine
    weight of the forward. :math:`p(\cdot \mid v) = \mathrm{softmax}(U\,\mathrm{norm}(v))`, where the final norm keeps
    the statistics that it had in the forward. At level "neuron", hidden unit q has :math:`g_j a_q W_2[:, q]` in place
    of :math:`g_j E_j(x)`; at level "layer", a layer has all that it adds. What a layer adds beside its routed experts
    is a row of its own, expert -1.

    The gains :math:`I_j` do not add up, because the softmax is not linear, and an expert that is used often gains more
    often. Compare them with what ``block`` changes.

    The model runs once in evaluation mode and is not changed; inside ``block`` the blocked experts are left out. Layers
    whose experts read more than tokens, models with an encoder, sharded models and replayed choices are refused.

    Args:
        model: a ``LanguageMoE``, a causal Hugging Face model, or another model whose blocks add the output of an MoE
            layer to the residual stream.
        tokens: ids (S,), or (B, S) without padding.
        target: t, the id of the next token, one for each sequence.
        unembed: U, a function from normed vectors (R, D) to logits (R, V); None takes the model's own head.
        norm: the final norm, a module of the model; None takes the one beside its layers.
        level: what a row of the table is, "expert", "neuron" or "layer".

    Returns:
        A table with one row for each expert (neuron, layer) of each sequence.

    Raises:
        UserError: the model has no MoE layer, or is sharded; ``feed`` replays its choices; the target is not in the
            vocabulary; the tokens have another shape; a block does not simply add the layer's output; the logits are
            not those of ``unembed`` and ``norm``; or the level is "neuron" and the experts have no hidden layer.

    >>> from spectralmoe.models import language_moe
    >>> model = language_moe(256, width=32, depth=2, num_experts=4, hidden=16)
    >>> table = attribute_experts(model, torch.tensor([72, 101, 108]), target=108)
    >>> len(table), sorted(table.rows(1)[0])  # two layers, two experts each
    (4, ['expert', 'gain', 'layer', 'weight'])
    """
    if level not in get_args(Level):
        raise one_of("level", level, get_args(Level))
    inside, (ids, wanted) = unwrapped(model), _ids(tokens, target)
    _refuse_elsewhere(inside)
    with _watched(inside) as seen:
        stream = Stream(inside, seen.layers, find_norm(inside, seen.layers) if norm is None else norm)
        head = find_unembed(inside) if unembed is None else unembed
        with evaluation_mode(inside), stream.open():
            output = _run(model, inside, ids)
        calls = seen.drain()
    if stream.final is None:
        raise UserError("attribute_experts: norm= did not run in the model's forward; give its own final norm")
    readout = Readout(stream.norm, head, stream.final, wanted.to(stream.final.device))
    _check(readout, output)
    names = tuple(call.layer.name for call in calls)
    rows = [
        row for place, call in enumerate(calls) for row in _gains(_Layer.of(call, stream, ids), readout, level, place)
    ]
    return joined(level, names, readout.log_prob, rows)


def _ids(tokens: Tensor, target: int | Tensor) -> tuple[Tensor, Tensor]:
    """The ids (B, S) and the targets (B,)."""
    for value in (tokens, torch.tensor(target) if isinstance(target, int) else target):
        if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
            kind = f"{value.dtype}" if isinstance(value, Tensor) else type(value).__name__
            raise UserError(f"attribute_experts: ids and targets are whole numbers in a tensor, got {kind}")
    ids = tokens[None] if tokens.dim() == 1 else tokens
    wanted = torch.as_tensor(target, device=ids.device).reshape(-1).long()
    if ids.dim() != 2 or not ids.numel() or len(wanted) != len(ids):
        raise UserError(
            f"attribute_experts: takes ids (S,) or (B, S) and a target for each sequence, got {[*tokens.shape]} and "
            f"{len(wanted)}"
        )
    return ids, wanted


def _refuse_elsewhere(model: nn.Module) -> None:
    """Refuse a model that is sharded over processes, or whose choices are replayed."""
    sharded = next((name for name, parameter in model.named_parameters() if is_sharded(parameter)), None)
    if sharded is not None:
        raise UserError(
            f"attribute_experts: {sharded} is sharded over several processes, and every expert is needed here; take "
            "the whole model, from before it was sharded or as it was saved"
        )
    for name, layer in {} if stock_experts(model) else moe_layers(model).items():
        fed = layer.here.fed
        if fed is not None and fed.replay:
            raise UserError(
                f"attribute_experts: {name} replays choices (feed), but gains are those of the experts that the router "
                "chooses itself; call it outside of feed(replay=...) and feed(indices=...)"
            )


def _watched(model: nn.Module) -> Any:
    """A watch on a model of either kind."""
    if not stock_experts(model) and all(isinstance(layer, MoE) for layer in moe_layers(model).values()):
        return watch(model)
    return watch_transformers(model)


def _run(model: nn.Module, inside: nn.Module, ids: Tensor) -> Any:
    known = inspect.signature(inside.forward).parameters
    if getattr(getattr(inside, "config", None), "is_encoder_decoder", False):
        raise UserError(f"attribute_experts: {type(inside).__name__} has an encoder; it takes causal models")
    options = {name: value for name, value in {"use_cache": False, "logits_to_keep": 1}.items() if name in known}
    return model(input_ids=ids, **options) if "input_ids" in known else model(ids, **options)


def _check(readout: Readout, output: Any) -> None:
    """Refuse a readout whose logits are not the model's, where it shows them."""
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor) or logits.dim() != 3 or logits.shape[-1] != readout.vocabulary:
        return
    rounding = 1e-3 + slack(logits.dtype) * float(logits[:, -1].abs().max())
    own = logits[:, -1].to(readout.log_prob).log_softmax(-1).gather(1, readout.target[:, None]).squeeze(1)
    if not (own - readout.log_prob).abs().max() <= rounding:
        raise UserError(
            "attribute_experts: the model's logits are not those of its head on the normed stream (a scale or a cap?); "
            "give unembed=, a function of normed vectors (R, D) that makes them"
        )


@dataclass(frozen=True, slots=True)
class _Layer:
    """One layer at the last token of each sequence.

    Attributes:
        x: what router and experts read (B, D).
        weights, indices: (B, K).
        before: the stream in front of it (B, D).
        output: what it added (B, D).
        shared: whether it has a part beside the routed experts.
    """

    layer: Watched
    x: Tensor
    weights: Tensor
    indices: Tensor
    before: Tensor
    output: Tensor
    shared: bool

    @staticmethod
    def of(call: Seen, stream: Stream, ids: Tensor) -> _Layer:
        routing, layer, (sequences, length) = call.routing, call.layer, ids.shape
        if len(call.tokens) != ids.numel() or layer.name not in stream.added:
            raise UserError(f"attribute_experts: the experts of {layer.name} read more than the tokens of the text")
        at = torch.arange(1, sequences + 1, device=call.tokens.device) * length - 1
        added = stream.added[layer.name]
        scale = layer.router.rule.scale if isinstance(layer, SwappedLayer) else 1.0  # which its records leave out
        weights, indices = scale * routing.weights[at], routing.indices[at]
        return _Layer(layer, call.tokens[at], weights, indices, added.before, added.output, _has_shared(layer))

    def served(self) -> Iterator[tuple[int, Tensor, Tensor]]:
        """Iterate over the experts that were chosen: the number of the expert, its tokens, and their slots."""
        for e in self.indices[self.indices >= 0].unique().tolist():
            tokens, slots = (self.indices == e).nonzero(as_tuple=True)
            yield e, tokens, slots


def _has_shared(layer: Watched) -> bool:
    if isinstance(layer, OwnLayer):
        return layer.layer.shared is not None
    assert isinstance(layer, HFLayer)
    routed = {id(value) for part in (layer.experts, layer.router) for value in part.parameters()}
    return any(id(value) not in routed for value in layer.layer.parameters())


def _gains(found: _Layer, readout: Readout, level: Level, place: int) -> Iterator[dict[str, Tensor]]:
    """The rows of one layer, in pieces."""
    every = torch.arange(len(found.x), device=found.x.device)
    base = readout(found.before, every)

    def piece(tokens: Tensor, vectors: Tensor, weight: Tensor, expert: int, neuron: Tensor) -> dict[str, Tensor]:
        gain = readout(found.before[tokens] + vectors.to(found.before), tokens) - base[tokens]
        layer, number = torch.full_like(tokens, place), torch.full_like(tokens, expert)
        return {"sequence": tokens, "layer": layer, "expert": number, "neuron": neuron, "weight": weight, "gain": gain}

    none, ones = torch.full_like(every, NONE), torch.ones_like(base)
    if level == "layer":
        yield piece(every, found.output, ones, NONE, none)
        return
    rest = found.output.clone()
    for e, tokens, slots in found.served():
        x, weight = found.x[tokens], found.weights[tokens, slots]
        whole = expert_part(found.layer, x, weight, e)
        rest.index_add_(0, tokens, -whole.to(rest))
        if level == "expert":
            yield piece(tokens, whole, weight.to(base), e, none[tokens])
            continue
        for row, token in enumerate(tokens):
            parts = neuron_parts(found.layer, x[row, None], weight[row, None], e)[0]
            neuron = torch.arange(len(parts), device=x.device)
            yield piece(token.expand(len(parts)), parts, weight[row].to(base).expand(len(parts)), e, neuron)
    if found.shared:
        yield piece(every, rest, ones, NONE, none)
    elif rest.abs().max() > 10 * slack(found.x.dtype) * found.output.abs().max() + 1e-9:
        raise UserError(
            f"attribute_experts: the experts of {found.layer.name} do not add up to what the layer adds; it scales "
            "them, or does more than they do"
        )
