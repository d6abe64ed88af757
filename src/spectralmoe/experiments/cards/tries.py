"""Equal tuning: settings that a row tries, and the one that validation data prefer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from spectralmoe.errors import UserError
from spectralmoe.training.loop import Diverged

__all__ = ["Tried", "try_settings"]


class Tried(NamedTuple):
    """What a row's tries came to.

    Attributes:
        tries: every setting with its "validation_accuracy", None where training diverged.
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
) -> Tried:
    """Train with each setting.

    Args:
        train: a setting -> the validation accuracy that it reaches, and what else is wanted of the best.

    Raises:
        UserError: training diverged with every setting.

    >>> tried = try_settings([{"lr": 1e-3}, {"lr": 1e-2}], lambda setting: (90 + setting["lr"], "a network"), print)
    0.0
    0.5
    >>> tried.setting, tried.tries[0]
    ({'lr': 0.01}, {'lr': 0.001, 'validation_accuracy': 90.001})
    """
    tries: list[dict[str, Any]] = []
    best: tuple[float, Mapping[str, Any], Any] | None = None
    for index, setting in enumerate(settings):
        progress(index / len(settings))
        try:
            accuracy, made = train(setting)
        except Diverged:
            tries.append({**setting, "validation_accuracy": None})
            continue
        tries.append({**setting, "validation_accuracy": accuracy})
        if best is None or accuracy > best[0]:
            best = (accuracy, setting, made)
    if best is None:
        raise UserError(f"training diverged with every setting that was tried: {list(map(dict, settings))}")
    return Tried(tries, *best[1:])
