"""A lifelong stream: corrections one after another on the same model, none taken back."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from spectralmoe.adaptation.guard import Guard
from spectralmoe.adaptation.one_shot import DEFAULT_RULE, Carried, Rule, behind_head, carried, predict, some_wrong
from spectralmoe.adaptation.steady import steady

__all__ = ["StreamStep", "correction_stream"]


@dataclass(frozen=True, slots=True)
class StreamStep:
    """The model after one more correction.

    Attributes:
        sample: index of the image.
        success, method, touched, seconds: of its update. A sample that an earlier one made right: success, no change.
        accuracy: percent, on the images that the stream did not correct.
        kept: share of the corrections made so far, this one included, that are right now; 1 before the first.
        after: share of the copies of this sample that are right now, by kind.
    """

    sample: int
    success: bool
    method: str
    touched: dict[str, int]
    seconds: float
    accuracy: float
    kept: float
    after: Carried


def correction_stream(
    model: nn.Module,
    images: Tensor,
    labels: Tensor,
    *,
    count: int = 100,
    rule: Rule = DEFAULT_RULE,
    guard: Guard | None = None,
    seed: int = 0,
    progress: Callable[[float], None] | None = None,
) -> list[StreamStep]:
    """Correct ``count`` misclassified ``images`` (N, C, H, W) in a row; the model stays changed.

    The guard compares each update with the model right before it, and counts the samples of earlier corrections among
    the reference data. Where fewer images are misclassified it takes all of these.

    Args:
        progress: called with the share done, 0 to 1.
    """
    with steady(model):
        tail, features, labels = behind_head(model, images, labels, rule)
        order = some_wrong(predict(tail, features) == labels, count, seed)
        others = torch.ones(len(labels), dtype=torch.bool, device=labels.device)
        others[order] = False
        steps, made = list[StreamStep](), list[int]()
        for sample in order.tolist():
            x, y = images[sample : sample + 1].to(labels.device), labels[sample : sample + 1]
            update = rule.correct(model, x, y, guard)
            if update.success:
                made.append(sample)
                if guard is not None:
                    guard.protect(x, y)
            right = predict(tail, features) == labels
            accuracy = 100 * float(right[others].double().mean())
            kept = float(right[made].double().mean()) if made else 1.0
            after = carried(model, x, y)
            steps.append(
                StreamStep(sample, update.success, update.method, update.touched, update.seconds, accuracy, kept, after)
            )
            if progress is not None:
                progress(len(steps) / len(order))
    return steps
