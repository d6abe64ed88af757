"""``spectralmoe adapt stream``: corrections in a row on one model, each step written down and drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from statistics import fmean
from typing import TYPE_CHECKING, Annotated, Any

import typer

from spectralmoe.cli.adapt.options import AdaptOptions
from spectralmoe.cli.adapt.trials import NOTHING_WRONG, carried_means
from spectralmoe.cli.console import print_json, show_progress
from spectralmoe.cli.options import Out
from spectralmoe.errors import UserError
from spectralmoe.files import write_text
from spectralmoe.json_files import write_json

if TYPE_CHECKING:
    from spectralmoe.adaptation import StreamStep

__all__ = ["draw_stream", "stream"]

STEPS, PICTURE = "stream.json", "stream.svg"
_LEFT, _RIGHT, _TOP, _PLOT_WIDTH, _PLOT_HEIGHT, _GAP = 64, 24, 58, 560, 130, 56


def stream(
    options: AdaptOptions,
    out: Out,
    count: Annotated[int, typer.Option(min=1, metavar="N", help="How many corrections.")] = 100,
) -> None:
    """Correct N test samples in a row; writes every step, a plot, and the model after the last.

    Example: spectralmoe adapt stream MODEL --count 100 --guard mnist5k --out runs/stream
    """
    import torch

    from spectralmoe.adaptation import correction_stream
    from spectralmoe.adaptation.receipt.text import carried_lines
    from spectralmoe.cli.adapt.setup import output_folder, prepare, save_like
    from spectralmoe.diagnostics import evaluate
    from spectralmoe.machine import describe_machine

    with output_folder(out, options.model), show_progress(quiet=options.json) as progress:
        progress("reading model and data", 0.0)
        prepared = prepare(options)
        network, test = prepared.network, prepared.data().test
        before = evaluate(network, test.images, test.labels).predictions
        steps = correction_stream(
            network,
            test.images,
            test.labels,
            count=count,
            rule=prepared.rule,
            guard=prepared.guard,
            seed=options.seed,
            progress=lambda share: progress("correcting in a row", share),
        )
        if not steps:
            raise UserError(NOTHING_WRONG)
        others = torch.ones(len(test), dtype=torch.bool)
        others[[step.sample for step in steps]] = False
        first = 100 * float((before == test.labels)[others].double().mean())
        result = _summary(steps, first, int(others.sum()))
        about = {"model": str(options.model), "settings": prepared.settings, "machine": describe_machine()}
        write_text(out / PICTURE, draw_stream(steps, first))
        write_json(out / STEPS, {**result, **about, "steps": [asdict(step) for step in steps]})
        save_like(options.model, network, out)
    if options.json:
        print_json({**result, **about})
        return
    typer.echo(prepared.chosen)
    typer.echo(
        f"{len(steps)} corrections in a row, {result['success']:.0%} with success, {result['kept']:.0%} of these right "
        f"at the end; accuracy on the other {result['others']:,} test samples {first:.2f}% -> "
        f"{result['accuracy_after']:.2f}%; {result['seconds']:.2f} s each"
    )
    for line in carried_lines(None, result["carried_after"], "copies of the corrected samples that are right"):
        typer.echo(line)
    typer.echo(f"written to {out}: model, {STEPS}, {PICTURE}")


def _summary(steps: Sequence[StreamStep], before: float, others: int) -> dict[str, Any]:
    return {
        "corrections": len(steps),
        "success": fmean(step.success for step in steps),
        "kept": steps[-1].kept,
        "others": others,
        "accuracy_before": before,
        "accuracy_after": steps[-1].accuracy,
        "seconds": fmean(step.seconds for step in steps),
        "carried_after": carried_means([step.after for step in steps]),
    }


def draw_stream(steps: Sequence[StreamStep], before: float) -> str:
    """Two lines over the number of corrections, as an SVG document: accuracy on other samples, and kept corrections.

    Args:
        before: accuracy on the other samples before the first correction, percent.
    """
    from spectralmoe.adaptation.receipt.picture import STYLE

    accuracy, kept = [before, *(step.accuracy for step in steps)], [100 * step.kept for step in steps]
    width = _LEFT + _PLOT_WIDTH + _RIGHT
    height = _TOP + 2 * _PLOT_HEIGHT + 2 * _GAP
    margin = max(0.15 * (max(accuracy) - min(accuracy)), 0.25)
    low, high = max(min(accuracy) - margin, 0.0), min(max(accuracy) + margin, 100.0)
    title = f"{len(steps)} corrections in a row"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title><style>{STYLE}.line{{fill:none;stroke:#2f6db3;stroke-width:2}}"
        ".axis{stroke:#bbb}@media(prefers-color-scheme:dark){.line{stroke:#6fb1ff}.axis{stroke:#555}}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="title" x="16" y="26">{escape(title)}</text>',
        *_panel("accuracy on other test samples, %", accuracy, 0, len(steps), (low, high), _TOP),
        *_panel("corrections so far that are right, %", kept, 1, len(steps), (0.0, 100.0), _TOP + _PLOT_HEIGHT + _GAP),
        f'<text class="soft" x="{_LEFT + _PLOT_WIDTH}" y="{height - 18}" text-anchor="end">corrections made</text>',
    ]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _panel(
    title: str, values: Sequence[float], first: int, last: int, limits: tuple[float, float], top: float
) -> list[str]:
    """A titled plot of ``values`` at ``first``, ``first`` + 1, ... corrections."""
    (low, high), bottom = limits, top + _PLOT_HEIGHT
    points = [
        (_LEFT + _PLOT_WIDTH * (first + i) / last, bottom - _PLOT_HEIGHT * (value - low) / (high - low))
        for i, value in enumerate(values)
    ]
    path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points)
    end_x, end_y = points[-1]
    return [
        f"<g><title>{escape(title)}: {values[0]:.2f} at first, {values[-1]:.2f} at last</title>",
        f'<text x="{_LEFT}" y="{top - 8}">{escape(title)}</text>',
        *(
            f'<line class="axis" x1="{_LEFT}" y1="{y:.1f}" x2="{_LEFT + _PLOT_WIDTH}" y2="{y:.1f}"/>'
            f'<text class="soft" x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{value:.4g}</text>'
            for y, value in ((top, high), (bottom, low))
        ),
        *(
            f'<text class="soft" x="{x}" y="{bottom + 16}" text-anchor="{anchor}">{n}</text>'
            for x, anchor, n in ((_LEFT, "start", 0), (_LEFT + _PLOT_WIDTH, "end", last))
        ),
        f'<path class="line" d="{path}"/><circle cx="{end_x:.1f}" cy="{end_y:.1f}" r="3" fill="#2f6db3"/></g>',
    ]
