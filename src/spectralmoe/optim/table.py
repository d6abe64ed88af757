"""Tables of optimizers and schedules by name, and functions that look them up."""

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
"""A function (model, settings with ``lr`` and ``weight_decay``) -> optimizer of all trained parameters."""

Schedule = Callable[[float, float], float]
"""A function (steps done after the warm-up, number of steps after it) -> factor on the learning rate."""

OPTIMIZERS: dict[str, Factory] = {
    "adamw": adamw,
    "sgd": sgd,
    "muon": muon,
}
WRAPPERS: dict[str, Callable[..., Any]] = {
    "orthogonal_experts": OrthogonalExperts,
    "mask_central": mask_central,
}
"""What a preset may put around the optimizer that all share: functions called as (optimizer, model, **arguments)."""

SCHEDULES: dict[str, Schedule] = {"cosine": cosine, "linear": linear, "constant": constant}


def find_optimizer(name: str) -> Factory:
    """Return the function of ``OPTIMIZERS`` called ``name``, or one of your own, ``pkg:function``.

    Raises:
        UserError: there is no such function; the message lists similar names.

    >>> find_optimizer("muom")
    Traceback (most recent call last):
    spectralmoe.errors.UserError: unknown optimizer 'muom'; did you mean 'muon'? known: adamw, muon, pkg:factory, sgd
    """
    return _find("optimizer", name, OPTIMIZERS, "pkg:factory")  # type: ignore[no-any-return]


def find_schedule(name: str) -> Schedule:
    """Return the schedule called ``name``, or one of your own, ``pkg:function``.

    Raises:
        UserError: there is no such schedule; the message lists similar names.

    >>> find_schedule("linear")(25, 100)
    0.75
    """
    return _find("schedule", name, SCHEDULES, "pkg:function")  # type: ignore[no-any-return]


def _find(kind: str, name: str, table: Mapping[str, Any], form: str) -> Any:
    if name in table:
        return table[name]
    if ":" not in name:
        raise one_of(kind, name, [*table, form])
    function = find_class(name)
    if not callable(function):
        raise UserError(f"{kind} {name!r} is no function; name one as pkg:function")
    return function


def arguments_of(name: str) -> list[str]:
    """Return the arguments that a preset may give the wrapper or optimizer called ``name``.

    >>> arguments_of("orthogonal_experts")[:2], arguments_of("muon")
    (['phase', 'alpha'], [])
    """
    return list(parameters_of(_of_row(name)))[2:]


def read_optimizer(value: Any) -> dict[str, Any]:
    """Check what a preset says of its optimizer, a name or a table with ``type``, and return it as a table.

    Raises:
        UserError: it is neither, or a name or an argument is unknown.

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
    """Make an optimizer of all trained parameters of ``model``.

    Args:
        name: an optimizer, as ``find_optimizer`` takes it.
        settings: the learning rate and the weight decay.
        row: what a preset says of its optimizer, as ``read_optimizer`` returns it: a wrapper of ``WRAPPERS`` goes
            around the optimizer ``name``; an optimizer is used in its place.

    Raises:
        UserError: as ``find_optimizer``; or a function fails or returns no torch optimizer.

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
