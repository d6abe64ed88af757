"""Numbers and text inside the page: matrices at a few bits a value, JSON that no HTML parser can misread."""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import numpy as np

__all__ = ["bits_that_fit", "pack", "script_json", "short"]

_UNSAFE = {ord(c): f"\\u{ord(c):04x}" for c in "<>&\u2028\u2029"}


def script_json(value: Any) -> str:
    r"""JSON for a ``<script type="application/json">``, escaped so that no name in it can end the element.

    >>> script_json({"name": "</script>"})
    '{"name":"\\u003c/script\\u003e"}'
    """
    return json.dumps(_plain(value), separators=(",", ":"), ensure_ascii=False, allow_nan=False).translate(_UNSAFE)


def pack(values: np.ndarray, bits: int, low: float, high: float) -> str:
    """``values`` in base64 at ``bits`` bits each: code 0 is "no data", 1 to 2**bits - 1 go evenly from low to high.

    Shape:
        any, read row by row.

    >>> pack(np.array([0.0, 0.5, 1.0, np.nan]), 8, 0.0, 1.0)
    'AYD/AA=='
    """
    flat = np.asarray(values, dtype=np.float64).ravel()
    known = np.isfinite(flat)
    place = np.where(known, np.clip((flat - low) / max(high - low, 1e-12), 0, 1), 0)
    codes = np.where(known, 1 + np.floor(place * (2**bits - 2) + 0.5), 0).astype(np.uint8)
    digits = np.unpackbits(codes[:, None], axis=1)[:, 8 - bits :]
    return base64.b64encode(np.packbits(digits).tobytes()).decode()


def bits_that_fit(values: int, letters: int) -> int:
    """The most bits (8, 6 or 4) at which so many values take at most so many letters of base64; 4 if none does.

    >>> bits_that_fit(600, 800), bits_that_fit(700, 800), bits_that_fit(10**6, 800)
    (8, 6, 4)
    """
    return next((bits for bits in (8, 6) if values * bits / 6 <= letters), 4)


def short(value: float | None) -> float | None:
    """Four significant digits: what a chart can show."""
    return None if value is None or not math.isfinite(value) else float(f"{value:.4g}")


def _plain(value: Any) -> Any:
    """Infinite and undefined numbers as null; whole numbers without a point."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return None if not math.isfinite(value) else int(value) if value.is_integer() and abs(value) < 2**53 else value
    return value
