"""Settings as TOML: values read from a file and changed by ``a.b=c``, and settings as text."""

from __future__ import annotations

import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError, first_line, one_of
from spectralmoe.training.settings.base import Settings

__all__ = ["change", "choose_network", "put", "read_toml", "to_toml"]


def read_toml(path: Path) -> dict[str, Any]:
    """The values in a TOML file.

    Raises:
        UserError: missing, unreadable, or not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error
    except RecursionError as error:
        raise UserError(f"{path}: not a readable TOML file (nested too deeply)") from error
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:  # no UTF-8, no TOML, a number of thousands of digits
        raise UserError(f"{path}: not a readable TOML file ({first_line(error)})") from error


def put(values: dict[str, Any], path: str, value: Any) -> None:
    """Set ``values[a][b] = value`` for the path "a.b"; sections that are missing are made.

    Raises:
        UserError: something on the way is no section.

    >>> values = {"depth": 2}
    >>> put(values, "network.k", 1)
    >>> values
    {'depth': 2, 'network': {'k': 1}}
    """
    *sections, key = path.split(".")
    for place, name in enumerate(sections):
        values = values.setdefault(name, {})
        if not isinstance(values, dict):
            raise UserError(f"{path}: {'.'.join(sections[: place + 1])} is a value, not a section")
    values[key] = value


def change(values: dict[str, Any], assignments: Sequence[str]) -> None:
    """Apply ``a.b=c`` to ``values``; c is a TOML value, and plain text where it does not read as one.

    Raises:
        UserError: something else than an assignment.

    >>> values = {"data": "digits", "network": {"k": 2}}
    >>> change(values, ["network.k=soft", "optimization.lr=1e-3", "depth=4"])
    >>> values
    {'data': 'digits', 'network': {'k': 'soft'}, 'optimization': {'lr': 0.001}, 'depth': 4}
    """
    for assignment in assignments:
        path, equals, text = assignment.partition("=")
        path = path.strip()
        if not equals or not all(path.split(".")):
            raise UserError(f"--set {assignment!r} is no assignment such as network.k=2")
        put(values, path, _value(text.strip()))


def choose_network(values: dict[str, Any], network: str) -> None:
    """Let ``values`` describe a network by its name: "sr-moe", or "timm:NAME" for a timm model.

    Raises:
        UserError: another name.

    >>> values = {"backbone": {"name": "vit_small", "frozen": True}}
    >>> choose_network(values, "timm:vit_tiny")
    >>> values
    {'backbone': {'name': 'vit_tiny', 'frozen': True}}
    >>> choose_network(values, "sr-moe")
    >>> values
    {}
    """
    kind, _, name = network.partition(":")
    if network == "sr-moe":
        for section in ("backbone", "moe"):
            values.pop(section, None)
    elif kind == "timm" and name:
        put(values, "backbone.name", name)
    else:
        raise one_of("network", network, ["sr-moe", "timm:NAME"])


def to_toml(settings: Settings) -> str:
    """TOML that reads back as the same settings; what is None is left out.

    >>> from spectralmoe.training.settings.base import Network
    >>> print(to_toml(Network(k="soft")), end="")
    width = 64
    num_experts = 8
    hidden = 32
    spare = 0
    k = "soft"
    """
    import tomlkit

    return tomlkit.dumps(settings.model_dump(mode="json", exclude_none=True))


def _value(text: str) -> Any:
    try:
        read = tomllib.loads(f"value = {text}")
    except (ValueError, RecursionError):
        return text
    return read["value"] if read.keys() == {"value"} else text
