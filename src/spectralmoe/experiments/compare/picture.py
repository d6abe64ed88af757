"""The comparison as one picture: a panel a column; a mark for each mean, dots for the seeds, a line for the interval.

Plain SVG, readable in any browser.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape

from spectralmoe.experiments.compare.columns import COLUMNS, Column, Row
from spectralmoe.experiments.statistics import Estimate

__all__ = ["draw"]

_LABELS, _PLOT, _NUMBER, _GAP, _LINE, _HEAD, _MARGIN = 170, 120, 52, 22, 22, 34, 18
_PER_LINE = 4
_COLOURS = ("#2f6db3", "#d17a22", "#2f9465", "#b3415c", "#7458b5", "#8a7440", "#3a98ab", "#7d7d7d")
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-weight:600}.number{font-size:11px;fill:#555}"
    ".tick{font-size:9px;fill:#888}.guide{stroke:#e4e4e4}.zero{stroke:#aaa}"
)


def draw(rows: Sequence[Row], title: str) -> str:
    """An SVG document; colours tell the routers apart, the same in every panel."""
    routers = list(dict.fromkeys(row.router for row in rows))
    panel_width, panel_height = _PLOT + _NUMBER + _GAP, _HEAD + _LINE * len(rows) + _GAP
    lines = -(-len(COLUMNS) // _PER_LINE)
    width = 2 * _MARGIN + _LABELS + _PER_LINE * panel_width
    height = 2 * _MARGIN + 44 + lines * panel_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f'<style>{_STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 10}">{escape(title)}</text>',
        f'<text class="number" x="{_MARGIN}" y="{_MARGIN + 27}">'
        "bar: mean; dots: seeds; line: 95% interval, cut where it leaves the panel</text>",
    ]
    for index, column in enumerate(COLUMNS):
        line, place = divmod(index, _PER_LINE)
        top = _MARGIN + 44 + line * panel_height
        if place == 0:
            parts += _labels(rows, top + _HEAD)
        parts += _panel(column, rows, routers, _MARGIN + _LABELS + place * panel_width, top)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _labels(rows: Sequence[Row], top: float) -> list[str]:
    several = len({row.depth for row in rows}) > 1
    return [
        f'<text x="{_MARGIN + _LABELS - 12}" y="{top + i * _LINE + 15}" text-anchor="end">'
        f"{escape(row.router)}{f', depth {row.depth}' if several else ''}</text>"
        for i, row in enumerate(rows)
    ]


def _panel(column: Column, rows: Sequence[Row], routers: Sequence[str], left: float, top: float) -> list[str]:
    low, high = _limits(column, rows)
    bottom = top + _HEAD + _LINE * len(rows)
    parts = [
        f"<g><title>{escape(column.meaning)}</title>",
        f'<text class="title" x="{left}" y="{top + 22}">{escape(column.title)}</text>',
    ]
    for x, kind in ((left, "guide"), (left + _PLOT, "guide"), (left + _place(0.0, low, high), "zero")):
        parts.append(f'<line class="{kind}" x1="{x:.1f}" y1="{top + _HEAD - 4}" x2="{x:.1f}" y2="{bottom}"/>')
    for x, anchor, end in ((left, "start", low), (left + _PLOT, "end", high)):
        parts.append(f'<text class="tick" x="{x}" y="{bottom + 11}" text-anchor="{anchor}">{end:.3g}</text>')
    for i, row in enumerate(rows):
        value, y = row.values[column.key], top + _HEAD + i * _LINE + _LINE / 2
        if value is not None:
            colour = _COLOURS[routers.index(row.router) % len(_COLOURS)]
            parts += _mark(value, colour, at=lambda x: left + _place(x * column.scale, low, high), y=y)
            number = f"{value.mean * column.scale:.{column.digits}f}"
            parts.append(f'<text class="number" x="{left + _PLOT + 6}" y="{y + 4}">{number}</text>')
    return [*parts, "</g>"]


def _mark(value: Estimate, colour: str, *, at: Callable[[float], float], y: float) -> list[str]:
    parts = []
    if value.half:
        a, b = at(value.mean - value.half), at(value.mean + value.half)
        parts.append(f'<path d="M{a:.1f} {y}H{b:.1f}" stroke="{colour}" stroke-opacity="0.45" stroke-width="3"/>')
    parts += [f'<circle cx="{at(x):.1f}" cy="{y}" r="2.2" fill="{colour}"/>' for x in value.values]
    return [*parts, f'<rect x="{at(value.mean) - 1.5:.1f}" y="{y - 7}" width="3" height="14" fill="{colour}"/>']


def _place(x: float, low: float, high: float) -> float:
    """Pixels from the panel's left edge, cut to the panel."""
    return _PLOT * min(max((x - low) / (high - low), 0.0), 1.0)


def _limits(column: Column, rows: Sequence[Row]) -> tuple[float, float]:
    """The range of one panel: all seeds with a margin, and zero unless the column says otherwise."""
    seeds = [x * column.scale for row in rows if (value := row.values[column.key]) for x in value.values]
    low, high = min(seeds, default=0.0), max(seeds, default=1.0)
    if column.from_zero:
        low, high = min(low, 0.0), max(high, 0.0)
    if low == high:
        high = low + 1.0
    margin = 0.15 * (high - low)
    return (low if low == 0 else low - margin), (high if high == 0 else high + margin)
