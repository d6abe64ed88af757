"""Parts by name: what the command line and settings files say, read into specs and checked.

A part is a name of its table, ``"prototype"``; or a table with arguments, ``{type = "topp", p = 0.7}``; or
``pkg:Class`` of a user. What the network around it knows (``FILLED_IN``) is left out.
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
"""The kinds of parts: their table, and the base class of a user's classes. An argument of that name is such a part."""

FILLED_IN = ("dim", "num_experts", "hidden", "bottleneck", "spare", "k")
"""Arguments that a part gets from the network if they are left out."""

_FIXED = ("dim", "num_experts")
_OWN = re.compile(r"[\w.]+:[\w.]+")
_TERM = ("weight", "layers", "reduce", "scope")


def read_table(text: str) -> dict[str, Any]:
    """The values of an inline TOML table.

    Raises:
        UserError: something else.

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


def shown(value: Any) -> str:
    """A row as one line: text as it is, a table as inline TOML.

    >>> shown({"scorer": {"type": "linear", "bias": True}, "terms": {"load_balance": 0.01}})
    '{scorer = {type = "linear", bias = true}, terms = {load_balance = 0.01}}'
    """
    return value if isinstance(value, str) else _inline(value)


def file_name(row: str) -> str:
    """A row as a part of a file's name; that of a table is its words and a digest.

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
    """Everything of the form ``pkg:object`` that a row or table names.

    >>> own_names('{scorer = {type = "mine:Signs"}, selector = "topk"}')
    ['mine:Signs']
    """
    if isinstance(value, str):
        if value.lstrip().startswith("{"):
            return own_names(read_table(value))
        return [value] if _OWN.fullmatch(value) else []
    if isinstance(value, Mapping):
        value = list(value.values())
    return [name for item in value for name in own_names(item)] if isinstance(value, list | tuple) else []


def named(kind: str, value: Any) -> dict[str, Any]:
    """A name or a table as a table with a type that is known; its arguments are not looked at.

    Raises:
        UserError: neither a name nor a table; a type that is missing, unknown, or of another kind.
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
    """The spec of a part of ``kind``: its type, and arguments that its constructor takes.

    Raises:
        UserError: as ``named``; an argument that is unknown, missing, or the network's to give.

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
    """The class called ``name`` in the table of ``kind``, or a user's own, ``pkg:Class``.

    Raises:
        UserError: an unknown name, a part of another kind, a class that is not of this kind.
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
    """The term called ``name``: a weight, or a table with ``weight`` and more.

    Its ``type`` is a name of the regularizers' table or ``pkg:function``, by default ``name``; ``layers``, ``reduce``
    and ``scope`` are those of ``Term``, all else are arguments of the regularizer, formulas among them
    (``"= num_experts // 4"``).

    Args:
        start: the term of that name so far; what the table leaves out stays as it has it, unless there is a ``type``.

    Raises:
        UserError: an unknown type; an argument that is unknown or missing; a weight that is missing or no number; what
            ``Term`` refuses.

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
