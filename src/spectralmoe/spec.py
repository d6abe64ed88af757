"""Specs: they describe the structure of a model in plain JSON values, and models are built from them.

A spec is ``{"type": name in a table or "pkg:Class", argument: value, ...}``. The arguments are those of the
constructor; each is an attribute of the object with the same name, or is given by its ``spec_arguments()``. Only
classes in the tables are built; any other class must be allowed by the caller.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from torch import nn

from spectralmoe.dispatch import DISPATCHES
from spectralmoe.errors import UserError, one_of
from spectralmoe.experts import EXPERTS, MODULES
from spectralmoe.formula import evaluate, is_formula
from spectralmoe.layers import unwrapped
from spectralmoe.moe import MoE
from spectralmoe.placement import Placement
from spectralmoe.router import Router
from spectralmoe.scorers import SCORERS, StatisticsMemory
from spectralmoe.selectors import SELECTORS
from spectralmoe.torch_private import class_of
from spectralmoe.units import UNITS

__all__ = ["build", "check_arguments", "describe", "find_class", "parameters_of"]

PARTS: dict[str, type] = {
    **SCORERS,
    **SELECTORS,
    **EXPERTS,
    **MODULES,
    **DISPATCHES,
    **UNITS,
    "router": Router,
    "placement": Placement,
    "statistics_memory": StatisticsMemory,
    "moe": MoE,
}


def describe(part: Any, *, tables: Mapping[str, type] | None = None) -> Any:
    """Return the spec of ``part``, a module of this library, a class of a user, or a plain value.

    Args:
        tables: name -> class; None takes the parts of an MoE layer.

    Raises:
        UserError: an argument of a constructor is no attribute, or the constructor cannot be read.

    >>> from spectralmoe import TopK
    >>> describe(TopK(2))
    {'type': 'topk', 'k': 2, 'normalize': False, 'score': 'softmax'}
    """
    if part is None or isinstance(part, bool | int | float | str):
        return part
    if isinstance(part, list | tuple | nn.ModuleList):
        return [describe(item, tables=tables) for item in part]
    if isinstance(part, dict):
        return {str(name): describe(value, tables=tables) for name, value in part.items()}
    part = unwrapped(part) if isinstance(part, nn.Module) else part
    cls = class_of(part)
    names = {known: name for name, known in (tables or PARTS).items()}
    kind = names.get(cls, f"{cls.__module__}:{cls.__qualname__}")
    overrides = part.spec_arguments() if hasattr(part, "spec_arguments") else {}
    arguments = {}
    for name in parameters_of(cls):
        if name not in overrides and not hasattr(part, name):
            raise UserError(
                f"{cls.__name__} cannot be described: it does not keep its argument {name!r}; set self.{name} in its "
                "constructor"
            )
        arguments[name] = describe(overrides.get(name, getattr(part, name, None)), tables=tables)
    return {"type": kind, **arguments}


def build(
    spec: Any,
    *,
    allow: Sequence[str] = (),
    tables: Mapping[str, type] | None = None,
    sizes: Mapping[str, Any] | None = None,
) -> Any:
    """Build the object that ``spec`` describes.

    Args:
        allow: classes outside the tables that may be built, as "pkg:Class". Building one runs its code.
        tables: name -> class; None takes the parts of an MoE layer.
        sizes: the sizes of the network (``dim``, ``num_experts``, ...), for arguments that the spec leaves out and for
            formulas (``"= min(128, dim)"``). With None, formulas are not computed.

    Raises:
        UserError: a type is neither in a table nor allowed, or its constructor does not take the arguments.

    >>> build({"type": "topk", "k": 2}).k
    2
    >>> build({"type": "prototype", "scale": "= dim ** -0.5"}, sizes={"dim": 4, "num_experts": 3}).scale
    0.5
    """
    if isinstance(spec, list):
        return [build(item, allow=allow, tables=tables, sizes=sizes) for item in spec]
    if sizes is not None and is_formula(spec):
        return evaluate(spec, sizes)
    if not isinstance(spec, Mapping):
        return spec
    if "type" not in spec:
        return {name: build(value, allow=allow, tables=tables, sizes=sizes) for name, value in spec.items()}
    kind = spec["type"]
    cls: Any = (tables or PARTS).get(kind) if isinstance(kind, str) else None
    if cls is None:
        if kind not in tuple(allow):
            raise UserError(
                f"type {kind!r} is not one of spectralmoe's own and was not allowed; "
                f"if you trust it, pass allow=[{kind!r}]"
            )
        cls = find_class(kind)
    written = {name: value for name, value in spec.items() if name != "type"}
    arguments = {n: build(value, allow=allow, tables=tables, sizes=sizes) for n, value in written.items()}
    filled_in = {name: size for name, size in (sizes or {}).items() if name in parameters_of(cls)}
    arguments = {**filled_in, **arguments}
    check_arguments(cls, kind, arguments)
    return cls(**arguments)


def check_arguments(cls: Any, kind: str, arguments: Collection[str]) -> None:
    """Check that ``cls`` takes all ``arguments`` (names), and that none is missing.

    Args:
        kind: what the caller calls ``cls``, for the error message.

    Raises:
        UserError: an argument is unknown or missing.
    """
    parameters = parameters_of(cls)
    takes_any = any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    unknown = [name for name in arguments if name not in parameters]
    if unknown and not takes_any:
        raise one_of(f"argument of {kind!r}", unknown[0], list(parameters))
    missing = [n for n, p in parameters.items() if p.default is p.empty and n not in arguments and p.kind not in (2, 4)]
    if missing:
        raise UserError(f"{kind!r} needs the argument {missing[0]!r}")


def parameters_of(cls: Any) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a constructor or function by name.

    Raises:
        UserError: they cannot be read, as those of some builtin types.
    """
    try:
        return inspect.signature(cls).parameters
    except (TypeError, ValueError) as error:
        raise UserError(f"{cls!r} has no readable constructor") from error


def find_class(path: str) -> Any:
    """Import the class or function that "pkg.module:Name" names; this runs the module's code.

    Raises:
        UserError: ``path`` has another form, the module cannot be imported, or it has no such name.
    """
    module_name, _, class_name = path.partition(":")
    if not module_name or not class_name:
        raise UserError(f"{path!r} is not of the form pkg.module:Class")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # the module's own code runs here
        raise UserError(f"{path!r}: cannot import {module_name!r} ({error})") from error
    value: Any = module
    for part in class_name.split("."):
        value = getattr(value, part, None)
    if value is None:
        raise UserError(f"{path!r}: module {module_name!r} has no {class_name!r}")
    return value
