"""Line charts as plain SVG: panels side by side, one line a series, bars for 95% intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#2f6db3", "#d17a22", "#b3415c", "#2f9465", "#7458b5", "#8a7440", "#3a98ab", "#7d7d7d")
WIDTH, HEIGHT, LEFT, TOP, GAP, BOTTOM = 300, 200, 58, 46, 40, 34
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#222}.title{font-weight:600;font-size:13px}"
    ".tick{font-size:10px;fill:#666}.grid{stroke:#e4e4e4}.zero{stroke:#999;stroke-dasharray:3 3}"
)

Point = tuple[float, float, float]
"""x, y, half width of the interval (0: none)."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One set of axes.

    Attributes:
        title: with the unit.
        series: label -> points.
        log_x: even spacing for depths 2, 4, 8, 16.
        limits: of y; None: from the data.
        marks: values of y at which a dashed line is drawn.
    """

    title: str
    series: Mapping[str, Sequence[Point]]
    x_title: str
    log_x: bool = False
    limits: tuple[float, float] | None = None
    marks: Sequence[float] = ()


def draw(panels: Sequence[Panel], title: str) -> str:
    """An SVG document; a series keeps its colour over all panels."""
    labels = list(dict.fromkeys(label for panel in panels for label in panel.series))
    colours = {label: COLOURS[i % len(COLOURS)] for i, label in enumerate(labels)}
    width = GAP + len(panels) * (LEFT + WIDTH + GAP)
    legend_rows = -(-len(labels) // max(width // 200, 1))
    height = TOP + 18 + HEIGHT + BOTTOM + 18 * legend_rows + 14
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f'<style>{STYLE}</style><rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text class="title" x="{GAP}" y="22">{escape(title)}</text>',
    ]
    for index, panel in enumerate(panels):
        parts += _panel(panel, colours, GAP + LEFT + index * (LEFT + WIDTH + GAP), TOP + 18)
    columns = max(width // 200, 1)
    for index, (label, colour) in enumerate(colours.items()):
        x, y = GAP + 200 * (index % columns), TOP + 18 + HEIGHT + BOTTOM + 18 * (1 + index // columns)
        parts.append(f'<rect x="{x}" y="{y - 9}" width="14" height="4" fill="{colour}"/>')
        parts.append(f'<text x="{x + 20}" y="{y - 3}">{escape(label)}</text>')
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(panel: Panel, colours: Mapping[str, str], left: float, top: float) -> list[str]:
    points = [point for series in panel.series.values() for point in series]
    if not points:
        return [f'<text x="{left}" y="{top + HEIGHT / 2}">{escape(panel.title)}: no data</text>']
    transform = math.log2 if panel.log_x else float
    xs = sorted({point[0] for point in points})
    x0, x1 = transform(xs[0]), transform(xs[-1])
    low, high = panel.limits or _limits(points, panel.marks)

    def px(x: float) -> float:
        return left + 12 + (transform(x) - x0) / max(x1 - x0, 1e-9) * (WIDTH - 24)

    def py(y: float) -> float:
        return top + HEIGHT - (min(max(y, low), high) - low) / (high - low) * HEIGHT

    parts = [f'<text class="title" x="{left}" y="{top - 8}" font-size="12">{escape(panel.title)}</text>']
    for value in _ticks(low, high):
        parts.append(f'<line class="grid" x1="{left}" x2="{left + WIDTH}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>')
        parts.append(f'<text class="tick" x="{left - 6}" y="{py(value) + 3:.1f}" text-anchor="end">{value:.4g}</text>')
    parts += [
        f'<line class="zero" x1="{left}" x2="{left + WIDTH}" y1="{py(value):.1f}" y2="{py(value):.1f}"/>'
        for value in panel.marks
    ]
    parts += [
        f'<text class="tick" x="{px(x):.1f}" y="{top + HEIGHT + 14}" text-anchor="middle">{x:.3g}</text>'
        for x in (xs if len(xs) <= 6 else [xs[0], xs[len(xs) // 2], xs[-1]])
    ]
    parts.append(
        f'<text class="tick" x="{left + WIDTH / 2}" y="{top + HEIGHT + 28}" text-anchor="middle">{panel.x_title}</text>'
    )
    for number, (label, series) in enumerate(panel.series.items()):
        colour, shift = colours[label], (number - len(panel.series) / 2) * 2.5 if len(xs) <= 6 else 0
        line = " ".join(f"{px(x) + shift:.1f},{py(y):.1f}" for x, y, _ in sorted(series))
        parts.append(f'<polyline points="{line}" fill="none" stroke="{colour}" stroke-width="1.6"/>')
        for x, y, half in series:
            if half:
                at = f'x1="{px(x) + shift:.1f}" x2="{px(x) + shift:.1f}"'
                ends = f'y1="{py(y - half):.1f}" y2="{py(y + half):.1f}"'
                parts.append(f'<line {at} {ends} stroke="{colour}" stroke-width="1.2" opacity=".7"/>')
            if len(xs) <= 6:
                tip = f"<title>{escape(label)}: {y:.3f}</title>"
                parts.append(f'<circle cx="{px(x) + shift:.1f}" cy="{py(y):.1f}" r="3" fill="{colour}">{tip}</circle>')
    return parts


def _limits(points: Sequence[Point], marks: Sequence[float]) -> tuple[float, float]:
    """Of the means, with the intervals and marks inside, at round numbers."""
    values = [y - half for _, y, half in points] + [y + half for _, y, half in points] + list(marks)
    low, high = min(values), max(values)
    step = _step(low, high)
    return math.floor(low / step) * step, max(math.ceil(high / step), math.floor(low / step) + 1) * step


def _step(low: float, high: float) -> float:
    """A round distance between four or so grid lines."""
    raw = max(high - low, 1e-9) / 4
    size = 10.0 ** math.floor(math.log10(raw))
    return next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= raw * 0.999)


def _ticks(low: float, high: float) -> list[float]:
    step = _step(low, high)
    first = math.ceil(low / step - 1e-6)
    return [round(step * i, 10) for i in range(first, math.floor(high / step + 1e-6) + 1)]
