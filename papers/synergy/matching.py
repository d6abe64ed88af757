"""The weight of the entropy term that gives the routing entropy of another row."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from spectralmoe.diagnostics.entropy import token_entropy
from spectralmoe.experiments.cards import Contest, Desk, Trained, train_row
from spectralmoe.experiments.cards.plan import Share
from spectralmoe.experiments.compare.setup import Tuned
from spectralmoe.recorder import record

__all__ = ["entropy_of", "interpolated", "match_row", "with_entropy"]

INPUTS = 64


@torch.no_grad()
def entropy_of(trained: Trained) -> float:
    """Mean routing entropy over log E on validation windows, mean over layers."""
    network = trained.network.eval()
    with record(network) as tape:
        network(trained.task.inputs("validation")[:INPUTS])
    values = [token_entropy(item.routing).value for item in tape]
    return sum(values) / len(values)


def with_entropy(row: Mapping[str, Any], weight: float) -> dict[str, Any]:
    """The row with the entropy term beside its own."""
    return {**row, "terms": {**row["terms"], "entropy": {"type": "controls:routing_entropy", "weight": weight}}}


def match_row(
    row: str, desk: Desk, progress: Share, *, contest: Contest, like: str, base: str, weights: Sequence[float]
) -> dict[str, Any]:
    """Tuned factors of ``like``, and the weight with which ``base`` and the entropy term have its routing entropy.

    Networks are trained as in tuning, one for each of ``weights``.
    """
    torch.set_num_threads(1)
    setting = desk.tuned[contest.tuned][like]["setting"]
    tuned = Tuned(**setting)
    target = entropy_of(train_row(contest.shorter, contest.rows[like], tuned, 0))
    tries = []
    for turn, weight in enumerate(weights):
        progress((1 + turn) / (1 + len(weights)))
        trained = train_row(contest.shorter, with_entropy(contest.rows[base], weight), tuned, 0)
        tries.append({"weight": weight, "entropy": entropy_of(trained)})
    found = interpolated(target, [(each["entropy"], each["weight"]) for each in tries])
    return {row: {"setting": setting, "weight": found, "target": target, "tries": tries}}


def interpolated(target: float, tried: Sequence[tuple[float, float]]) -> float:
    """The weight at the entropy ``target``, on the lines between (entropy, log weight) of those tried; the nearest
    weight where the target lies outside them.

    >>> round(interpolated(0.5, [(0.8, 0.01), (0.6, 0.1), (0.4, 1.0)]), 4), interpolated(0.9, [(0.8, 0.01), (0.6, 0.1)])
    (0.3162, 0.01)
    """
    points = sorted(tried)
    low, weight = points[0]
    if target <= low:
        return weight
    for entropy, other in points[1:]:
        if target <= entropy:
            share = (target - low) / (entropy - low)
            return math.exp((1 - share) * math.log(weight) + share * math.log(other))
        low, weight = entropy, other
    return weight
