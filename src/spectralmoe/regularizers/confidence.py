"""Confidence loss: a term that teaches experts to state the probability with which they are right.

Zheng, Zhang, Guo, Xu, Maennel & Chen, "Rethinking Gating Mechanism in Sparse MoE: Handling Arbitrary Modality Inputs
with Confidence-Guided Gate" (ConfSMoE), arXiv 2505.19525. Written from the equations.
Differs: the target has no gradient unless the experts have ``detach_target=False``, which is the paper's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from spectralmoe.errors import UserError
from spectralmoe.experts import ConfidentExperts
from spectralmoe.tape import Record, keeps

__all__ = ["class_target", "confidence_loss"]


@keeps("confidence")
def confidence_loss(record: Record, target: Tensor) -> Tensor:
    r"""Compute the mean squared error of the experts' confidence c: :math:`\frac{1}{M} \sum_r (c_r - q_r)^2`.

    There is one row r for each filled slot; without one the loss is 0. The paper adds the loss to that of the task with
    the weight 1. Its target q is the probability that a head on the expert's output alone gives the true class
    (``class_target``).

    Args:
        record: a record of a layer with ``ConfidentExperts`` that kept "confidence".
        target: q (M,), in the order of ``record.order``.

    Raises:
        UserError: the layer has other experts, the record did not keep "confidence", or the target is not (M,).

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> from spectralmoe.experts import ConfidentExperts
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(2)), ConfidentExperts(FeedForward(4, 8, 16)))
    >>> with record(layer, keep="confidence") as tape:
    ...     y = layer(torch.randn(3, 8))
    >>> confidence_loss(tape[0], torch.ones(6)).item()  # every confidence starts at 1/2
    0.25
    """
    bank = getattr(record.layer, "experts", None)
    if not isinstance(bank, ConfidentExperts):
        raise UserError(
            f"confidence_loss: layer {record.name!r} has {type(bank).__name__}, not ConfidentExperts; wrap its "
            "experts in them"
        )
    confidence = record.tensor("confidence")
    if target.shape != confidence.shape:
        raise UserError(
            f"confidence_loss: the target has shape {tuple(target.shape)}, but there are M={len(confidence)} rows"
        )
    target = target.detach() if bank.detach_target else target
    return (confidence - target.to(confidence.dtype)).square().sum() / max(len(confidence), 1)


def class_target(record: Record, head: Callable[[Tensor], Tensor], labels: Tensor) -> Tensor:
    r"""Compute the probability of the true class by a head on an expert's output: :math:`\mathrm{softmax}(h(F(x)))_y`.

    Args:
        record: a record of a layer with ``ConfidentExperts`` that kept "unweighed", the outputs F(x) before the
            confidence weighs them.
        head: h, a function from rows (M, D) to class logits (M, C).
        labels: y, the class of each token, padding included: (N,) int64.

    Returns:
        (M,) in fp32 or float64, in the order of ``record.order``.

    Raises:
        UserError: the record did not keep "unweighed", or the labels are not (N,).

    >>> import torch
    >>> from spectralmoe import FeedForward, LinearScorer, MoE, Router, TopK, record
    >>> from spectralmoe.experts import ConfidentExperts
    >>> layer = MoE(Router(LinearScorer(8, 4), TopK(1)), ConfidentExperts(FeedForward(4, 8, 16)))
    >>> with record(layer, keep="unweighed") as tape:
    ...     y = layer(torch.randn(2, 8))
    >>> class_target(tape[0], lambda rows: torch.zeros(len(rows), 5), torch.tensor([3, 0])).tolist()
    [0.20000000298023224, 0.20000000298023224]
    """
    rows, tokens = record.tensor("unweighed"), record.routing.logits.shape[0]
    if labels.shape != (tokens,):
        raise UserError(f"class_target: the labels have shape {tuple(labels.shape)}, but there are N={tokens} tokens")
    logits = head(rows)
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)
    return scores.gather(1, labels[record.order // record.routing.indices.shape[1]][:, None]).squeeze(1)
