"""Optimizers and schedules by name: the tables, and what a user gives as ``pkg:name``."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn
from torch.optim import Optimizer

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.optim.gradient_mask import mask_central
from spectralmoe.optim.muon import muon
from spectralmoe.optim.orthogonal_experts import OrthogonalExperts
from spectralmoe.optim.plain import Rates, adamw, sgd
from spectralmoe.optim.schedules import constant, cosine, linear
from spectralmoe.spec import check_arguments, find_class, parameters_of

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "WRAPPERS",
    "Factory",
    "Schedule",
    "arguments_of",
    "find_optimizer",
    "find_schedule",
    "make_optimizer",
    "read_optimizer",
]

Factory = Callable[[nn.Module, Rates], Optimizer]
"""(model, settings with ``lr`` and ``weight_decay``) -> one optimizer of all that is trained."""

Schedule = Callable[[float, float], float]
"""(steps done after the warm-up, all steps after it) -> the factor on the learning rate."""

OPTIMIZERS: dict[str, Factory] = {
    "adamw": adamw,
    "sgd": sgd,
    "muon": muon,
}
WRAPPERS: dict[str, Callable[..., Any]] = {
    "orthogonal_experts": OrthogonalExperts,
    "mask_central": mask_central,
}
"""What a row of a comparison may put around the optimizer of all rows: called as (optimizer, model, **arguments)."""

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


def arguments_of(name: str) -> list[str]:
    """What a row may say of the wrapper or optimizer called ``name``, beside its name.

    >>> arguments_of("orthogonal_experts")[:2], arguments_of("muon")
    (['phase', 'alpha'], [])
    """
    return list(parameters_of(_of_row(name)))[2:]


def read_optimizer(value: Any) -> dict[str, Any]:
    """What a row says of its optimizer, with arguments that are known: a name, or a table with ``type``.

    Raises:
        UserError: neither of them; an unknown name or argument.

    >>> read_optimizer("orthogonal_experts")
    {'type': 'orthogonal_experts'}
    """
    spec = {"type": value} if isinstance(value, str) else dict(value) if isinstance(value, Mapping) else {}
    if not isinstance(spec.get("type"), str):
        raise UserError(f'optimizer = {value!r} is neither a name nor a table such as {{type = "orthogonal_experts"}}')
    function = _of_row(spec["type"])
    check_arguments(
        function, spec["type"], [*list(parameters_of(function))[:2], *(key for key in spec if key != "type")]
    )
    return spec


def _of_row(name: str) -> Callable[..., Any]:
    """The wrapper, or the factory in place of that of all rows."""
    return _find("optimizer", name, {**WRAPPERS, **OPTIMIZERS}, "pkg:factory")  # type: ignore[no-any-return]


def make_optimizer(name: str, model: nn.Module, settings: Rates, *, row: Mapping[str, Any] | None = None) -> Optimizer:
    """An optimizer of all parameters of ``model`` that are trained.

    Args:
        row: what the row of the network says of it, as ``read_optimizer`` gives it: something of ``WRAPPERS`` goes
            around the optimizer ``name``, a factory is called in its place, as (model, settings, **arguments).

    Raises:
        UserError: as ``find_optimizer``; a wrapper or a user's factory fails, or gives something else.

    >>> from types import SimpleNamespace
    >>> optimizer = make_optimizer("muon", nn.Linear(4, 2), SimpleNamespace(lr=0.1, weight_decay=0.0))
    >>> [type(part).__name__ for part in optimizer.parts]
    ['Muon', 'AdamW']
    """
    called, arguments = name, dict(row or {})
    if row is not None:
        called = arguments.pop("type")
    try:
        if called in WRAPPERS:
            optimizer = make_optimizer(name, model, settings)
            WRAPPERS[called](optimizer, model, **arguments)
        else:
            optimizer = (find_optimizer(name) if row is None else _of_row(called))(model, settings, **arguments)
    except UserError:
        raise
    except Exception as error:  # a user's own code
        form = "(optimizer, model)" if called in WRAPPERS else "(model, settings)"
        raise UserError(f"optimizer {called!r} fails as {called}{form}: {first_line(error)}") from error
    if not isinstance(optimizer, Optimizer):
        raise UserError(f"optimizer {called!r} gives a {type(optimizer).__name__}, not a torch optimizer")
    return optimizer
