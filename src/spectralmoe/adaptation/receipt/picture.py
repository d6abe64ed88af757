"""A receipt as one picture: the corrected sample, and the reference images whose prediction or route changed.

Plain SVG with the images inside, readable in any browser, light or dark.
"""

from __future__ import annotations

import base64
from html import escape
from textwrap import wrap

from torch import Tensor

from spectralmoe.adaptation.receipt.receipt import Flip, Receipt
from spectralmoe.adaptation.receipt.text import carried_lines, sample_line
from spectralmoe.draw.png import png

__all__ = ["STYLE", "draw_receipt"]

SHOWN = 24
_PER_ROW, _CELL, _THUMB, _LINE, _MARGIN, _SAMPLE, _NAME = 8, 96, 72, 15, 20, 120, 10
_FACT, _CHARACTERS = 19, 90  # of the lines beside the sample: height, and what fits in any font
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#222}.title{font-size:15px;font-weight:600}.soft{fill:#5c5c5c}"
    ".note{font-size:11px}.paper{fill:#fff}.frame{fill:none;stroke:#bbb}.better{stroke:#1b7f4b}.worse{stroke:#c0392b}.other{stroke:#8a6d1f}"
    "text.better{fill:#1b7f4b;stroke:none}text.worse{fill:#c0392b;stroke:none}text.other{fill:#8a6d1f;stroke:none}"
    "image{image-rendering:pixelated}"
    "@media(prefers-color-scheme:dark){text{fill:#e8e8e8}.soft{fill:#a9a9a9}.paper{fill:#16181c}.frame{stroke:#555}"
    ".better{stroke:#4cc38a}.worse{stroke:#ff7b6b}.other{stroke:#d9b44a}"
    "text.better{fill:#4cc38a}text.worse{fill:#ff7b6b}text.other{fill:#d9b44a}}"
)


def draw_receipt(receipt: Receipt, image: Tensor, references: Tensor | None = None) -> str:
    """An SVG document.

    Args:
        image: (1, C, H, W) the corrected sample, values in [0, 1], C = 1 or 3.
        references: (N, C, H, W) the guard's samples, for the receipt's indices.

    Raises:
        UserError: samples that are not such images.
    """
    shown = _shown(receipt, references)
    rows = -(-len(shown) // _PER_ROW)
    width = 2 * _MARGIN + _PER_ROW * _CELL
    row_height = _THUMB + 4 * _LINE + 14
    facts = [(line, soft) for text, soft in _facts(receipt) for line in wrap(text, _CHARACTERS)]
    top = _MARGIN + 24 + max(_SAMPLE, _FACT * len(facts)) + 34
    height = top + max(rows * row_height, 0) + _MARGIN
    title = f"One expert corrected: {_arrow(receipt, receipt.before.prediction, receipt.after.prediction)}"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        f'role="img" aria-label="{escape(title, quote=True)}">',
        f"<title>{escape(title)}</title><style>{STYLE}</style>",
        f'<rect class="paper" width="{width}" height="{height}"/>',
        f'<text class="title" x="{_MARGIN}" y="{_MARGIN + 10}">{escape(title)}</text>',
        _picture(image[0], (_MARGIN, _MARGIN + 24), _SAMPLE, "frame", sample_line(receipt)),
    ]
    for i, (text, soft) in enumerate(facts):
        y = _MARGIN + 38 + i * _FACT
        parts.append(f'<text class="{soft}" x="{2 * _MARGIN + _SAMPLE}" y="{y}">{escape(text)}</text>')
    parts.append(f'<text x="{_MARGIN}" y="{top - 12}">{escape(_caption(receipt, len(shown)))}</text>')
    for i, (index, flip) in enumerate(shown):
        row, column = divmod(i, _PER_ROW)
        assert references is not None
        corner = (_MARGIN + column * _CELL, top + row * row_height)
        parts += _cell(receipt, references[index], index, flip, corner)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _shown(receipt: Receipt, references: Tensor | None) -> list[tuple[int, Flip | None]]:
    """At most ``SHOWN`` reference samples: predictions that got worse, other changed ones, then other routes."""
    if receipt.reference is None or references is None:
        return []
    worst_first = sorted(receipt.reference.flipped, key=lambda flip: ("worse", "other", "better").index(_kind(flip)))
    flips: list[tuple[int, Flip | None]] = [(flip.index, flip) for flip in worst_first]
    flipped = {index for index, _ in flips}
    flips += [(index, None) for index in receipt.reference.rerouted if index not in flipped]
    return flips[:SHOWN]


def _kind(flip: Flip) -> str:
    return "better" if flip.after == flip.label else "worse" if flip.before == flip.label else "other"


def _facts(receipt: Receipt) -> list[tuple[str, str]]:
    """Lines beside the sample, each with its class."""
    right, before, after = receipt.name(receipt.label), receipt.before, receipt.after
    experts = ", ".join(f"expert {expert} of {layer}" for layer, expert in receipt.touched.items()) or "nothing written"
    facts = [
        (f"right class {right}: probability {before.right:.1%} before, {after.right:.1%} after", ""),
        (f"{experts}: {receipt.written:,} of {receipt.parameters:,} parameters, by {receipt.method}", "soft"),
    ]
    moved, test = receipt.reference, receipt.test
    if moved is not None:
        c = moved.interference
        text = f"reference: {moved.samples:,} samples, {len(moved.flipped):,} predictions changed, "
        facts.append((text + f"interference {c.mean:+.2f} points [{c.low:+.2f}, {c.high:+.2f}]", "soft"))
    if test is not None:
        c = test.interference
        text = f"test: {c.samples:,} samples, {len(test.flipped):,} predictions changed, "
        facts.append((text + f"interference {c.mean:+.2f} points [{c.low:+.2f}, {c.high:+.2f}]", "soft"))
    if receipt.warning:
        facts.append(("Costs more than its budget on the test data: the whole interval lies below it", "worse"))
    return [*facts, *((line, "soft") for line in carried_lines(receipt.carried_before, receipt.carried_after))]


def _caption(receipt: Receipt, shown: int) -> str:
    if receipt.reference is None:
        return "no reference data: nothing is known about other samples"
    flips, routes = len(receipt.reference.flipped), len(receipt.reference.rerouted)
    if not shown:
        return f"none of the {receipt.reference.samples:,} reference samples changed its prediction or its route"
    total = len({flip.index for flip in receipt.reference.flipped} | set(receipt.reference.rerouted))
    cut = f"; {shown} of {total:,} shown" if shown < total else ""
    return f"reference samples that changed: {flips:,} predictions, {routes:,} routes{cut}"


def _cell(receipt: Receipt, image: Tensor, index: int, flip: Flip | None, corner: tuple[int, int]) -> list[str]:
    """One reference image with its lines below."""
    left, top = corner
    if flip is None or flip.after is None:
        kind, word, lines = "frame", "rerouted", ["same answer"]
        full = f"reference sample {index}: another route, the same prediction"
    else:
        kind = _kind(flip)
        word = {"better": "better", "worse": "worse", "other": "still wrong"}[kind]
        lines = [f"true {_short(receipt.name(flip.label))}", *_arrow_lines(receipt, flip.before, flip.after)]
        names = _arrow(receipt, flip.before, flip.after)
        full = f"reference sample {index}: true {receipt.name(flip.label)}, {names}; {word}"
    style = "soft" if kind == "frame" else kind
    parts = [_picture(image, corner, _THUMB, kind, full)]
    for i, line in enumerate([word, *lines]):
        name = style if i == 0 else ""
        y = top + _THUMB + 15 + i * _LINE
        parts.append(f'<text class="note {name}" x="{left}" y="{y}">{escape(line)}</text>')
    return parts


def _picture(image: Tensor, corner: tuple[int, int], side: int, kind: str, title: str) -> str:
    data = base64.b64encode(png(image)).decode()
    place = f'x="{corner[0]}" y="{corner[1]}" width="{side}" height="{side}"'
    return (
        f"<g><title>{escape(title)}</title>"
        f'<image {place} href="data:image/png;base64,{data}"/>'
        f'<rect class="frame {kind}" {place} stroke-width="2"/></g>'
    )


def _arrow(receipt: Receipt, before: int, after: int) -> str:
    return f"{receipt.name(before)} → {receipt.name(after)}"


def _arrow_lines(receipt: Receipt, before: int, after: int) -> list[str]:
    """Before and after on one line where that fits, else on two."""
    a, b = _short(receipt.name(before)), _short(receipt.name(after))
    return [f"{a} → {b}"] if len(a) + len(b) <= _NAME else [f"{a} →", b]


def _short(name: str) -> str:
    return name if len(name) <= _NAME + 1 else name[:_NAME] + "…"
