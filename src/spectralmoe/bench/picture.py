"""The ratios of a run as one picture: a dot with its interval for each, on a logarithmic axis, targets as ticks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from spectralmoe.report.chart import COLOURS, STYLE

__all__ = ["draw_ratios"]

LABELS, WIDTH, ROW, TOP = 740, 420, 17, 46

Row = Mapping[str, Any]


def draw_ratios(title: str, groups: Mapping[str, Sequence[tuple[str, Row]]]) -> str:
    """An SVG document.

    Args:
        groups: heading -> (label, ratio with "median", "low", "high" and perhaps "at_most").
    """
    rows = [row for group in groups.values() for _, row in group]
    shown = [value for row in rows for key in ("median", "low", "high", "at_most") if (value := row.get(key))] + [1.0]
    low, high = 2 ** math.floor(math.log2(min(shown))), 2 ** math.ceil(math.log2(max(shown)))
    high = max(high, 2 * low)

    def px(value: float) -> float:
        return LABELS + 10 + WIDTH * math.log2(value / low) / math.log2(high / low)

    height = TOP + ROW * (len(rows) + 2 * len(groups)) + 30
    width = LABELS + WIDTH + 80
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="12" y="20">{escape(title)}</text>',
    ]
    for power in range(round(math.log2(low)), round(math.log2(high)) + 1):
        x, kind = px(2.0**power), "zero" if power == 0 else "grid"
        parts.append(f'<line class="{kind}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP - 8}" y2="{height - 24}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{height - 10}" text-anchor="middle">{2.0**power:.2g}</text>')
    y = float(TOP)
    for colour, (heading, group) in zip(COLOURS * len(groups), groups.items(), strict=False):
        parts.append(f'<text class="title" x="12" y="{y + 12}">{escape(heading)}</text>')
        y += ROW
        for label, row in group:
            parts += _row(label, row, px, y, colour)
            y += ROW
        y += ROW
    return "\n".join([*parts, "</svg>"]) + "\n"


def _row(label: str, row: Row, px: Any, y: float, colour: str) -> list[str]:
    middle, x = y + ROW / 2, px(row["median"])
    parts = [f'<text x="{LABELS}" y="{y + 12}" text-anchor="end">{escape(label)}</text>']
    if row.get("at_most"):
        at = px(row["at_most"])
        parts.append(
            f'<line x1="{at:.1f}" x2="{at:.1f}" y1="{y + 2}" y2="{y + ROW - 2}" stroke="#222" stroke-width="2"/>'
        )
    if row["low"]:
        ends = f'x1="{px(row["low"]):.1f}" x2="{px(row["high"]):.1f}"'
        parts.append(f'<line {ends} y1="{middle}" y2="{middle}" stroke="{colour}" stroke-width="1.6"/>')
    parts.append(f'<circle cx="{x:.1f}" cy="{middle}" r="3.2" fill="{colour}"/>')
    return [*parts, f'<text class="tick" x="{LABELS + WIDTH + 20}" y="{y + 12}">{row["median"]:.3g}</text>']
