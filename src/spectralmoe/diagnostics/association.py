"""Association of experts with labels: it measures which classes, topics or kinds of token an expert serves."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from spectralmoe.diagnostics.measure import Measure
from spectralmoe.diagnostics.paths import mutual_information
from spectralmoe.errors import UserError
from spectralmoe.routing import EMPTY, Routing, count_slots

__all__ = ["EXPECTED_SLOTS", "association", "label_table", "specialisation"]

EXPECTED_SLOTS = 5
"""A label counts for an expert that would have this many slots of it if it had no preference."""


def label_table(routing: Routing, labels: Tensor, num_labels: int) -> Tensor:
    """Count for each label and expert the slots of tokens with that label: (labels, E) int64.

    Tables of several batches can be added up. In soft routing a token counts once, for the expert with its largest
    weight, as in ``Routing.load``.

    Args:
        labels: integers, one for each token (N,) or for each sequence (B,); a number below 0 is no label.
        num_labels: the number of labels.

    Raises:
        UserError: there is not one label for each token or sequence, or a label is ``num_labels`` or more.

    >>> logits = torch.zeros(3, 2)
    >>> routing = Routing(logits, torch.ones(3, 1), torch.tensor([[0], [1], [1]]), logits)
    >>> label_table(routing, torch.tensor([0, 2, 2]), num_labels=3).tolist()
    [[1, 0], [0, 0], [0, 2]]
    """
    n, e, shape = len(routing.logits), routing.num_experts, routing.shape or ()
    labels = labels.reshape(-1).to(routing.indices.device).long()
    if len(labels) != n:
        if len(shape) < 2 or len(labels) != shape[0]:
            ways = f"N={n} tokens" + (f" and B={shape[0]} sequences" if len(shape) > 1 else "")
            raise UserError(f"label_table: {len(labels)} labels for {ways}; give one a token or one a sequence")
        labels = labels.repeat_interleave(n // len(labels))
    if n and int(labels.max()) >= num_labels:
        raise UserError(f"label_table: label {int(labels.max())}, but num_labels is {num_labels}")
    slots = routing.top_expert()[:, None] if routing.soft else routing.indices
    counted = (slots >= 0) & (slots < e) & (labels >= 0)[:, None]
    return count_slots(torch.where(counted, labels[:, None] * e + slots, EMPTY), num_labels * e).reshape(num_labels, e)


def association(table: Tensor) -> Measure:
    """Measure how much the expert tells about the label, from 0 to 1, by a table (labels, E) of slots.

    It is ``mutual_information``, which assumes that slots are independent draws. Those of one token or one sequence are
    not, so a value near 0 may be chance.
    """
    return mutual_information(table, unit="slots")


def specialisation(table: Tensor) -> list[Measure]:
    r"""Compute each expert's lift by a table (labels, E) of slots: how much more often it serves its favourite label.

    The lift is :math:`\max_l P(l \mid e)/P(l)`, 1 for an expert without a preference. Only labels count of which the
    expert would have at least ``EXPECTED_SLOTS`` slots without a preference; if there is none, there is no data.

    >>> [str(lift) for lift in specialisation(torch.tensor([[90, 10, 0], [10, 90, 1]]))]
    ['1.81 (100 slots)', '1.79 (100 slots)', 'no data (1 of 10 slots)']
    """
    total, common, slots = int(table.sum()), table.sum(1), table.sum(0)
    if not total:
        return [Measure.of(math.nan, 0, "slots")] * table.shape[1]
    expected = common[:, None] * slots
    lifts = torch.where(expected >= EXPECTED_SLOTS * total, table.double() * total / expected, -math.inf).amax(0)
    needs = -(-EXPECTED_SLOTS * total // int(common.max()))
    return [Measure.of(lift, n, "slots", needs) for lift, n in zip(lifts.tolist(), slots.tolist(), strict=True)]
