"""Equal tuning: settings that a row tries, and the one that validation data prefer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spectralmoe.errors import UserError
from spectralmoe.training.loop import Diverged
from spectralmoe.training.tasks import Metric
from spectralmoe.training.tasks.classification import ACCURACY

__all__ = ["Tried", "try_settings"]


class Tried(NamedTuple):
    """The result of a row's tries.

    Attributes:
        tries: every setting with its value of the metric ("validation_accuracy"), None where training diverged.
        setting: the best; the first of equal ones.
        made: what the training with it made.
    """

    tries: list[dict[str, Any]]
    setting: Mapping[str, Any]
    made: Any


def try_settings(
    settings: Sequence[Mapping[str, Any]],
    train: Callable[[Mapping[str, Any]], tuple[float, Any]],
    progress: Callable[[float], None],
    metric: Metric = ACCURACY,
) -> Tried:
    """Train with each setting.

    Args:
        train: a setting -> the value of ``metric`` that it reaches on validation data, and what else is wanted of the
            best.
        metric: what the settings are compared by.

    Raises:
        UserError: training diverged with every setting.

    >>> tried = try_settings([{"lr": 1e-3}, {"lr": 1e-2}], lambda setting: (90 + setting["lr"], "a network"), print)
    0.0
    0.5
    >>> tried.setting, tried.tries[0]
    ({'lr': 0.01}, {'lr': 0.001, 'validation_accuracy': 90.001})
    """
    tries: list[dict[str, Any]] = []
    key = metric.key_of("validation")
    best: tuple[float, Mapping[str, Any], Any] | None = None
    for index, setting in enumerate(settings):
        progress(index / len(settings))
        try:
            value, made = train(setting)
        except Diverged:
            tries.append({**setting, key: None})
            continue
        tries.append({**setting, key: value})
        if best is None or metric.rank(value) > metric.rank(best[0]):
            best = (value, setting, made)
    if best is None:
        raise UserError(
            f"training diverged with every setting that was tried: {list(map(dict, settings))}; try lower rates"
        )
    return Tried(tries, *best[1:])
