"""What a gate knows of the degradation, how well it knows that it knows, and where its passes disagree."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from spectralmoe import record
from spectralmoe.data.degradations import KINDS, MIXTURE, Pairs
from spectralmoe.layers import moe_layers
from spectralmoe.scorers import MonteCarlo, Scorer
from spectralmoe.training.tasks import RestorationTask

__all__ = [
    "Gate",
    "calibration_error",
    "fit_temperature",
    "gate_measures",
    "kind_scores",
    "kinds_of_experts",
    "tempered",
]

TEMPERATURES = tuple(2 ** (step / 4) for step in range(-24, 17))  # 1/64 to 16
BINS, PASSES, DROPOUT = 15, 20, 0.1
SINGLE = len(KINDS) - 1
_LEAST = 1e-12


class Gate(NamedTuple):
    """What the gate of a network made of the images of a part, in evaluation.

    Attributes:
        logits: (N, T, E), T positions an image.
        tokens: (N, T, D), what it read.
        kinds: (N,) int64, places in ``KINDS``.
    """

    logits: Tensor
    tokens: Tensor
    kinds: Tensor

    @property
    def single(self) -> Gate:
        """Images with one degradation alone."""
        return Gate(*(values[self.kinds < SINGLE] for values in self))


def scorer_of(network: nn.Module) -> Scorer:
    """The scorer of its one layer."""
    (layer,) = moe_layers(network).values()
    scorer: Scorer = layer.router.scorer
    return scorer


@torch.no_grad()
def look(network: nn.Module, pairs: Pairs) -> Gate:
    """The gate on the images of a part."""
    with record(network.eval(), keep="tokens") as tape:
        network(pairs.images, severity=pairs.severity)
    (item,) = tape
    logits, tokens = (values.unflatten(0, (len(pairs), -1)) for values in (item.routing.logits, item.tensor("tokens")))
    return Gate(logits, tokens, pairs.kinds)


def kinds_of_experts(scores: Tensor, kinds: Tensor) -> Tensor:
    """P(kind | expert) (E, 4): the share of each kind (N,) in the scores (N, E) that an expert got."""
    held = torch.zeros(SINGLE, scores.shape[1], dtype=scores.dtype).index_add_(0, kinds, scores).T
    return held / held.sum(1, keepdim=True).clamp_min(_LEAST)


def kind_scores(logits: Tensor, of_expert: Tensor, temperature: float = 1.0) -> Tensor:
    """P(kind) (N, 4) that gates with logits (N, T, E) give each image, softened by a temperature."""
    return (logits / temperature).softmax(-1).mean(1) @ of_expert


def calibration_error(scores: Tensor, kinds: Tensor) -> float:
    """Expected calibration error of P(kind) (N, C): |share that is right - confidence|, by bins of confidence."""
    confidence, guess = scores.max(1)
    places = (confidence * BINS).long().clamp_max(BINS - 1)
    gaps = torch.zeros(BINS, dtype=scores.dtype).index_add_(0, places, (guess == kinds).to(scores.dtype) - confidence)
    return float(gaps.abs().sum() / len(kinds))


def fit_temperature(gate: Gate) -> float:
    """The temperature under which the kinds of these images are likeliest."""

    def cost(temperature: float) -> float:
        scores = (gate.logits / temperature).softmax(-1).mean(1)
        given = scores @ kinds_of_experts(scores, gate.kinds)
        return float(-given.gather(1, gate.kinds[:, None]).clamp_min(_LEAST).log().mean())

    return min(TEMPERATURES, key=cost)


@torch.no_grad()
def tempered(network: nn.Module, temperature: float) -> nn.Module:
    """The network with the logits of its gate divided by the temperature: the same choices, other weights."""
    network = copy.deepcopy(network)
    for parameter in scorer_of(network).parameters():
        parameter /= temperature
    return network


@torch.no_grad()
def gate_measures(network: nn.Module, task: RestorationTask) -> Mapping[str, float]:
    """Calibration against the true degradation, on test images; all that is fitted is fitted on validation images."""
    scorer = scorer_of(network)
    inner = scorer.scorer if isinstance(scorer, MonteCarlo) else scorer
    passes = MonteCarlo(inner, passes=PASSES, dropout=DROPOUT).train()
    known, gate = look(network, task.parts["validation"]), look(network, task.parts["test"])
    spread = _by_token(lambda tokens: passes.moments(tokens)[1].sum(-1, keepdim=True), gate).mean((1, 2))
    mixed = gate.kinds == KINDS.index(MIXTURE)
    several = [part._replace(logits=_by_token(passes, part)) for part in (known, gate)]
    return {
        "temperature": fit_temperature(known.single),
        **told(known.single, gate.single),
        **{f"{key}_passes": value for key, value in told(*(part.single for part in several)).items()},
        "spread": float(spread.mean()),
        "spread_ratio": float(spread[mixed].mean() / spread[~mixed].mean().clamp_min(_LEAST)),
    }


def told(known: Gate, gate: Gate) -> dict[str, float]:
    """How often the gate says the kind of images, and its calibration, by what experts got of images that are known."""
    scores = kind_scores(gate.logits, kinds_of_experts(known.logits.softmax(-1).mean(1), known.kinds))
    right = float((scores.argmax(1) == gate.kinds).float().mean())
    return {"kinds_right": right, "ece": calibration_error(scores, gate.kinds)}


def _by_token(function: Callable[[Tensor], Tensor], gate: Gate) -> Tensor:
    """What a function of tokens (M, D) makes of those of the images: (N, T, ...)."""
    return function(gate.tokens.flatten(0, 1)).unflatten(0, gate.tokens.shape[:2])
