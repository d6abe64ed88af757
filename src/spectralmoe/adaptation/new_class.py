"""The new-class task: a class that training never saw, added by one-expert updates from a few samples."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.guard import Guard
from spectralmoe.adaptation.one_shot import DEFAULT_RULE, Rule, behind_head, predict
from spectralmoe.adaptation.steady import steady
from spectralmoe.errors import UserError

__all__ = ["Shots", "add_class"]


@dataclass(frozen=True, slots=True)
class Shots:
    """One try with k samples of the new class; the model is restored after it.

    Attributes:
        shots: k.  samples: their indices among the samples of the class.
        success, method: of the update.
        accuracy: percent of the test images of the new class that are right after it (before: ``before``).
        interference: accuracy after minus before on the test images of all other classes, in percentage points.
    """

    shots: int
    samples: tuple[int, ...]
    success: bool
    method: str
    before: float
    accuracy: float
    interference: float


def add_class(
    model: nn.Module,
    support: Tensor,
    images: Tensor,
    labels: Tensor,
    label: int,
    *,
    shots: int,
    tries: int = 5,
    rule: Rule = DEFAULT_RULE,
    guard: Guard | None = None,
    seed: int = 0,
) -> list[Shots]:
    """Teach class ``label`` from ``shots`` of the ``support`` images (S, C, H, W), ``tries`` times over.

    Each time the k samples are drawn anew and given to one ``adapt_one``, which writes one expert a layer. The model is
    measured on test ``images`` (N, C, H, W) with ``labels`` (N,), and then restored.

    Raises:
        UserError: fewer support images than shots; no test image of the class.
    """
    if shots > len(support):
        raise UserError(f"{shots} shots were asked for, but there are only {len(support)} images of the new class")
    draw = torch.Generator().manual_seed(seed)
    with steady(model):
        tail, features, labels = behind_head(model, images, labels, rule)
        of_class = labels == label
        if not bool(of_class.any()):
            raise UserError(f"there is no test image of class {label}")
        right, results = predict(tail, features) == labels, []
        for _ in range(tries):
            chosen = torch.randperm(len(support), generator=draw)[:shots]
            update = rule.correct(model, support[chosen].to(labels.device), torch.full((shots,), label), guard)
            try:
                after = predict(tail, features) == labels
            finally:
                update.revert()
            results.append(
                Shots(
                    shots,
                    tuple(chosen.tolist()),
                    update.success,
                    update.method,
                    _percent(right[of_class]),
                    _percent(after[of_class]),
                    _percent(after[~of_class]) - _percent(right[~of_class]),
                )
            )
    return results


def _percent(right: Tensor) -> float:
    return 100 * float(right.double().mean())
