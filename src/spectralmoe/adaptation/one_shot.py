"""One-shot adaptation: correct one sample by training only the experts it uses, and see what else that moves.

Delibasoglu, SR-MoE, arXiv 2601.03889, one-shot adaptation task. The paper's protocol is not known in detail; this
one is: take a sample that the model gets wrong, run plain gradient steps of its cross-entropy on the expert with the
largest weight in each chosen layer until it is right, measure the accuracy on all other samples, restore.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.diagnostics import evaluation_mode
from spectralmoe.errors import UserError
from spectralmoe.models.sr_moe import SRMoE
from spectralmoe.moe import MoE
from spectralmoe.tape import record

__all__ = ["Correction", "Rule", "Trial", "correct_sample", "one_shot_trials"]

_CHUNK = 5000


@dataclass(frozen=True, slots=True)
class Rule:
    """How a sample is corrected: plain gradient steps of size ``lr``, at most ``max_steps``.

    Attributes:
        layers: train the used expert of "all" layers, or of the "last" one only.
    """

    layers: Literal["last", "all"] = "all"
    lr: float = 5e-3
    max_steps: int = 100

    def __post_init__(self) -> None:
        if not 0 < self.lr < float("inf"):
            raise UserError(f"the step size must be positive and finite, got {self.lr}")


DEFAULT_RULE = Rule()


@dataclass(frozen=True, slots=True)
class Correction:
    """What correcting one sample did.

    Attributes:
        success: the sample is right now.
        steps: gradient steps taken.
        touched: layer name -> the one expert that changed.
        change: Euclidean norm of the change of all touched parameters.
    """

    success: bool
    steps: int
    touched: dict[str, int]
    change: float


@dataclass(frozen=True, slots=True)
class Trial:
    """One restored correction and its price.

    Attributes:
        sample: index of the image.
        correction: what was done.
        interference: accuracy after minus before on all other samples, in percentage points; negative is damage.
    """

    sample: int
    correction: Correction
    interference: float


def correct_sample(model: SRMoE, image: Tensor, label: int, rule: Rule = DEFAULT_RULE) -> Correction:
    """Train the experts that ``image`` (C, H, W) uses until it is classified as ``label``; nothing else changes.

    Raises:
        UserError: the label is out of range; a bank whose experts cannot be adapted alone.
    """
    if not 0 <= label < model.num_classes:
        raise UserError(f"label {label} is out of range; the model knows 0 to {model.num_classes - 1}")
    with evaluation_mode(model), torch.no_grad():
        features = model.stem(image[None].to(model.head.weight.device))
        return _correct(model, features, label, rule)


def one_shot_trials(
    model: SRMoE, images: Tensor, labels: Tensor, *, trials: int = 50, rule: Rule = DEFAULT_RULE, seed: int = 0
) -> list[Trial]:
    """Correct ``trials`` misclassified ones of ``images`` (N, C, H, W) one at a time, restoring the model after each.

    Takes all misclassified images where there are fewer. Only the stages run again: the stem cannot change.
    """
    with evaluation_mode(model), torch.no_grad():
        device = model.head.weight.device
        features = torch.cat([model.stem(part.to(device)) for part in images.split(_CHUNK)])
        labels = labels.to(device)
        right = _right(model, features, labels)
        wrong = (~right).nonzero().flatten().cpu()
        order = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:trials]
        before = {name: value.clone() for name, value in model.stages.state_dict().items()}
        found = []
        for sample in wrong[order].tolist():
            correction = _correct(model, features[sample : sample + 1], int(labels[sample]), rule)
            change = _right(model, features, labels).float() - right.float()
            change[sample] = 0
            model.stages.load_state_dict(before)
            found.append(Trial(sample, correction, 100 * float(change.sum()) / max(len(labels) - 1, 1)))
    return found


def _correct(model: SRMoE, features: Tensor, label: int, rule: Rule) -> Correction:
    first = len(model.stages) - 1 if rule.layers == "last" else 0
    for stage in model.stages[:first]:
        features = stage(features)
    touched, views = _used_experts(model, features, first)
    start = [view.clone() for view in views]
    target, steps = torch.tensor([label], device=features.device), 0
    while True:
        with torch.enable_grad():
            logits = model.classify(features, first)
            finite = bool(logits.isfinite().all())
            success = finite and int(logits.argmax()) == label
            if success or not finite or steps == rule.max_steps:
                break
            _descend(F.cross_entropy(logits, target), views, rule.lr)
        steps += 1
    change = sum(float((view - old).square().sum()) for view, old in zip(views, start, strict=True))
    return Correction(success, steps, touched, change**0.5)


def _used_experts(model: SRMoE, features: Tensor, first: int) -> tuple[dict[str, int], list[Tensor]]:
    """The expert with the largest weight in each layer from stage ``first`` on, and views of its parameters."""
    touched: dict[str, int] = {}
    views: list[Tensor] = []
    with record(model) as tape:
        model.classify(features, first)
    for item in tape:
        expert = int(item.routing.top_expert()[0])
        bank = item.layer.experts if isinstance(item.layer, MoE) else None
        if bank is None or not 0 <= expert < bank.num_experts:
            continue
        own = bank.expert_parameters(expert)
        if not own:
            raise UserError(f"layer {item.name!r}: the experts of a {type(bank).__name__} cannot be adapted alone")
        touched[item.name] = expert
        views += own.values()
    return touched, views


def _descend(loss: Tensor, views: Sequence[Tensor], lr: float) -> None:
    """One gradient step on the viewed parts of their parameters; the rest of each parameter stays as it is."""
    stacks = [view if view._base is None else view._base for view in views]
    gradients = torch.autograd.grad(loss, stacks, allow_unused=True)
    with torch.no_grad():
        for view, stack, gradient in zip(views, stacks, gradients, strict=True):
            if gradient is not None:
                offset = view.storage_offset() - stack.storage_offset()
                view.sub_(gradient.contiguous().as_strided(view.shape, view.stride(), offset), alpha=lr)


def _right(model: SRMoE, features: Tensor, labels: Tensor) -> Tensor:
    found = [model.classify(part).argmax(-1) for part in features.split(_CHUNK)]
    return torch.cat(found) == labels
