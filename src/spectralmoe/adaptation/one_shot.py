"""One-shot adaptation: correct one sample by training only the experts it uses, and see what else that moves.

Delibasoglu, SR-MoE, arXiv 2601.03889, one-shot adaptation task. The paper's protocol is not known in detail; this
one is: take a sample that the model gets wrong, run plain gradient steps of its cross-entropy on the expert with the
largest weight in each chosen layer until it is right, measure the accuracy on all other samples, restore.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.errors import UserError
from spectralmoe.models.sr_moe import SRMoE
from spectralmoe.tape import record
from spectralmoe.training.data import Split
from spectralmoe.training.evaluation import evaluation_mode

__all__ = ["Correction", "Trial", "correct_sample", "one_shot_trials"]

Layers = Literal["last", "all"]
_CHUNK = 5000


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
        sample: index in the split.
        correction: what was done.
        interference: accuracy after minus before on all other samples, in percentage points; negative is damage.
    """

    sample: int
    correction: Correction
    interference: float


def correct_sample(
    model: SRMoE, image: Tensor, label: int, *, layers: Layers = "all", lr: float = 5e-3, max_steps: int = 100
) -> Correction:
    """Train the experts that ``image`` (C, H, W) uses until it is classified as ``label``; nothing else changes.

    Raises:
        UserError: the label is out of range; an expert bank that cannot be adapted one expert at a time.
    """
    if not 0 <= label < model.num_classes:
        raise UserError(f"label {label} is out of range; the model knows 0 to {model.num_classes - 1}")
    with evaluation_mode(model), torch.no_grad():
        features = model.stem(image[None].to(model.head.weight.device))
        return _correct(model, features, label, layers, lr, max_steps)


def one_shot_trials(
    model: SRMoE,
    split: Split,
    *,
    trials: int = 50,
    layers: Layers = "all",
    lr: float = 5e-3,
    max_steps: int = 100,
    seed: int = 0,
) -> list[Trial]:
    """Correct ``trials`` misclassified samples of ``split`` one at a time, restoring the model after each.

    Takes all misclassified samples where there are fewer. Only the stages run again: the stem cannot change.
    """
    with evaluation_mode(model), torch.no_grad():
        device = model.head.weight.device
        features = torch.cat([model.stem(part.to(device)) for part in split.images.split(_CHUNK)])
        labels = split.labels.to(device)
        right = _right(model, features, labels)
        wrong = (~right).nonzero().flatten().cpu()
        order = torch.randperm(len(wrong), generator=torch.Generator().manual_seed(seed))[:trials]
        found = []
        for sample in wrong[order].tolist():
            before = {name: value.clone() for name, value in model.stages.state_dict().items()}
            correction = _correct(model, features[sample : sample + 1], int(labels[sample]), layers, lr, max_steps)
            change = _right(model, features, labels).float() - right.float()
            change[sample] = 0
            model.stages.load_state_dict(before)
            found.append(Trial(sample, correction, 100 * float(change.sum()) / max(len(labels) - 1, 1)))
    return found


def _correct(model: SRMoE, features: Tensor, label: int, layers: Layers, lr: float, max_steps: int) -> Correction:
    first = len(model.stages) - 1 if layers == "last" else 0
    for stage in model.stages[:first]:
        features = stage(features)
    banks, touched = {}, {}
    with record(model) as tape:
        model.classify(features, first)
    for item in tape:
        expert = int(item.routing.top_expert()[0])
        if expert < 0:
            continue
        views = item.layer.get_submodule("experts").expert_parameters(expert)  # type: ignore[operator]
        if not views:
            raise UserError(
                f"layer {item.name!r}: the experts of {type(item.layer).__name__} cannot be adapted one at a time"
            )
        touched[item.name] = expert
        banks |= {f"{item.name}.{name}": view for name, view in views.items()}
    start = {name: view.clone() for name, view in banks.items()}
    target = torch.tensor([label], device=features.device)
    steps = 0
    while not (success := _step(model, features, first, target, banks, lr if steps < max_steps else None)):
        if steps == max_steps:
            break
        steps += 1
    change = sum(float((view - start[name]).square().sum()) for name, view in banks.items()) ** 0.5
    return Correction(success, steps, touched, change)


def _step(
    model: SRMoE, features: Tensor, first: int, target: Tensor, views: dict[str, Tensor], lr: float | None
) -> bool:
    """True if the sample is right; else one gradient step on ``views`` (none without a rate)."""
    stacks = {name: view._base if view._base is not None else view for name, view in views.items()}
    with torch.enable_grad():
        logits = model.classify(features, first)
        if int(logits.argmax()) == int(target):
            return True
        if lr is None:
            return False
        gradients = torch.autograd.grad(F.cross_entropy(logits, target), list(stacks.values()), allow_unused=True)
    for (name, view), gradient in zip(views.items(), gradients, strict=True):
        if gradient is not None:
            offset = view.storage_offset() - stacks[name].storage_offset()
            view.sub_(gradient.contiguous().as_strided(view.shape, view.stride(), offset), alpha=lr)
    return False


def _right(model: SRMoE, features: Tensor, labels: Tensor) -> Tensor:
    found = [model.classify(part).argmax(-1) for part in features.split(_CHUNK)]
    return torch.cat(found) == labels
