"""Smallest steps that make the margin positive: plain, in the null space, or weighted by what the expert sees."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectralmoe.adaptation.correction import Correction, margins
from spectralmoe.adaptation.methods.activations import bank_of, hidden_moments, input_moments

__all__ = ["low_rank", "margin", "null_space"]

MARGIN = 0.05
KEPT_ENERGY = 0.95
RIDGE = 0.05
_LONGEST = 1e30
"""A step of this length means that nothing can be moved; longer ones leave the range of fp32."""

Shaping = dict[str, Callable[[Tensor], Tensor]]
"""What is made of the gradient of each weight, by name; a weight that is missing stays as it is."""


def margin(correction: Correction) -> int:
    r"""Minimal-norm steps on the margin.

    With :math:`h = \sum_i (\epsilon - m_i)_+` over the samples and copies whose margin m is below epsilon = 0.05,
    :math:`\theta \leftarrow \theta - \frac{h}{\|\nabla h\|^2} \nabla h`: the smallest change that makes the
    linearised h zero (Moosavi-Dezfooli et al., "DeepFool", arXiv 1511.04599, on weights instead of pixels).
    """
    return _steps(correction, {name: lambda gradient: gradient for name in correction.weights.views})


def null_space(correction: Correction) -> int:
    r"""``margin`` with each matrix's gradient in the null space of what the matrix usually sees.

    :math:`G \leftarrow G (I - V V^\top)`, V the directions that hold 95% of the second moment of its inputs on the
    reference data (Wang et al., "Training Networks in Null Space of Feature Covariance", arXiv 2103.07113). Biases
    stay as they are.

    Raises:
        UserError: a bank without ``up`` and ``down`` matrices; no guard.
    """
    shaping: Shaping = {}
    for target in correction.experts:
        bank_of(target)
        for name, moments in (("up", input_moments(correction, target)), ("down", hidden_moments(correction, target))):
            shaping[f"{target.layer}/{name}"] = _times(_null_projector(moments.second))
    return _steps(correction, shaping)


def low_rank(correction: Correction) -> int:
    r"""Closed-form low-rank edit of the expert's last matrix.

    ``margin`` on ``down`` alone with :math:`G \leftarrow G C^{-1}`, C the covariance of its hidden activations on the
    reference data plus 0.05 of their mean variance. For one token the step is
    :math:`\Delta W_2 = d\,(C^{-1} h)^\top`: the edit that moves the token by d and the reference tokens least in the
    mean square (Meng et al., "Locating and Editing Factual Associations in GPT" (ROME), arXiv 2202.05262, with a
    centred C).

    Raises:
        UserError: a bank without a ``down`` matrix; no guard.
    """
    shaping: Shaping = {}
    for target in correction.experts:
        c = hidden_moments(correction, target).covariance
        ridge = RIDGE * c.diagonal().mean().clamp_min(torch.finfo(torch.float32).tiny)
        eye = torch.eye(len(c), dtype=c.dtype, device=c.device)
        shaping[f"{target.layer}/down"] = _times(torch.linalg.inv(c + ridge * eye))
    return _steps(correction, shaping)


def _null_projector(second: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(second)
    share = values.flip(0).cumsum(0) / values.sum()
    leading = vectors.flip(1)[:, : int((share < KEPT_ENERGY).sum()) + 1]
    projector: Tensor = torch.eye(len(values), dtype=second.dtype, device=second.device) - leading @ leading.T
    return projector


def _times(matrix: Tensor) -> Callable[[Tensor], Tensor]:
    return lambda gradient: gradient @ matrix.to(gradient.dtype)


def _steps(correction: Correction, shaping: Shaping) -> int:
    """Newton steps on the hinge along the shaped gradients."""
    for step in range(correction.max_steps + 1):
        logits = correction.logits()
        if correction.solved(logits) or step == correction.max_steps or not bool(logits.isfinite().all()):
            return step
        hinge = (MARGIN - margins(logits, correction.targets)).clamp_min(0).sum()
        gradients = correction.weights.gradients(hinge)
        with torch.no_grad():
            moves, slope = [], 0.0
            for (name, view), gradient in zip(correction.weights.views.items(), gradients, strict=True):
                if name in shaping:
                    moves.append((view, shaping[name](gradient)))
                    slope += float((gradient * moves[-1][1]).sum())
            if not slope > 0 or not float(hinge) / slope < _LONGEST:
                return step
            for view, move in moves:
                view.sub_(move, alpha=float(hinge) / slope)
    return correction.max_steps
