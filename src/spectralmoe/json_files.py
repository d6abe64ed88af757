"""JSON: values as text, written whole or not at all, and read with one line for what is wrong."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError
from spectralmoe.files import exists, write_text

__all__ = ["dotted", "read_json", "to_json", "write_json"]


def write_json(path: Path, value: Any) -> None:
    """Write ``value`` as indented JSON, whole or not at all. Infinite and undefined numbers become null.

    Raises:
        UserError: as ``write_whole`` and ``to_json``.
    """
    write_text(path, to_json(value))


def to_json(value: Any) -> str:
    """Return ``value`` as indented JSON text; infinite and undefined numbers become null.

    Raises:
        UserError: it holds something that JSON cannot.
    """
    try:
        return json.dumps(_finite(value), indent=1, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as error:
        raise UserError(f"not a value for JSON ({error})") from error


def dotted(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return nested settings as one level with dotted keys.

    >>> dotted({"network": {"k": 2}, "seed": 0})
    {'network.k': 2, 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for name, value in values.items():
        inner = dotted(value) if isinstance(value, Mapping) else None
        flat |= {name: value} if inner is None else {f"{name}.{key}": each for key, each in inner.items()}
    return flat


def read_json(path: Path) -> Any:
    """Read the JSON value in ``path``, with or without a byte order mark.

    Raises:
        UserError: the file is missing, unreadable, or not JSON.
    """
    if not exists(path) and not path.is_symlink():
        raise UserError(f"{path}: no such file")
    try:
        return json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not a readable JSON file ({str(error).splitlines()[0]})") from error


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and (not math.isfinite(value)):
        return None
    return value
