"""Optimizers and schedules by name: the tables, and what a user gives as ``pkg:name``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.optim.muon import muon
from spectralmoe.optim.plain import Rates, adamw, sgd
from spectralmoe.optim.schedules import constant, cosine, linear
from spectralmoe.spec import find_class

__all__ = ["OPTIMIZERS", "SCHEDULES", "Factory", "Schedule", "find_optimizer", "find_schedule", "make_optimizer"]

Factory = Callable[[nn.Module, Rates], Optimizer]
"""(model, settings with ``lr`` and ``weight_decay``) -> one optimizer of all that is trained."""

Schedule = Callable[[float, float], float]
"""(steps done after the warm-up, all steps after it) -> the factor on the learning rate."""

OPTIMIZERS: dict[str, Factory] = {
    "adamw": adamw,
    "sgd": sgd,
    "muon": muon,
}
SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "constant": constant}


def find_optimizer(name: str) -> Factory:
    """The factory called ``name``, or a user's own, ``pkg:factory``.

    Raises:
        UserError: no such factory; one line with near names.

    >>> find_optimizer("muom")
    Traceback (most recent call last):
    spectralmoe.errors.UserError: unknown optimizer 'muom'; did you mean 'muon'? known: adamw, muon, pkg:factory, sgd
    """
    return _find("optimizer", name, OPTIMIZERS, "pkg:factory")  # type: ignore[no-any-return]


def find_schedule(name: str) -> Schedule:
    """The schedule called ``name``, or a user's own, ``pkg:function``.

    Raises:
        UserError: no such schedule; one line with near names.
    """
    return _find("schedule", name, SCHEDULES, "pkg:function")  # type: ignore[no-any-return]


def _find(kind: str, name: str, table: Mapping[str, Any], form: str) -> Any:
    if name in table:
        return table[name]
    if ":" not in name:
        raise one_of(kind, name, [*table, form])
    function = find_class(name)
    if not callable(function):
        raise UserError(f"{kind} {name!r} is no function")
    return function


def make_optimizer(name: str, model: nn.Module, settings: Rates) -> Optimizer:
    """An optimizer of all parameters of ``model`` that are trained.

    Raises:
        UserError: as ``find_optimizer``; a user's factory fails, or gives something else.

    >>> from types import SimpleNamespace
    >>> optimizer = make_optimizer("muon", nn.Linear(4, 2), SimpleNamespace(lr=0.1, weight_decay=0.0))
    >>> [type(part).__name__ for part in optimizer.parts]
    ['Muon', 'AdamW']
    """
    factory = find_optimizer(name)
    try:
        optimizer = factory(model, settings)
    except UserError:
        raise
    except Exception as error:  # a user's own code
        raise UserError(f"optimizer {name!r} fails as {name}(model, settings): {first_line(error)}") from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer {name!r} gives a {type(optimizer).__name__}, not a torch optimizer")
    return optimizer
