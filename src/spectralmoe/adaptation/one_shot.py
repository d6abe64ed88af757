"""One-shot adaptation, measured: correct one sample, count what else that moves, restore; many times.

Delibasoglu, SR-MoE, arXiv 2601.03889, one-shot adaptation task. The paper's protocol is not known in detail; this
one is: take a sample that the model gets wrong, correct it by ``adapt_one``, measure the accuracy on all other
samples, restore.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.adapt import adapt_one, split
from spectralmoe.adaptation.copies import Augment, copies_of
from spectralmoe.adaptation.correction import Correction
from spectralmoe.adaptation.guard import Guard
from spectralmoe.adaptation.methods import METHODS, NEEDS_REFERENCE
from spectralmoe.adaptation.steady import steady
from spectralmoe.adaptation.targets import Weights, choose_layers, logits_of, predicted
from spectralmoe.adaptation.update import Update
from spectralmoe.errors import UserError, one_of
from spectralmoe.layers import moe_layers
from spectralmoe.moe import MoE

__all__ = ["Carried", "Rule", "Trial", "behind_head", "carried", "one_shot_trials", "predict", "some_wrong"]

_CHUNK = 5000
_SCOPES = ("one-expert", "all-experts", "all-parameters")


@dataclass(frozen=True, slots=True)
class Rule:
    """How a sample is corrected: the arguments of ``adapt_one``, and how much may be written.

    Attributes:
        layers: "all" MoE layers, the "last" one, or names.
        lr, max_steps, method: see ``adapt_one``.
        scope: "one-expert" a layer; for comparison "all-experts" of these layers, or "all-parameters" from the first
            of them on.
        augment: copies to become right too.
        strength: see ``adapt_one``.
    """

    layers: str | Sequence[str] = "all"
    lr: float = 2e-3
    max_steps: int = 200
    method: str = "sgd"
    scope: Literal["one-expert", "all-experts", "all-parameters"] = "one-expert"
    augment: Augment | None = None
    strength: float = 1.0

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"the step size must be positive and finite, got {self.lr}")
        if self.scope not in _SCOPES:
            raise one_of("scope", self.scope, _SCOPES)
        if self.method not in METHODS:
            raise one_of("method", self.method, METHODS)
        if self.scope != "one-expert" and (self.method in NEEDS_REFERENCE or self.augment is not None):
            raise UserError(f"scope={self.scope!r} takes method='sgd' or 'margin' and no copies")

    def correct(self, model: nn.Module, x: Tensor, y: Tensor, guard: Guard | None = None) -> Update:
        """``adapt_one`` by this rule."""
        return adapt_one(
            model,
            x,
            y,
            layers=self.layers,
            method=self.method,
            max_steps=self.max_steps,
            lr=self.lr,
            guard=guard,
            augment=self.augment,
            strength=self.strength,
        )


DEFAULT_RULE = Rule()


Carried = dict[str, float]
"""Key of ``COPIES`` -> share of the copies of that kind that are right, 0 to 1; only kinds that fit the sample."""


@dataclass(frozen=True, slots=True)
class Trial:
    """One restored correction and its price.

    Attributes:
        sample: index of the image.
        success, steps, touched, change, method, seconds: of the update; scope other than one expert touches nothing
            by name.
        interference: accuracy after minus before on all other samples, in percentage points; negative is damage.
            0 without success, when the model is as it was.
        before, after: share of the copies of the sample that are right before and after the correction, by kind.
    """

    sample: int
    success: bool
    steps: int
    touched: dict[str, int]
    change: float
    method: str
    seconds: float
    interference: float
    before: Carried
    after: Carried


def one_shot_trials(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    trials: int = 50,
    rule: Rule = DEFAULT_RULE,
    guard: Guard | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[Trial]:
    """Correct ``trials`` misclassified ``images`` (N, C, H, W) one at a time, restoring the model after each.

    Where fewer are misclassified it takes all of these. In models that offer ``split`` only the layers from the first
    changed one on run again.

    Args:
        progress: called with the share done, 0 to 1.
    """
    with steady(model):
        tail, features, labels = behind_head(model, images, labels, rule)
        head, _ = split(model, choose_layers(model, rule.layers)[0])
        right, results = predict(tail, features) == labels, []
        order = some_wrong(right, trials, seed)
        for sample in order.tolist():
            image, label = images[sample : sample + 1].to(labels.device).clone(), labels[sample : sample + 1]
            near = {kind: head(copies) for kind, copies in copies_of(image).items()}
            before = _carries(tail, near, label)
            with _corrected(model, image, label, rule, guard) as done:
                step = (predict(tail, features) == labels).int() - right.int()
                step[sample] = 0
                after = _carries(tail, near, label)
            interference = 100 * int(step.sum()) / max(len(labels) - 1, 1)
            results.append(Trial(sample, *done, interference, before, after))
            if progress is not None:
                progress(len(results) / len(order))
    return results


class _Done(NamedTuple):
    success: bool
    steps: int
    touched: dict[str, int]
    change: float
    method: str
    seconds: float


@contextmanager
def _corrected(model: nn.Module, image: Tensor, label: Tensor, rule: Rule, guard: Guard | None) -> Iterator[_Done]:
    """The model with the sample corrected inside the block, as it was after it."""
    if rule.scope == "one-expert":
        update = rule.correct(model, image, label, guard)
        try:
            yield _Done(update.success, update.steps, update.touched, update.change, update.method, update.seconds)
        finally:
            update.revert()
        return
    head, tail = split(model, choose_layers(model, rule.layers)[0])
    whole = rule.scope == "all-parameters"
    weights = Weights(dict(tail.named_parameters()) if whole else _experts_of(tail, choose_layers(model, rule.layers)))
    old, samples, started = weights.copy(), head(image), time.monotonic()
    try:
        with weights.trainable(tail):
            steps = METHODS[rule.method](
                Correction(tail, samples, label, samples[:0], weights, rule.max_steps, rule.lr)
            )
        success = bool((predict(tail, samples) == label).all())
        if not success:
            weights.write(old)
        change = sum(float((view - o).square().sum()) for view, o in zip(weights.views.values(), old, strict=True))
        yield _Done(success, steps, {}, change**0.5, rule.method, time.monotonic() - started)
    finally:
        weights.write(old)


def _experts_of(model: nn.Module, layers: Sequence[str]) -> dict[str, Tensor]:
    """The parameters of all experts of these layers."""
    banks = {name: layer.experts for name, layer in moe_layers(model).items() if isinstance(layer, MoE)}
    return {f"{name}.experts.{key}": value for name in layers for key, value in banks[name].named_parameters()}


@torch.no_grad()
def behind_head(model: nn.Module, images: Tensor, labels: Tensor, rule: Rule) -> tuple[nn.Module, Tensor, Tensor]:
    """What a correction by ``rule`` can change of the model, what enters it for ``images``, and the labels there."""
    device = next(model.parameters()).device
    head, tail = split(model, choose_layers(model, rule.layers)[0])
    return tail, torch.cat([head(part.to(device)) for part in images.split(_CHUNK)]), labels.to(device).clone()


def some_wrong(right: Tensor, count: int, seed: int) -> Tensor:
    """``count`` of the samples that are not ``right`` (N,), in the order of the seed; on the CPU."""
    wrong = (~right).nonzero().flatten().cpu()
    return wrong[torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:count]]


@torch.no_grad()
def predict(model: nn.Module, x: Tensor) -> Tensor:
    """Predicted classes (N,) of samples (N, ...), in chunks; -1 where a logit is NaN."""
    return torch.cat([predicted(logits_of(model, part)) for part in x.split(_CHUNK)])


@torch.no_grad()
def carried(model: nn.Module, x: Tensor, y: Tensor) -> Carried:
    """Which share of the copies of samples x (k, ...), y (k,) the model gets right, by kind of copy."""
    return _carries(model, copies_of(x), y)


def _carries(model: nn.Module, near: Mapping[str, Tensor], y: Tensor) -> Carried:
    answers = predict(model, torch.cat(list(near.values()))).split([len(copies) for copies in near.values()])
    return {kind: _share_right(answer, y) for kind, answer in zip(near, answers, strict=True)}


def _share_right(answers: Tensor, y: Tensor) -> float:
    labels = y.repeat_interleave(len(answers) // max(len(y), 1))
    return float((answers == labels).float().mean())
