"""Routers of this library in a Hugging Face model: ``swap_routers``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from typing import Any, Literal

import torch
from torch import Tensor, nn

from spectralmoe.diagnostics.evaluation import evaluation_mode
from spectralmoe.errors import UserError, one_of
from spectralmoe.hf.language import batch_arguments
from spectralmoe.hf.layer import HFLayer
from spectralmoe.hf.layers import find_layers, refuse_shared
from spectralmoe.hf.routers.fit import fit_scorer
from spectralmoe.hf.routers.gates import gate_of, start_from_gate
from spectralmoe.hf.routers.places import put_in, take_out
from spectralmoe.hf.routers.rules import Rule, put_bias, read_rule
from spectralmoe.hf.routers.swapped import SwappedRouter
from spectralmoe.hf.watch import watch_transformers
from spectralmoe.layers import layer_name
from spectralmoe.naming import own_names, read_part
from spectralmoe.router import Router
from spectralmoe.scorers import Scorer
from spectralmoe.selectors import Selector
from spectralmoe.spec import build

__all__ = ["Init", "Swapped", "swap_routers"]

Init = Literal["from_gate", "fit", "fresh"]
_INITS = ("from_gate", "fit", "fresh")

ScorerLike = str | Mapping[str, Any] | Callable[[int, int], Scorer]
SelectorLike = str | Mapping[str, Any] | Callable[[], Selector] | None


@dataclass(frozen=True, slots=True)
class _Read:
    """What the stock router of a layer read and decided on the calibration, without padding.

    Attributes:
        tokens: (N, D).
        logits: (N, E).
        members: (N, E) bool, the chosen experts.
    """

    tokens: Tensor
    logits: Tensor
    members: Tensor


@dataclass(slots=True)
class Swapped:
    """What ``swap_routers`` did.

    Attributes:
        layers: the names of the layers whose routers were swapped.
        agreement: layer -> share of the calibration's tokens whose chosen experts are the same; None without one.
    """

    layers: list[str]
    agreement: dict[str, float] | None
    _model: nn.Module = field(repr=False)
    _undone: bool = field(default=False, repr=False)

    def undo(self) -> None:
        """Put the stock routers back, the same modules with the tensors that the model kept of them.

        A second call does nothing.

        Raises:
            UserError: PEFT trains a copy of a router.
        """
        inside = {path: module for path, module in self._model.named_modules() if isinstance(module, SwappedRouter)}
        ours = {path: module for path, module in inside.items() if module.layer_path(layer_name(path)) in self.layers}
        if copied := next((path for path in ours if "modules_to_save" in path.split(".")), None):
            raise UserError(f"undo: PEFT trains a copy of a router, {copied}; merge or unload the adapter first")
        if not self._undone:
            take_out(self._model, ours.values())
        self._undone = True


def swap_routers(
    model: nn.Module,
    scorer: ScorerLike = "linear",
    selector: SelectorLike = None,
    *,
    init: Init = "from_gate",
    layers: str = "*",
    calibration: Iterable[Any] | None = None,
) -> Swapped:
    """Put routers of this library in the place of a Hugging Face model's own.

    ``generate``, the model's losses, ``output_router_logits``, gradient checkpointing and the Trainer work as before.
    ``record``, ``penalty``, ``attach``, ``feed`` and ``Monitor`` see the layers as they see an ``MoE``. The attention
    mask of a call is the mask of its routings: padding gets no expert. A saved model also holds the stock routers, as
    they were, so plain transformers loads it as the model before the swap.

    Args:
        scorer: a name, a table such as ``{"type": "cosine", "temperature": 0.1}``, or a function (D, E) -> scorer.
        selector: a name, a table, or a function that makes one for each layer; None: the choice and the weights of the
            model's family (top-k of softmax or sigmoid, renormalised or not, selection bias). A factor of the weights
            and a capacity of the family stay with any selector; noise on the router's input does not.
        init: "from_gate": linear scorers start as the gate, cosine scorers with its rows as keys and the temperature
            1 / median(|x| |w|), where |x| is taken from the calibration, else sqrt(D); "fit": the scorer learns the
            logits of the gate on the calibration; "fresh": the scorer keeps its random start.
        layers: pattern on layer names (``*`` and ``?``).
        calibration: inputs of the model, tables of arguments or ids (B, S); the model is run on them once.

    Raises:
        UserError: no experts in the model, or routers of an unknown form; a pattern that matches nothing; a router that
            was swapped before; a scorer that cannot start as asked.

    >>> class Gate(nn.Module):
    ...     def __init__(self):
    ...         super().__init__()
    ...         self.weight = nn.Parameter(torch.randn(4, 8))
    ...
    ...     def forward(self, x):
    ...         logits = x @ self.weight.T
    ...         return logits, *logits.softmax(-1).topk(2)
    >>> layer = nn.ModuleDict({"gate": Gate(), "experts": nn.ModuleList(nn.Linear(8, 8) for _ in range(4))})
    >>> model, x = nn.ModuleDict({"layers": nn.ModuleList([nn.ModuleDict({"mlp": layer})])}), torch.randn(5, 8)
    >>> logits, weights, indices = layer["gate"](x)
    >>> swapped = swap_routers(model)
    >>> swapped.layers, bool((layer["gate"](x)[2] == indices).all())
    (['layers.0.mlp'], True)
    >>> swapped.undo()
    """
    if init not in _INITS:
        raise one_of("init", init, _INITS)
    chosen = _choose(find_layers(model), layers)
    rules = [read_rule(layer) for layer in chosen]
    read = {} if calibration is None else _calibrate(model, chosen, calibration)
    routers: dict[HFLayer, tuple[Router, Rule]] = {}
    for layer, (rule, own) in zip(chosen, rules, strict=True):
        made = _make_scorer(layer, rule, scorer, init, read.get(layer.name))
        router = _make_router(layer, made, rule, own if selector is None else selector)
        if init == "fit":
            _fit(router, read.get(layer.name))
        routers[layer] = router, rule
    shares = {layer.name: _agreement(router, read[layer.name]) for layer, (router, _) in routers.items() if read}
    put_in(model, routers)
    return Swapped([layer.name for layer in chosen], shares or None, model)


def _choose(found: Sequence[HFLayer], pattern: str) -> list[HFLayer]:
    chosen = [layer for layer in found if fnmatch(layer.name, pattern)]
    if not chosen:
        names = ", ".join(layer.name for layer in found)
        raise UserError(f"swap_routers: layers={pattern!r} matches no MoE layer; the model has: {names}")
    refuse_shared(chosen)
    for layer in chosen:
        if isinstance(layer.router, SwappedRouter):
            raise UserError(
                f"swap_routers: the router of {layer.name} was swapped already; undo() that first, or name other layers"
            )
        if "forward" in vars(layer.router):
            raise UserError(
                f"swap_routers: the forward of {layer.name}'s router was replaced by another library (accelerate's "
                "device_map does it); swap first, dispatch then"
            )
    return chosen


def _make_scorer(layer: HFLayer, rule: Rule, scorer: ScorerLike, init: Init, read: _Read | None) -> Scorer:
    """A scorer for the tokens and experts of ``layer``, started as asked."""
    gate = gate_of(layer)
    num_experts, dim = gate.weight.shape
    if callable(scorer):
        made, tempered = scorer(dim, num_experts), True
        if not isinstance(made, Scorer) or (made.dim, made.num_experts) != (dim, num_experts):
            raise UserError(f"swap_routers: scorer must give a Scorer for D={dim}, E={num_experts}, got {made!r:.80}")
    else:
        spec = read_part("scorer", scorer)
        tempered = "temperature" in spec
        if spec["type"] == "linear" and gate.bias is not None:
            spec = {"bias": True, **spec}
        made = build(spec, allow=own_names(scorer), sizes={"dim": dim, "num_experts": num_experts})
    made.to(gate.weight.device, gate.weight.dtype)
    tokens = None if read is None else read.tokens
    if init == "from_gate" and not (rule.affine and start_from_gate(made, gate, tokens=tokens, tempered=tempered)):
        beside = ", which has a bias" if gate.bias is not None else "" if rule.affine else ", which is no matrix alone"
        raise UserError(
            f"swap_routers: {type(made).__name__} cannot start from the gate of {layer.name}{beside}; say "
            'init="fit" with a calibration, or init="fresh"'
        )
    return made


def _make_router(layer: HFLayer, scorer: Scorer, rule: Rule, selector: SelectorLike) -> Router:
    """A router around ``scorer``, with the selection bias of the stock one where its selector has such a bias."""
    if selector is None:
        one = ", perhaps because the weight of a token's one expert is always 1" if layer.top_k == 1 else ""
        raise UserError(
            f"swap_routers: {layer.name} ({type(layer.router).__name__}) chooses its experts by a rule that is not "
            f'known here{one}; name one, such as selector="topk"'
        )
    if callable(selector):
        made: Selector = selector()
    else:
        spec = read_part("selector", selector)
        made = build(spec, allow=own_names(selector), sizes={"num_experts": layer.num_experts, "k": layer.top_k})
    router = Router(scorer, made)
    put_bias(made, layer.correction_bias)
    if "mask" in rule.roles and getattr(made, "k", 1) != 1:
        raise UserError(f"swap_routers: {layer.name} takes one expert a token; give a selector with k=1")
    return router.to(next(scorer.parameters()).device)


def _fit(router: Router, read: _Read | None) -> None:
    if read is None:
        raise UserError('swap_routers: init="fit" learns the gates\' logits on a calibration; give calibration=...')
    fit_scorer(router.scorer, read.tokens, read.logits, router.selector)


@torch.no_grad()
def _calibrate(model: Any, chosen: Sequence[HFLayer], batches: Iterable[Any]) -> dict[str, _Read]:
    """Layer -> what its router read and decided in one run over ``batches``."""
    parts: dict[str, list[_Read]] = {layer.name: [] for layer in chosen}
    with evaluation_mode(model), watch_transformers(model) as watching:
        for batch in batches:
            model(**batch_arguments("swap_routers", model, batch))
            for call in watching.drain():
                if call.layer.name in parts:
                    routing, tokens = call.routing, call.tokens
                    real = slice(None) if routing.mask is None else routing.mask
                    parts[call.layer.name].append(_Read(tokens[real], routing.logits[real], routing.members()[real]))
    if not all(parts.values()):
        raise UserError("swap_routers: calibration holds no batch, or ran past a layer; give ids (B, S) or arguments")
    return {
        name: _Read(*(torch.cat([getattr(one, part) for one in read]) for part in ("tokens", "logits", "members")))
        for name, read in parts.items()
    }


@torch.no_grad()
def _agreement(router: Router, read: _Read) -> float:
    """Share of the tokens (N, D) whose set of experts is the one that the stock router chose."""
    router.eval()
    members = router(read.tokens).members()
    return float((members == read.members).all(-1).float().mean())
