"""Swapped routers turned into stock gates, so that other engines serve the model."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.hf.language import batch_arguments
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.routers.fit import Agreement, fit_scorer
from spectralmoe.hf.routers.gates import gate_of, start_from_gate
from spectralmoe.hf.routers.places import refuse_adapters, refuse_placed, stock_layers, swapped_routers, take_out
from spectralmoe.hf.routers.rules import Rule, put_bias, read_rule
from spectralmoe.hf.structure import correction_bias, matrix_name
from spectralmoe.layers import moe_layers, unwrapped
from spectralmoe.router import Router
from spectralmoe.scorers import LinearScorer
from spectralmoe.selectors import Balanced, Selector
from spectralmoe.sharding import assign_, full
from spectralmoe.spec import build, describe
from spectralmoe.tape import Tape

__all__ = ["distill_to_gate", "fold_routers"]


def fold_routers(model: nn.Module) -> None:
    """Write swapped routers into the stock gates, and put the gates back: the model is one of its family again.

    A linear scorer becomes the matrix (and bias) of the gate, the bias of ``Balanced`` the family's correction bias:
    the model computes what it did, up to the precision of the gate's weights, and ``save_pretrained`` writes a
    checkpoint that every engine of the family serves. Nothing is done unless all layers can be folded.

    Raises:
        UserError: no router was swapped; one that no gate of the family equals: another scorer, another selector than
            the family's own (``distill_to_gate`` takes those to the nearest gate); adapters of PEFT; copies of experts.
    """
    stock = unwrapped(model)
    refuse_adapters("fold_routers", stock)
    refuse_placed("fold_routers", swapped_routers(stock))
    routers = {name: swapped.router for name, swapped in swapped_routers(stock).items()}
    with stock_layers(stock) as layers:
        for name, router in routers.items():
            if obstacle := _obstacle(router, layers[name], *read_rule(layers[name])):
                raise UserError(f"fold_routers: {name} {obstacle}; use distill_to_gate(model, batches)")
        for name, router in routers.items():
            _write(layers[name], router)
    take_out(stock, swapped_routers(stock).values())


def distill_to_gate(model: nn.Module, batches: Iterable[Any], *, steps: int = 300) -> dict[str, Agreement]:
    """Replace each swapped router by the linear gate that comes nearest to it on ``batches``, and fold that.

    A gate is fitted to the logits of the router for the tokens that reach it (``fit_scorer``), under the choice and the
    weights of the family. A router that ``fold_routers`` can fold is folded exactly.

    Args:
        batches: inputs of the model: token ids (B, S), or tables of arguments. The model is run on them once.
        steps: of the fit of a layer, at most.

    Returns:
        Layer -> the share of the tokens that get the same experts from the gate as from the router: the gate before the
        swap, and the one that is there now.

    Raises:
        UserError: no router was swapped; a batch of another kind, or none; a router that reads more than tokens; a
            family whose routers are no linear gates, or choose by an unknown rule; adapters of PEFT.

    >>> from spectralmoe.hf import swap_routers
    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(4, 8))
    ...
    ...     def forward(self, x):
    ...         logits = x @ self.weight.T
    ...         return logits, *logits.softmax(-1).topk(2)
    >>> class Model(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         experts = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))
    ...         self.layers = nn.ModuleList([nn.ModuleDict({"gate": Gate(), "experts": experts})])
    ...
    ...     def forward(self, inputs_embeds):
    ...         return self.layers[0]["gate"](inputs_embeds)
    >>> _ = torch.manual_seed(0)
    >>> model = Model()
    >>> _ = swap_routers(model, "cosine", init="fresh")
    >>> agreements = distill_to_gate(model, [{"inputs_embeds": torch.randn(300, 8)}])
    >>> agreements["layers.0"].after > 0.9 > agreements["layers.0"].before, type(model.layers[0]["gate"]).__name__
    (True, 'Gate')
    """
    stock = unwrapped(model)
    refuse_adapters("distill_to_gate", stock)
    refuse_placed("distill_to_gate", swapped_routers(stock))
    routers = {name: swapped.router for name, swapped in swapped_routers(stock).items()}
    for name, router in routers.items():
        if reads := [each for part in (router.scorer, router.selector) for each in part.reads]:
            raise UserError(
                f"distill_to_gate: the router of {name} reads {reads[0]!r}, which no gate does; swap in one "
                "that reads the token alone"
            )
    tokens = _tokens(stock, batches)
    students, agreements = {}, {}
    with stock_layers(stock) as layers:
        for name, layer in layers.items():
            (rule, spec), router = read_rule(layer), routers[name]
            if spec is None or not rule.affine:
                raise UserError(
                    f"distill_to_gate: the stock router of {name} is no linear gate with a choice known here"
                )
            student = _gate_router(layer, spec, router)
            before, after = _agreement(router, student, tokens[name]), 1.0
            if _obstacle(router, layer, rule, spec):
                fit_scorer(student.scorer, tokens[name], _logits(router, tokens[name]), student.selector, steps=steps)
                students[name], after = student, _agreement(router, student, tokens[name])
            agreements[name] = Agreement(before, after)
    for name, swapped in swapped_routers(stock).items():
        swapped.router = students.get(name, swapped.router)
    fold_routers(stock)
    return agreements


def _obstacle(router: Router, layer: HFLayer, rule: Rule, spec: dict[str, Any] | None) -> str | None:
    """Why no gate of the family is this router; None where one is. ``spec`` describes the family's selector."""
    scorer, selector = router.scorer, router.selector
    if not rule.affine:
        return f"had a {type(layer.router).__name__}, whose logits are not those of one matrix"
    if type(scorer) is not LinearScorer:
        return f"scores by {type(scorer).__name__}, which is no stock gate"
    if scorer.bias is not None and gate_of(layer).bias is None and bool(full(scorer.bias).any()):
        return "has a bias, which its stock gate has not"
    if spec is None or _choice(describe(selector)) != _choice(describe(build(spec))):
        return f"chooses by {type(selector).__name__} and not by the family's own rule"
    return None


def _choice(spec: Any) -> Any:
    """The description of a selector without what moves in training alone."""
    if not isinstance(spec, dict):
        return spec
    return {name: _choice(value) for name, value in spec.items() if name != "rate"}


def _write(layer: HFLayer, router: Router) -> None:
    """Give the stock router of ``layer`` the matrix, the bias and the selection bias of ``router``."""
    name, parameters = matrix_name(layer.router, layer.num_experts) or "", dict(layer.router.named_parameters())
    bias = parameters.get(f"{name.removesuffix('weight')}bias")
    scorer = router.scorer
    assert isinstance(scorer, LinearScorer)
    _put(parameters[name], scorer.weight)
    if bias is not None:
        _put(bias, torch.zeros_like(bias) if scorer.bias is None else scorer.bias)
    for part in router.selector.modules():
        stored = correction_bias((layer.router, layer.layer), layer.num_experts)
        if isinstance(part, Balanced) and stored is not None:
            _put(stored, part.bias)


@torch.no_grad()
def _put(stored: Tensor, value: Tensor) -> None:
    assign_(stored, full(value).detach().view(stored.shape).to(stored.dtype))


@torch.no_grad()
def _tokens(model: nn.Module, batches: Iterable[Any]) -> dict[str, Tensor]:
    """Layer -> the tokens (N, D) that its swapped router read in one run over ``batches``, without padding."""
    parts: dict[str, list[Tensor]] = {}
    with evaluation_mode(model):
        for batch in batches:
            with Tape(moe_layers(model), keep=("tokens",)) as tape:
                model(**batch_arguments("distill_to_gate", model, batch))
            for item in tape:
                if (tokens := item.tokens) is not None:
                    mask = item.routing.mask
                    parts.setdefault(item.name, []).append(tokens if mask is None else tokens[mask])
    if not parts:
        raise UserError("distill_to_gate: there are no batches; give token ids (B, S), or tables of arguments")
    return {name: torch.cat(tokens) for name, tokens in parts.items()}


def _gate_router(layer: HFLayer, spec: dict[str, Any], router: Router) -> Router:
    """A router of the family's form that starts as the stock gate, with the selection bias that ``router`` has."""
    gate = gate_of(layer)
    scorer = LinearScorer(gate.weight.shape[1], len(gate.weight), bias=gate.bias is not None)
    start_from_gate(scorer, gate)
    selector: Selector = build(spec)
    student = Router(scorer, selector).to(gate.weight.device).eval()
    biases = [part.bias for part in router.selector.modules() if isinstance(part, Balanced)]
    put_bias(selector, biases[0] if biases else None)
    return student


@torch.no_grad()
def _logits(router: Router, tokens: Tensor) -> Tensor:
    logits: Tensor = router(tokens).logits
    return logits


@torch.no_grad()
def _agreement(one: Router, other: Router, tokens: Tensor) -> float:
    """The share of the tokens (N, D) that both routers give the same experts, in evaluation."""
    with evaluation_mode(one):
        same = (one(tokens).members() == other(tokens).members()).all(-1)
    return float(same.double().mean())
