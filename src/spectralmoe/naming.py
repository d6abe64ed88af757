"""Reads and checks the parts of a network as the command line and settings files name them.

A part (a scorer, selector or bank of experts) is a name, ``"prototype"``; or a table with arguments,
``{type = "topp", p = 0.7}``; or a class of your own, ``pkg:Class``. Arguments that follow from the network
(``FILLED_IN``) are left out.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from torch import Tensor

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.experts import EXPERTS, Experts
from spectralmoe.formula import Sized, is_formula
from spectralmoe.regularizers import REGULARIZERS
from spectralmoe.scorers import SCORERS, Scorer
from spectralmoe.selectors import SELECTORS, Selector
from spectralmoe.spec import check_arguments, find_class, parameters_of
from spectralmoe.tape import said
from spectralmoe.terms import Term

__all__ = [
    "FILLED_IN",
    "KINDS",
    "Table",
    "file_name",
    "named",
    "own_names",
    "part_class",
    "read_part",
    "read_row",
    "read_table",
    "read_term",
    "shown",
]

Table = Mapping[str, Any]

KINDS: dict[str, tuple[Mapping[str, type], type]] = {
    "scorer": (SCORERS, Scorer),
    "selector": (SELECTORS, Selector),
    "experts": (EXPERTS, Experts),
}
"""Kind of part -> its table of names, and the base class for classes of a user. Arguments so named are such parts."""

FILLED_IN = ("dim", "num_experts", "hidden", "bottleneck", "spare", "k")
"""The arguments that a part gets from the network if they are left out."""

_FIXED = ("dim", "num_experts")
_OWN = re.compile(r"[\w.]+:[\w.]+")
_TERM = ("weight", "layers", "reduce", "scope")


def read_table(text: str) -> dict[str, Any]:
    """Read an inline TOML table.

    Raises:
        UserError: ``text`` is no such table.

    >>> read_table('{scorer = "prototype", selector = "topp", p = 0.7}')
    {'scorer': 'prototype', 'selector': 'topp', 'p': 0.7}
    """
    example = 'a table such as {scorer = "prototype", selector = "topk"}, names in quotes'
    try:
        read = tomllib.loads(f"row = {text}")
    except (ValueError, RecursionError) as error:
        reason = first_line(error).partition(" (at ")[0]  # of a line and column with another beginning
        raise UserError(f"{text!r} does not read as {example} ({reason})") from error
    if read.keys() != {"row"} or not isinstance(read["row"], dict):
        raise UserError(f"{text!r} is not {example}")
    return read["row"]


def read_row(row: Any) -> Any:
    """Return a row of a comparison that is the text of a table as that table, and any other as it is.

    Raises:
        UserError: as ``read_table``.
    """
    return read_table(row) if isinstance(row, str) and row.lstrip().startswith("{") else row


def shown(value: Any) -> str:
    """Return a row of a comparison as one line: a name as it is, a table as inline TOML.

    >>> shown({"scorer": {"type": "linear", "bias": True}, "terms": {"load_balance": 0.01}})
    '{scorer = {type = "linear", bias = true}, terms = {load_balance = 0.01}}'
    """
    return value if isinstance(value, str) else _inline(value)


def file_name(row: str) -> str:
    """Return a row of a comparison in a form for file names; that of a table is its words and a digest.

    >>> file_name("my.module:Signs"), file_name('{scorer = "linear", k = 1}')
    ('my.module_Signs', 'scorer_linear_k_1-9e978b47')
    """
    if not row.startswith("{"):
        return re.sub(r"[^A-Za-z0-9+_.-]", "_", row)
    words = "_".join(re.findall(r"[A-Za-z0-9+.-]+", row))[:60]
    return f"{words}-{hashlib.sha256(row.encode()).hexdigest()[:8]}"


def _inline(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{_key(str(name))} = {_inline(item)}" for name, item in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(_inline, value)) + "]"
    return json.dumps(value) if isinstance(value, str | bool | int | float) else json.dumps(str(value))


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else json.dumps(name)


def own_names(value: Any) -> list[str]:
    """Return all names of the form ``pkg:object`` in a row of a comparison or a table.

    >>> own_names('{scorer = {type = "mine:Signs"}, selector = "topk"}')
    ['mine:Signs']
    """
    value = read_row(value)
    if isinstance(value, str):
        return [value] if _OWN.fullmatch(value) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [name for item in value for name in own_names(item)] if isinstance(value, list | tuple) else []


def named(kind: str, value: Any) -> dict[str, Any]:
    """Return a part, given as a name or a table, as a table with a known ``type``; arguments are not checked.

    Raises:
        UserError: ``value`` is neither a name nor a table, or its type is missing, unknown, or of another kind.
    """
    if not isinstance(value, str | Mapping):
        raise UserError(f'{kind} = {_inline(value)} is neither a name nor a table such as {{type = "..."}}')
    spec: dict[str, Any] = {"type": value} if isinstance(value, str) else dict(value)
    if not isinstance(spec.get("type"), str):
        example = _inline(next(iter(KINDS[kind][0])))
        raise UserError(f"{kind} = {_inline(value)} does not say its type: add type = {example}")
    part_class(kind, spec["type"])
    return spec


def read_part(kind: str, value: Any) -> dict[str, Any]:
    """Return the spec of a part of ``kind``, its type and arguments, after a check.

    Raises:
        UserError: an argument is unknown, missing, or follows from the network; or as ``named``.

    >>> read_part("selector", "topk")
    {'type': 'topk'}
    """
    spec = named(kind, value)
    cls, name = part_class(kind, spec["type"]), spec["type"]
    for argument in _FIXED:
        if argument in spec:
            raise UserError(f"{kind} {name!r}: {argument} comes from the network; leave it out")
    filled_in = {argument for argument in FILLED_IN if argument in parameters_of(cls)}
    check_arguments(cls, name, {*spec, *filled_in} - {"type"})
    return {key: read_part(key, item) if key in KINDS else item for key, item in spec.items()}


def part_class(kind: str, name: str) -> type:
    """Return the class called ``name`` in the table of ``kind``, or a class of a user, ``pkg:Class``.

    Raises:
        UserError: the name is unknown or of another kind, or the class has another base.
    """
    table, base = KINDS[kind]
    if name in table:
        return table[name]
    if ":" in name:
        cls = find_class(name)
        if not (isinstance(cls, type) and issubclass(cls, base)):
            raise UserError(f"{kind} {name!r} is not a subclass of spectralmoe.{base.__name__}")
        return cls
    for other, (names, _) in KINDS.items():
        if name in names:
            there, here = (f"{each.removesuffix('s')}s" for each in (other, kind))
            raise UserError(f"{kind} {name!r}: that is a name of the {there}; the {here} are {', '.join(table)}")
    raise one_of(kind, name, [*table, "pkg:Class"])


def read_term(name: str, value: Any, start: Term | None = None) -> Term:
    """Read a term of the training loss, given as a weight or as a table with ``weight`` and more.

    In a table, ``type`` is a name in ``REGULARIZERS`` or ``pkg:function``, by default ``name``. ``layers``, ``reduce``
    and ``scope`` are those of ``Term``. All else are arguments of the regularizer; they may be formulas
    (``"= num_experts // 4"``).

    Args:
        start: the term of this name so far; the table changes only what it says, unless it has a ``type``.

    Raises:
        UserError: the type is unknown; an argument is unknown or missing; the weight is missing or no number; or
            ``Term`` refuses a value.

    >>> read_term("load_balance", 0.01).weight
    0.01
    """
    options = dict(value) if isinstance(value, Mapping) else {"weight": value}
    start = None if "type" in options else start
    fn = _regularizer(options.pop("type", name)) if start is None else start.fn
    fields = {key: options.pop(key) for key in _TERM if key in options}
    weight = fields.get("weight", start.weight if start else None)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
        raise UserError(f"term {name!r} needs a weight, such as {_key(name)} = 0.01")
    fn = _with_options(name, fn, options)
    return Term(fn, **fields) if start is None else replace(start, fn=fn, keeps=said(fn)[0] or start.keeps, **fields)


def _with_options(name: str, fn: Callable[..., Tensor], options: Table) -> Callable[..., Tensor]:
    """The regularizer ``fn``, which may have options already, with these."""
    known = dict(list(parameters_of(fn).items())[1:])
    for argument in options:
        if argument not in known:
            raise one_of(f"argument of term {name!r}", argument, [*known, *_TERM])
    for argument, parameter in known.items():
        if argument not in options and parameter.default is parameter.empty and parameter.kind not in (2, 4):
            raise UserError(f"term {name!r} needs the argument {argument!r}")
    if not options:
        return fn
    if isinstance(fn, Sized):
        options, fn = {**fn.keywords, **options}, fn.func
    return (Sized if any(map(is_formula, options.values())) else partial)(fn, **options)


def _regularizer(name: Any) -> Callable[..., Tensor]:
    if name in REGULARIZERS:
        return REGULARIZERS[name]
    if not isinstance(name, str) or ":" not in name:
        raise one_of("term", name, [*REGULARIZERS, "pkg:function"])
    fn: Callable[..., Tensor] = find_class(name)
    if not callable(fn):
        raise UserError(f"term {name!r} is not a function")
    return fn
