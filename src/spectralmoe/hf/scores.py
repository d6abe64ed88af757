"""The scores that the router of a Hugging Face MoE layer took the top-k of, told from logits, weights and indices."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from spectralmoe.routing import Score

__all__ = ["Choice", "Form", "choice_scores", "find_form", "real_logits"]

_ACTIVATIONS = (
    lambda logits: logits.softmax(-1),
    torch.sigmoid,
    lambda logits: F.softplus(logits).sqrt(),  # DeepSeek-V4
)
"""Functions that routers put between logits and the choice; softmax where weights and indices fit several."""

_NAMES: tuple[Score | None, ...] = ("softmax", "sigmoid", None)

_FITS, _CLEARLY = 0.01, 4.0


@dataclass(frozen=True, slots=True)
class Choice:
    """The data of a router's choice beside its logits.

    Attributes:
        bias: added to the scores for the choice alone (E,), None without (DeepSeek-V3, arXiv:2412.19437, eq. 16).
        groups: groups that the experts are split into.
        groups_on: how many of them a token may choose from.
    """

    bias: Tensor | None = None
    groups: int = 1
    groups_on: int = 1


@dataclass(frozen=True, slots=True)
class Form:
    """A guess of how a router makes scores of its logits.

    Attributes:
        probabilities: what it returns as logits is a distribution.
        activation: which of the activations.
        counted: how many experts of a group make the group's score: 2 (DeepSeek-V3), 1 (DeepSeek-V2), 0 no groups.
        sure: the data left no doubt, so that it holds for other tokens too.
    """

    probabilities: bool
    activation: int
    counted: int
    sure: bool

    def score(self, logits: Tensor) -> Tensor | Score:
        """How the scores follow from real logits (N, E): by its name, or the scores themselves."""
        return _NAMES[self.activation] or _ACTIVATIONS[self.activation](logits)


def find_form(logits: Tensor, weights: Tensor, indices: Tensor, choice: Choice, probabilities: bool) -> Form:
    """The form that explains what a router returned for some tokens: logits (N, E), weights and indices (N, K).

    The activation is the one whose values at the chosen experts the weights are proportional to within each token (for
    K = 1: equal to), by the mean deviation of log(weight / value). A softmax over the chosen logits alone is
    proportional to the softmax over all.
    """
    logits = real_logits(logits, probabilities)
    deviations = [_deviation(activation(logits), weights, indices) for activation in _ACTIVATIONS]
    best = min(range(len(deviations)), key=deviations.__getitem__)
    rivals = min(value for place, value in enumerate(deviations) if place != best)
    clear = deviations[best] < _FITS and rivals > _CLEARLY * deviations[best] + 1e-4
    activation = best if clear else 0
    scores, counted = _biased(_ACTIVATIONS[activation](logits), choice), 0
    for tried in (2, 1) if choice.groups_on < choice.groups else ():
        on = _groups_on(scores, choice, tried)
        if bool((on.gather(1, indices.clamp_min(0)) | (indices < 0)).all()):
            counted = tried
            break
    return Form(probabilities, activation, counted, clear)


def choice_scores(logits: Tensor, indices: Tensor, choice: Choice, form: Form) -> Tensor:
    """The values (N, E) whose top-k the choice was, none below 0; ``logits`` are real ones.

    Activation plus bias. Experts that a token could not choose, because their group was cut off, have 0. A bias counts
    from its least entry, as what all entries have in common changes no choice: order and differences stay.

    >>> logits = torch.tensor([[2.0, 1.0, 0.0]])
    >>> form = Form(probabilities=False, activation=1, counted=0, sure=True)
    >>> choice_scores(logits, torch.tensor([[1]]), Choice(bias=torch.tensor([-1.0, 1.0, 0.0])), form)
    tensor([[0.8808, 2.7311, 1.5000]])
    """
    scores = _biased(_ACTIVATIONS[form.activation](logits), choice)
    if form.counted:
        scores = scores.masked_fill(~_groups_on(scores, choice, form.counted), 0)
    taken = torch.zeros_like(scores, dtype=torch.bool).scatter(1, indices.clamp_min(0), indices >= 0)
    least = scores.masked_fill(~taken, torch.inf).amin(-1, keepdim=True)
    limited = ~taken & (scores > least)  # above the weakest chosen one, not chosen: outside the group limit
    return scores.masked_fill(limited, 0)


def real_logits(logits: Tensor, probabilities: bool) -> Tensor:
    """The logits behind probabilities, up to a constant of each token."""
    return logits.clamp_min(torch.finfo(logits.dtype).tiny).log() if probabilities else logits


def _biased(scores: Tensor, choice: Choice) -> Tensor:
    return scores if choice.bias is None else scores + (choice.bias - choice.bias.amin()).to(scores)


def _groups_on(scores: Tensor, choice: Choice, counted: int) -> Tensor:
    """Which experts (N, E) lie in the groups that a token may choose from: the best by the sum of their top scores."""
    grouped = scores.unflatten(-1, (choice.groups, -1))
    best = grouped.topk(min(counted, grouped.shape[-1])).values.sum(-1)
    on = torch.zeros_like(best, dtype=torch.bool).scatter(1, best.topk(choice.groups_on).indices, True)
    return on.repeat_interleave(grouped.shape[-1], 1)


def _deviation(scores: Tensor, weights: Tensor, indices: Tensor) -> float:
    """Mean absolute deviation of log(weight / score) of the chosen within a token; from 0 where K = 1."""
    used, tiny = (indices >= 0) & (weights > 0), torch.finfo(scores.dtype).tiny
    ratio = (weights.clamp_min(tiny) / scores.gather(1, indices.clamp_min(0)).clamp_min(tiny)).clamp_min(tiny).log()
    ratio = torch.where(used, ratio, 0)
    middle = ratio.sum(-1, keepdim=True) / used.sum(-1, keepdim=True).clamp_min(1) if indices.shape[1] > 1 else 0
    return float(torch.where(used, ratio - middle, 0).abs().sum() / used.sum().clamp_min(1))
