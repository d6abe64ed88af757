"""The regression check: it compares the ratios of a small run with stored ones. It warns and never fails."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from spectralmoe.bench.settings import Settings
from spectralmoe.bench.show import roles
from spectralmoe.errors import UserError
from spectralmoe.json_files import read_json

__all__ = ["MORE", "read_stored", "warnings"]

MORE = 1.25
"""A ratio that has grown by this factor is worth a look."""


def read_stored(path: Path) -> tuple[dict[str, Any], list[str], Settings]:
    """A result of a quick run on the CPU, its suites and settings.

    Raises:
        UserError: something else.
    """
    stored = read_json(path)
    if not isinstance(stored, dict) or stored.get("kind") != "bench":
        raise UserError(f"{path} is not a result of spectralmoe bench")
    made = stored["settings"]
    if not made["quick"] or made["device"] != "cpu":
        raise UserError(f"{path} is not of a quick run on the CPU; make one with: spectralmoe bench --quick --out DIR")
    dtypes = tuple(getattr(torch, name) for name in made["dtypes"])
    settings = Settings(torch.device("cpu"), dtypes, True, made["threads"], made["rounds"], made["keep_memory"])
    return stored, made["suites"], settings


def warnings(stored: Mapping[str, Any], found: Mapping[str, Any]) -> list[str]:
    """A line for each ratio of ours that exceeds ``MORE`` and its old interval, and for each that is missing now."""
    now = {(case["key"], row["of"], row["over"]): row for case in found["cases"] for row in roles(case)}
    lines = []
    for case in stored["cases"]:
        for row in roles(case):
            place = f"{case['key']}: {row['of']} / {row['over']}"
            new = now.get((case["key"], row["of"], row["over"]))
            if new is None:
                lines.append(f"{place} was {row['median']:.2f}, now not measured{_why(found, case['key'], row['of'])}")
            elif new["median"] > MORE * row["median"] and new["median"] > (row["high"] or 0.0):
                lines.append(f"{place} was {row['median']:.2f}, now {new['median']:.2f}")
    return lines


def _why(result: Mapping[str, Any], key: str, name: str) -> str:
    """Why the gate rejects a candidate that was measured before."""
    said = [
        c["gate"] for case in result["cases"] if case["key"] == key for c in case["candidates"] if c["name"] == name
    ]
    return f": {said[0]}" if said and said[0] != "passed" else ""
