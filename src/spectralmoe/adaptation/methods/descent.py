"""Plain gradient steps: the one-shot adaptation of SR-MoE (arXiv 2601.03889), as far as its protocol is known."""

from __future__ import annotations

import torch
from torch.nn import functional as F

from spectralmoe.adaptation.problem import Problem

__all__ = ["sgd"]


def sgd(problem: Problem) -> int:
    r"""At most ``max_steps`` steps :math:`\theta \leftarrow \theta - \eta \nabla CE`, until the samples are right.

    CE is the mean over the samples, and with copies the mean of theirs and the samples'. :math:`\eta` is ``lr``.
    No momentum and no decay, so nothing outside the chosen weights can move.
    """
    k = len(problem.labels)
    for step in range(problem.max_steps + 1):
        logits = problem.logits()
        if problem.solved(logits) or step == problem.max_steps or not bool(logits.isfinite().all()):
            return step
        loss = F.cross_entropy(logits[:k], problem.labels)
        if len(logits) > k:
            loss = (loss + F.cross_entropy(logits[k:], problem.targets[k:])) / 2
        gradients = problem.weights.gradients(loss)
        with torch.no_grad():
            for view, gradient in zip(problem.weights.views.values(), gradients, strict=True):
                view.sub_(gradient, alpha=problem.lr)
    return problem.max_steps
