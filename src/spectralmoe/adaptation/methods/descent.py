"""Plain gradient steps: the one-shot adaptation of SR-MoE (arXiv 2601.03889), as far as its protocol is known."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from spectralmoe.adaptation.correction import Correction

__all__ = ["sgd"]


def sgd(correction: Correction) -> int:
    r"""At most ``max_steps`` steps :math:`\theta \leftarrow \theta - \eta \nabla CE`, until the samples are right.

    CE is the mean over the samples, and with copies the mean of theirs and the samples'. :math:`\eta` is ``lr``.
    No momentum and no decay, so nothing outside the chosen weights can move.
    """
    k = len(correction.labels)
    for step in range(correction.max_steps + 1):
        logits = correction.logits()
        if correction.solved(logits) or step == correction.max_steps or not bool(logits.isfinite().all()):
            return step
        loss = F.cross_entropy(logits[:k], correction.labels)
        if len(logits) > k:
            loss = (loss + F.cross_entropy(logits[k:], correction.targets[k:])) / 2
        gradients = correction.weights.gradients(loss)
        with torch.no_grad():
            for view, gradient in zip(correction.weights.views.values(), gradients, strict=True):
                view.sub_(gradient, alpha=correction.lr)
    return correction.max_steps
