"""Numbers of experts in the ``config.json`` of a model."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from spectralmoe.errors import UserError
from spectralmoe.json_files import read_json

__all__ = ["experts_of_config", "read_model_config", "top_k_of_config"]

_TOP_K = ("num_experts_per_tok", "num_experts_per_token", "experts_per_token", "moe_top_k", "moe_topk", "moe_k")
_COUNT = re.compile(r"(?:num|n)(?:_\w+)?_experts")
_SWITCHES = ("is_moe", "use_moe")


def read_model_config(path: Path) -> dict[str, Any]:
    """The config in the folder ``path``, or beside the file ``path``; empty without.

    Raises:
        UserError: it is not the config of a model.
    """
    file = (path if path.is_dir() else path.parent) / "config.json"
    config = read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        raise UserError(f"{file} is not the config of a model; fetch it again, or remove it")
    return config


def experts_of_config(config: Mapping[str, Any]) -> dict[str, int]:
    """The numbers of experts in any part of a model's config: key -> how many, shared ones and a single one left out.

    >>> experts_of_config({"ffn_config": {"moe_num_experts": 8}, "n_shared_experts": 2})
    {'ffn_config.moe_num_experts': 8}
    """
    if any(config.get(switch) is False for switch in _SWITCHES):
        return {}
    numbers: dict[str, int] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            numbers |= {f"{key}.{name}": count for name, count in experts_of_config(value).items()}
        elif type(value) is int and value > 1 and _is_count(str(key)):  # transformers has labels by number
            numbers[key] = value
    return numbers


def _is_count(key: str) -> bool:
    return _COUNT.search(key) is not None and "shared" not in key and "per_tok" not in key


def top_k_of_config(config: Mapping[str, Any]) -> int | None:
    """How many experts a token chooses; None where the config does not tell."""
    scopes = [config, *(config[key] for key in ("text_config", "ffn_config") if isinstance(config.get(key), dict))]
    values = [scope[key] for scope in scopes for key in _TOP_K if isinstance(scope.get(key), int)]
    return values[0] if values else None
