"""Figures by matplotlib, ready for a paper: SVG, PDF and PNG from the same panels.

No title is burnt in, since a paper has captions. Intervals are drawn whole, whatever room they need.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from spectralmoe.draw.panels import Intervals, Lines, Mark, Panel
from spectralmoe.errors import UserError
from spectralmoe.files import write_whole

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["KINDS", "write_figure", "write_figures"]

KINDS = ("svg", "pdf", "png")
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#8a7440", "#666666")
"""Told apart with any colour vision (Okabe and Ito), but for the last two."""
_MARKERS = "osD^vPX*"
_STYLE: dict[str, Any] = {
    "font.size": 8,
    "font.family": "DejaVu Sans",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.titlelocation": "left",
    "axes.formatter.useoffset": False,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "spectralmoe",  # the same figure is the same file
    "pdf.fonttype": 42,
    "figure.dpi": 100,
    "savefig.dpi": 200,
}
_METADATA: dict[str, dict[str, Any]] = {"svg": {"Date": None}, "pdf": {"CreationDate": None}, "png": {}}
_ROW, _HEAD, _LETTER, _WIDTH, _LINES_WIDTH, _LINES_HEIGHT = 0.2, 0.85, 0.065, 1.7, 3.2, 2.4  # inches
_BETTER = {"higher": "higher is better", "lower": "lower is better", "": ""}


def write_figures(
    folder: Path, figures: Mapping[str, Sequence[Panel]], *, per_line: int | None = None, names: Sequence[str] = ()
) -> tuple[list[Path], list[str]]:
    """Write each figure that has panels under its name: the paths, and why it could not be drawn, a line each.

    What was measured is worth keeping without pictures, so a missing matplotlib or a full disk is no error here.
    """
    written: list[Path] = []
    try:
        for name, panels in figures.items():
            written += write_figure(folder / name, panels, per_line=per_line, names=names) if panels else []
    except UserError as error:
        return written, [str(error)]
    return written, []


def write_figure(
    stem: Path, panels: Sequence[Panel], *, per_line: int | None = None, names: Sequence[str] = ()
) -> list[Path]:
    """Draw ``panels`` and write ``STEM.svg``, ``STEM.pdf`` and ``STEM.png``; returns their paths.

    Args:
        panels: all of one kind.
        per_line: panels side by side; by default 4 with rows and 2 with lines.
        names: groups or labels in the order of their colours, where several figures share them.

    Raises:
        UserError: matplotlib is not installed; a file cannot be written.
    """
    try:
        import matplotlib as mpl
    except ImportError as error:
        raise UserError("figures need matplotlib: pip install 'spectralmoe[plots]', then the same command") from error
    paths = [stem.with_name(f"{stem.name}.{kind}") for kind in KINDS]
    style: Any = _STYLE  # its keys are names of matplotlib's own
    with mpl.rc_context(style):
        columns = min(per_line or (2 if isinstance(panels[0], Lines) else 4), len(panels))
        figure = _drawn(panels, columns, _colours(names, panels))
        figure.draw_without_rendering()
        figure.set_layout_engine("none")  # it has been laid out, once for all formats
        for kind, path in zip(KINDS, paths, strict=True):
            write_whole(path, partial(_save, figure, kind))
    return paths


def _save(figure: Figure, kind: str, path: Path) -> None:
    figure.savefig(path, format=kind, metadata=_METADATA[kind])


def _drawn(panels: Sequence[Panel], columns: int, colours: Mapping[str, int]) -> Figure:
    from matplotlib.figure import Figure

    lines = [panels[start : start + columns] for start in range(0, len(panels), columns)]
    heights = [max(map(_height, line)) for line in lines]
    figure = Figure(figsize=(_width(panels, columns), sum(heights)))
    figure.set_layout_engine("constrained")
    grid = figure.subplots(len(lines), columns, squeeze=False, gridspec_kw={"height_ratios": heights})
    for line, axes in zip(lines, grid, strict=True):
        for place, ax in enumerate(axes):
            if place >= len(line):
                ax.set_axis_off()
                continue
            panel = line[place]
            ax.set_title(panel.title)
            if isinstance(panel, Intervals):
                _draw_intervals(ax, panel, colours, labels=place == 0)
            else:
                _draw_lines(ax, panel, colours)
    if isinstance(panels[0], Lines):
        _legend(figure, grid.flat)
    return figure


def _width(panels: Sequence[Panel], columns: int) -> float:
    labels = [mark.label for panel in panels if isinstance(panel, Intervals) for mark in panel.marks]
    if not labels:
        return columns * _LINES_WIDTH
    return _LETTER * max(map(len, labels)) + columns * (_WIDTH if columns > 1 else 1.6 * _WIDTH)


def _height(panel: Panel) -> float:
    return _HEAD + _ROW * len(panel.marks) if isinstance(panel, Intervals) else _LINES_HEIGHT


def _colours(names: Sequence[str], panels: Sequence[Panel]) -> dict[str, int]:
    """Group or label -> the number of its colour, the same in all panels."""
    drawn = [
        name
        for panel in panels
        for name in ((mark.group for mark in panel.marks) if isinstance(panel, Intervals) else panel.series)
    ]
    return {name: number for number, name in enumerate(dict.fromkeys([*names, *drawn]))}


def _draw_intervals(ax: Axes, panel: Intervals, colours: Mapping[str, int], *, labels: bool) -> None:
    places = range(len(panel.marks))
    if panel.ratio:
        _ratio_axis(ax)
    for guide in panel.guides:
        ax.axvline(guide, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    for place, mark in zip(places, panel.marks, strict=True):
        _draw_mark(ax, mark, place, _COLOURS[colours[mark.group] % len(_COLOURS)])
    ax.set_ylim(len(panel.marks) - 0.4, -0.6)
    ax.set_yticks(list(places), [mark.label for mark in panel.marks] if labels else [])
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.margins(x=0.08)
    if not panel.ratio:
        ax.locator_params(axis="x", nbins=3)
    about = ", ".join(part for part in (panel.x_title, _BETTER[panel.better]) if part)
    ax.set_xlabel(about, fontsize=7, color="#555555")


def _draw_mark(ax: Axes, mark: Mark, place: int, colour: str) -> None:
    if mark.low is not None and mark.high is not None and mark.high > mark.low:
        ax.plot([mark.low, mark.high], [place, place], color=colour, linewidth=2.4, alpha=0.45, solid_capstyle="butt")
    if mark.points:
        ax.plot(mark.points, [place] * len(mark.points), ".", color=colour, markersize=4)
    if mark.middle is not None:
        ax.plot([mark.middle], [place], "|", color=colour, markersize=9, markeredgewidth=2)
    if mark.at_most is not None:
        ax.plot([mark.at_most], [place], "|", color="black", markersize=10, markeredgewidth=1.2)


def _ratio_axis(ax: Axes) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

    ax.set_xscale("log", base=2)
    ax.xaxis.set_major_locator(LogLocator(2, numticks=8))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _draw_lines(ax: Axes, panel: Lines, colours: Mapping[str, int]) -> None:
    from matplotlib.ticker import FixedLocator, NullLocator, ScalarFormatter

    xs = sorted({point.x for points in panel.series.values() for point in points})
    if panel.log_x and xs and xs[0] > 0:
        ax.set_xscale("log", base=2)
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_locator(NullLocator())
    if len(xs) <= len(_MARKERS):
        ax.xaxis.set_major_locator(FixedLocator(xs))
    for guide in panel.guides:
        ax.axhline(guide, color="#999999", linewidth=0.8, linestyle="--", zorder=0)
    for label, points in panel.series.items():
        number, ordered = colours[label], sorted(points)
        look: dict[str, Any] = {"color": _COLOURS[number % len(_COLOURS)], "label": label, "linewidth": 1.2}
        if len(xs) <= len(_MARKERS):
            look |= {"marker": _MARKERS[number % len(_MARKERS)], "markersize": 3.5}
        halves = [point.half or 0.0 for point in ordered]
        beside = number - (len(colours) - 1) / 2 if any(halves) else 0.0  # intervals stand side by side
        places = [p.x * 1.03**beside if panel.log_x else p.x + 0.008 * beside * (xs[-1] - xs[0]) for p in ordered]
        ax.errorbar(
            places,
            [point.y for point in ordered],
            yerr=halves if any(halves) else None,
            elinewidth=0.9,
            capsize=1.5,
            **look,
        )
    ax.grid(axis="y", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.locator_params(axis="y", nbins=5)
    ax.set_xlabel(panel.x_title)
    ax.set_ylabel(_BETTER[panel.better], fontsize=7, color="#555555")


def _legend(figure: Figure, axes: Any) -> None:
    handles: dict[str, Any] = {}
    for ax in axes:
        lines, labels = ax.get_legend_handles_labels()
        handles |= dict(zip(labels, lines, strict=True))
    if handles:
        entry = _LETTER * max(map(len, handles)) + 0.7
        columns = max(1, min(len(handles), int(figure.get_figwidth() / entry)))
        figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=columns)
