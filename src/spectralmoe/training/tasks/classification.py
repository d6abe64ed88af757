"""Metrics of class logits, for tasks that classify."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.training.tasks.base import Metric

__all__ = ["ACCURACY", "CLASSIFICATION", "calibration_error", "class_scores", "macro_f1", "negative_log_likelihood"]

ACCURACY = Metric("accuracy", "accuracy", "share of samples whose class is right", "higher", unit="%")

CLASSIFICATION = (
    ACCURACY,
    Metric("macro_f1", "macro F1", "F1 of each class that there is, mean over classes", "higher", unit="%"),
    Metric(
        "nll", "NLL", "negative log-likelihood of the right class, mean over samples", "lower", unit="nats", digits=3
    ),
    Metric("ece", "ECE", "expected calibration error, 15 bins of confidence", "lower", unit="%"),
)


def class_scores(logits: Tensor, labels: Tensor) -> dict[str, float]:
    """All metrics of ``CLASSIFICATION`` for logits (N, C) and labels (N,)."""
    predictions = logits.argmax(-1)
    return {
        "accuracy": 100 * float((predictions == labels).float().mean()),
        "macro_f1": 100 * macro_f1(predictions, labels),
        "nll": negative_log_likelihood(logits, labels),
        "ece": 100 * calibration_error(logits, labels),
    }


def macro_f1(predictions: Tensor, labels: Tensor) -> float:
    r"""Mean over classes of :math:`F_1 = 2 t / (p + l)`: t right ones of p predictions and l labels of the class.

    Classes that neither are predicted nor label a sample have no F1 and are left out.

    >>> macro_f1(torch.tensor([0, 1, 1]), torch.tensor([0, 0, 1]))
    0.6666666666666666
    """
    classes = int(torch.maximum(predictions.amax(), labels.amax())) + 1
    true = predictions[predictions == labels].bincount(minlength=classes).double()
    both = (predictions.bincount(minlength=classes) + labels.bincount(minlength=classes)).double()
    return float((2 * true / both)[both > 0].mean())


def negative_log_likelihood(logits: Tensor, labels: Tensor) -> float:
    r"""Mean of :math:`-\log \mathrm{softmax}(s)_y` over samples, in nats, for logits s (N, C) and labels y (N,).

    >>> round(negative_log_likelihood(torch.zeros(3, 2), torch.tensor([0, 1, 1])), 4)
    0.6931
    """
    return float(F.cross_entropy(logits.double(), labels))


def calibration_error(logits: Tensor, labels: Tensor, *, bins: int = 15) -> float:
    r"""Expected calibration error :math:`\sum_b \frac{|b|}{N} \, |\mathrm{acc}(b) - \mathrm{conf}(b)|`.

    A sample's confidence is its largest softmax score; bin b holds those with confidence in :math:`(b/B, (b+1)/B]`.
    Guo et al., "On Calibration of Modern Neural Networks", arXiv 1706.04599, section 2, equation 3. NaN where a logit
    is not finite.

    Args:
        logits: (N, C).  labels: (N,).
        bins: B, of equal width.

    >>> calibration_error(torch.zeros(4, 2), torch.tensor([0, 0, 1, 1]))
    0.0
    """
    scores = logits.double().softmax(-1)
    if not bool(scores.isfinite().all()):
        return float("nan")
    confidence, predictions = scores.max(-1)
    place = (confidence * bins).ceil().long().clamp(1, bins) - 1
    gap = (predictions == labels).double() - confidence
    return float(gap.new_zeros(bins).index_add(0, place, gap).abs().sum() / len(labels))
