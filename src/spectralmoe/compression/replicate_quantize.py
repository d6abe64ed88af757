"""Replicate-and-Quantize: the busiest expert gets a copy, and quantising unimportant experts pays for its memory.

Zijie Liu, Jie Peng, Jinhao Duan, Zirui Liu, Kaixiong Zhou, Mingfu Liang, Luke Simon, Xi Liu, Zhaozhuo Xu, Tianlong
Chen, "A Replicate-and-Quantize Strategy for Plug-and-Play Load Balancing of Sparse Mixture-of-Experts LLMs" (R&Q),
arXiv 2602.19938, abstract: per layer, without retraining and with the router untouched. No code of the authors is
known. The abstract leaves open what follows. Here a replicated expert's tokens go to its copies in turn, so that their
counts differ by one at most. The original is quantised with its copies, unless ``keep_original``. The importance of an
expert is how far the score falls without it, or, without labels, how much the layer's output changes.

torchao is not used, because it quantises whole modules, and here the experts of one stack have different precision. So
the weights are rounded but keep their dtype, and the bytes that integers would take are counted.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from spectralmoe.compression.edit import layers_of
from spectralmoe.compression.evidence import Evidence
from spectralmoe.compression.prune import prune
from spectralmoe.compression.quantize import quantise_, stored_bytes
from spectralmoe.compression.replicate import replicate
from spectralmoe.compression.scheme import Held, Report, Scheme
from spectralmoe.errors import UserError
from spectralmoe.moe import MoE
from spectralmoe.tape import Tape

__all__ = ["replicate_and_quantize"]

Model = TypeVar("Model", bound=nn.Module)
Batches = Iterable[Tensor | Mapping[str, Any]]

_OWNER = "replicate_and_quantize"
_KEPT = {"removal": ("input",), "reap": ("output",), "wanda": ("input", "hidden")}


def replicate_and_quantize(
    model: Model,
    calibration: Batches,
    *,
    importance: str = "removal",
    bits: int = 8,
    copies: int = 1,
    quantize: int = 1,
    keep_original: bool = False,
    score: Callable[[Model], float] | None = None,
    seed: int = 0,
) -> Report[Model]:
    r"""Return a copy of ``model`` whose busiest experts have copies and whose least important experts are quantised.

    In each layer the busiest expert, :math:`\arg\max_j n_j` on the calibration data, gets a copy, and the two take its
    tokens in turn (``Placement``). Original, copy and the q least important of the other experts are rounded to
    integers of ``bits`` bits, with one scale a row. With 8 bits in place of 16 this takes the memory of :math:`E - q/2`
    experts, and the largest load of a place is :math:`\max(n_{(2)}, \lceil n_{(1)}/2 \rceil)`. Router, choices, shared
    experts and biases stay. The new model is saved, loaded and evaluated like any other; ``model`` stays as it is.

    Args:
        model: an ``MoE``, or a model that holds some, in evaluation mode. For Hugging Face models see
            ``spectralmoe.hf.replicate_and_quantize_experts``.
        calibration: batches of inputs: tensors that the model is called with, or mappings of its keyword arguments. A
            small part of the data is enough. The tensors that the importance reads are kept for all batches.
        importance: how important an expert is. "removal": how far ``score`` falls without it, or, without a score, how
            much the layer's output changes. "wanda": the size of its weights times the norms of their inputs. Or
            another saliency of ``prune``: "frequency", "reap", "random".
        bits: 2 to 32.
        copies: how many copies are added to each layer, one by one of the expert with the largest load per copy.
        quantize: q, how many of the experts without copies are quantised.
        keep_original: whether the busiest expert stays as it is and only its copies are quantised, since it may be the
            most important one. Apart from the scales, the memory then does not grow if q >= copies.
        score: a function of the model that returns a number, higher is better, such as the accuracy on labelled data.
            It is called E + 1 times for each layer.
        seed: the seed of "random".

    Raises:
        UserError: the model is in training mode, has no ``MoE`` layer or routes softly; there is no calibration batch,
            or one without tokens; a number is out of range; the experts have no matrices of their own, orthonormal
            bases, or are merged; the score is not finite, or is given with another importance than "removal".

    >>> from spectralmoe import FeedForward, LinearScorer, Router, TopK
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(1)), FeedForward(4, 8, 16)).eval()
    >>> _ = torch.nn.init.zeros_(layer.router.scorer.weight)  # every token takes the same expert
    >>> report = replicate_and_quantize(layer, [torch.randn(100, 8)], bits=8)
    >>> report.model.experts.num_experts, report.bytes_after < report.bytes_before
    (5, True)
    >>> done = report.layers[""]
    >>> done.imbalance_before, done.imbalance_after
    (4.0, 2.5)
    """
    scheme = Scheme(_OWNER, importance, bits, copies, quantize, keep_original)
    if score is not None and importance != "removal":
        raise UserError(
            f"{_OWNER}: score= goes with importance='removal', and importance={importance!r} does not read it; leave "
            "one of them out"
        )
    layers = layers_of(_OWNER, model)
    for name, layer in layers.items():
        _check(name, layer)
    known = _run(model, layers, calibration, () if score else _KEPT.get(importance, ()), seed)
    held, done = {name: _held(layer, bits) for name, layer in layers.items()}, {}
    for name, layer in layers.items():

        def worth(name: str = name, layer: MoE = layer) -> Tensor:
            return _losses(model, name, layer, score) if score else known.saliency(importance, name, layer)

        counts = known.counts(name, layer)
        if not counts.any():
            raise UserError(f"{_OWNER}: no expert of layer {name!r} saw a token of the calibration; give other batches")
        done[name] = scheme.applied(name, held[name], counts, worth)
    made = replicate(model, {name: layer.places for name, layer in done.items()})
    for name, layer in layers_of(_OWNER, made).items():
        for place in scheme.low(done[name], held[name], _places(layer)):
            quantise_(layer.experts.expert_parameters(place).values(), bits)
    return Report(made, done)


def _check(name: str, layer: MoE) -> None:
    if layer.training or layer.router.training:
        raise UserError(
            f"{_OWNER}: layer {name!r} is in training mode, and copies would drift apart; call model.eval()"
        )
    bank, held = layer.experts, [place for row in _places(layer) for place in row]
    if len(set(held)) < len(held):
        raise UserError(f"{_OWNER}: layer {name!r} has merged experts, which share a place; replicate before merging")
    if bank.manifold:
        raise UserError(f"{_OWNER}: the bases of {type(bank).__name__} in layer {name!r} would leave their manifold")
    for place in held:
        if not any(tensor.dim() > 1 for tensor in bank.expert_parameters(place).values()):
            raise UserError(
                f"{_OWNER}: experts of {type(bank).__name__} in layer {name!r} have no matrix of their own to quantise"
            )


def _places(layer: MoE) -> list[list[int]]:
    """The places of each expert of the router."""
    return [layer.places(e) for e in range(layer.router.num_experts)]


def _held(layer: MoE, bits: int) -> Held:
    """What the layer holds of each expert; places of one expert are alike."""
    rows = _places(layer)
    owned = [list(layer.experts.expert_parameters(row[0]).values()) if row else [] for row in rows]
    return Held([len(row) for row in rows], list(map(stored_bytes, owned)), [stored_bytes(own, bits) for own in owned])


@torch.no_grad()
def _run(model: nn.Module, layers: dict[str, MoE], calibration: Batches, keep: Sequence[str], seed: int) -> Evidence:
    """What the layers did with the calibration data.

    Raises:
        UserError: there is none, or routing is soft.
    """
    with Tape(layers, keep) as tape:
        for batch in calibration:
            model(**batch) if isinstance(batch, Mapping) else model(batch)
        records = tape.drain()
    if not records:
        raise UserError(f"{_OWNER}: calibration holds no batch; give inputs of the model, such as [images]")
    for item in records:
        if item.routing.soft:
            raise UserError(
                f"{_OWNER}: every token of layer {item.name!r} uses every expert, so none is busier; give it "
                "a selector such as TopK"
            )
    return Evidence(_OWNER, layers, records, seed)


def _losses(model: Model, name: str, layer: MoE, score: Callable[[Model], float]) -> Tensor:
    """How far the score falls without each expert of a layer (E,) float64; 0 for one without a place."""
    experts = range(layer.router.num_experts)
    whole, falls = _finite(score(model)), torch.zeros(len(experts), dtype=torch.float64)
    for gone in experts:
        if layer.places(gone):
            falls[gone] = whole - _finite(score(prune(model, {name: [e for e in experts if e != gone]})))
    return falls


def _finite(value: float) -> float:
    number = float(value)
    if not math.isfinite(number):
        raise UserError(f"{_OWNER}: the score is {number}, not a finite number")
    return number
