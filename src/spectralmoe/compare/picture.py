"""The comparison as one picture: a panel a column, a bar a row, whiskers for the 95% interval. Plain SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from spectralmoe.compare.columns import COLUMNS, Column, Row, show

__all__ = ["draw"]

_LABELS, _PANEL, _GAP, _BAR, _TOP, _MARGIN = 190, 150, 22, 22, 64, 16
_COLOURS = ("#3b6fb6", "#d9822b", "#3f9c6b", "#b5485d", "#7a62b3", "#8a7a55", "#4a9fb0", "#9a9a9a")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600}.small{font-size:10px;fill:#666}"
    ".axis{stroke:#bbb}.whisker{stroke:#222;stroke-width:1.2}"
)


def draw(rows: Sequence[Row], title: str) -> str:
    """An SVG document; colours tell the routers apart, the same in every panel."""
    per_line = 4
    lines = -(-len(COLUMNS) // per_line)
    panel_height = _TOP + _BAR * len(rows) + _GAP
    width = 2 * _MARGIN + _LABELS + per_line * (_PANEL + _GAP)
    height = 2 * _MARGIN + 24 + lines * panel_height
    routers = list(dict.fromkeys(row.router for row in rows))
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f"<style>{_STYLE}</style>",
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 12}">{escape(title)}</text>',
    ]
    for index, column in enumerate(COLUMNS):
        line, place = divmod(index, per_line)
        top = _MARGIN + 24 + line * panel_height
        if place == 0:
            parts += _labels(rows, top + _TOP)
        parts += _panel(column, rows, routers, _MARGIN + _LABELS + place * (_PANEL + _GAP), top)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _labels(rows: Sequence[Row], top: float) -> list[str]:
    several = len({row.depth for row in rows}) > 1
    return [
        f'<text x="{_MARGIN + _LABELS - 10}" y="{top + i * _BAR + 14}" text-anchor="end">'
        f"{escape(row.router)}{f' · {row.depth}' if several else ''}</text>"
        for i, row in enumerate(rows)
    ]


def _panel(column: Column, rows: Sequence[Row], routers: Sequence[str], left: float, top: float) -> list[str]:
    low, high = _limits(column, rows)
    scale = _PANEL / (high - low)
    zero = left + (min(max(0.0, low), high) - low) * scale
    bottom = top + _TOP + _BAR * len(rows)
    parts = [
        f"<g><title>{escape(column.meaning)}</title>",
        f'<text class="title" x="{left}" y="{top + 30}">{escape(column.title)}</text>',
        f'<text class="small" x="{left}" y="{top + 46}">{low:.3g} to {high:.3g}</text>',
        f'<line class="axis" x1="{zero:.1f}" y1="{top + _TOP - 4}" x2="{zero:.1f}" y2="{bottom}"/>',
    ]
    for i, row in enumerate(rows):
        value = row.values[column.key]
        y = top + _TOP + i * _BAR
        if value is not None:
            end = left + (value.mean * column.scale - low) * scale
            colour = _COLOURS[routers.index(row.router) % len(_COLOURS)]
            parts.append(
                f'<rect x="{min(zero, end):.1f}" y="{y + 3}" width="{max(abs(end - zero), 0.5):.1f}" '
                f'height="{_BAR - 8}" fill="{colour}" fill-opacity="0.85"/>'
            )
            if value.half:
                reach = value.half * column.scale * scale
                a, b = max(end - reach, left), min(end + reach, left + _PANEL)
                parts.append(
                    f'<path class="whisker" fill="none" d="M{a:.1f} {y + 10}H{b:.1f}M{a:.1f} {y + 6}v8M{b:.1f} {y + 6}v8"/>'
                )
        parts.append(
            f'<text class="small" x="{left + 2}" y="{y + _BAR - 1}" visibility="hidden">{show(column, value)}</text>'
        )
    return [*parts, "</g>"]


def _limits(column: Column, rows: Sequence[Row]) -> tuple[float, float]:
    """The range of one panel: from zero, or, where all values lie close together, from a little below the lowest."""
    found = [v for row in rows if (v := row.values[column.key]) is not None]
    ends = [(v.mean - (v.half or 0)) * column.scale for v in found] + [
        (v.mean + (v.half or 0)) * column.scale for v in found
    ]
    if not ends:
        return 0.0, 1.0
    low, high = min(ends), max(ends)
    if low > 0 and low > 0.5 * high and column.key == "accuracy":
        return low - 0.15 * (high - low or 1.0), high
    return (min(0.0, low), max(0.0, high)) if low != high or low != 0 else (0.0, 1.0)
