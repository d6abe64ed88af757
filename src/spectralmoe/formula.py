"""Formulas: text such as ``"= dim ** -0.5"`` in a spec, for values that follow from the sizes of the network."""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from spectralmoe.errors import UserError, one_of

__all__ = ["Sized", "evaluate", "is_formula"]

_LARGEST = 10**9
_OPERATORS: dict[type[ast.AST], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Pow: pow,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {"min": min, "max": max}


def is_formula(value: object) -> bool:
    """Return whether ``value`` is text that begins with an equals sign, as in a spreadsheet."""
    return isinstance(value, str) and value.startswith("=")


def evaluate(text: str, sizes: Mapping[str, Any]) -> Any:
    """Compute a formula, which may use numbers, the names in ``sizes``, + - * / // **, min and max.

    Raises:
        UserError: the formula holds anything else, an unknown name, or a number beyond 10^9.

    >>> evaluate("= min(128, dim)", {"dim": 64}), evaluate("= dim ** -0.5", {"dim": 64})
    (64, 0.125)
    """
    try:
        return _value(ast.parse(text[1:].strip(), mode="eval").body, sizes)
    except UserError as error:
        raise UserError(f"formula {text!r}: {error}") from error
    except (SyntaxError, ValueError, ArithmeticError, TypeError, RecursionError, MemoryError) as error:
        raise UserError(f"formula {text!r} is no arithmetic such as '= min(128, dim)'") from error


class Sized(partial[Tensor]):
    """A regularizer with its options, some of which are formulas; they are computed for the layer of each record.

    Formulas may name ``num_experts`` and ``k``, the E and K of the record's routing; of several records, the first's.

    >>> import torch
    >>> from types import SimpleNamespace
    >>> routing = SimpleNamespace(num_experts=8, indices=torch.zeros(5, 2))
    >>> term = Sized(lambda record, groups, form: (groups, form), groups="= num_experts // 4", form=1)
    >>> term(SimpleNamespace(routing=routing))
    (2, 1)
    """

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Sized) and (self.func, self.keywords) == (other.func, other.keywords)

    def __hash__(self) -> int:
        return hash(self.func)

    def __call__(self, given: Any) -> Tensor:
        routing = (given[0] if isinstance(given, list | tuple) else given).routing
        sizes = {"num_experts": routing.num_experts, "k": routing.indices.shape[1]}
        options = {n: evaluate(value, sizes) if is_formula(value) else value for n, value in self.keywords.items()}
        return self.func(given, **options)


def _value(node: ast.expr, sizes: Mapping[str, Any]) -> Any:
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        return _bounded(node.value)
    if isinstance(node, ast.Name):
        if node.id not in sizes:
            raise one_of("name", node.id, sizes)
        return sizes[node.id]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, sizes)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, sizes), _value(node.right, sizes)
        if isinstance(node.op, ast.Pow) and abs(right) > 8:
            raise UserError(f"the exponent {right} is beyond 8")
        return _bounded(_OPERATORS[type(node.op)](left, right))
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        return _FUNCTIONS[node.func.id](*(_value(argument, sizes) for argument in node.args))
    raise ValueError(ast.unparse(node))


def _bounded(number: Any) -> Any:
    if isinstance(number, complex) or not abs(number) <= _LARGEST:
        raise UserError(f"{number} is beyond {_LARGEST}")
    return number
